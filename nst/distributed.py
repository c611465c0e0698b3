"""What the ranks of one training say to each other. With one process everything is the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all ranks, without gradients."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def reduce_mean(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Scalars averaged over ranks, in one collective; every rank must bring the same names."""
    names = sorted(metrics)
    if not names:
        return {}
    values = torch.stack([torch.as_tensor(metrics[name]).detach().float().cpu() for name in names])
    if world_size() > 1 and dist.get_backend() == "nccl":
        values = values.cuda()
    return dict(zip(names, mean_over_ranks(values).tolist(), strict=True))


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order. Backward sums what every rank's loss says about my rows, so that the
    mean over ranks that DDP takes is the gradient of the mean loss."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        rows = rows.contiguous()  # parts take the layout over
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def gather(rows: Tensor) -> Tensor:
    """[n, ...] of this rank -> [n * world_size, ...] of all ranks, with gradients. Equal n on every rank."""
    return rows if world_size() == 1 else _Gather.apply(rows)  # type: ignore[return-value]


def gather_labels(labels: Tensor) -> Tensor:
    """Integers of all ranks, in rank order, without gradients."""
    if world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(world_size())]
    dist.all_gather(parts, labels.contiguous())
    return torch.cat(parts)
