"""Gradient accumulation that is exact for losses between the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")
Outputs = tuple[Tensor, ...]


def without_sync(network: nn.Module) -> AbstractContextManager[None]:
    """Backward passes inside leave the gradients of a DDP wrapper on this rank."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def backward_in_parts(
    forward: Callable[[Tensor], Outputs],
    num: int,
    num_parts: int,
    loss_of: Callable[[Outputs], tuple[Tensor, Result]],
    network: nn.Module,
    device: torch.device,
) -> Result:
    """The gradients of `loss_of(forward(all rows))` in the memory of one part (GradCache, Gao et al. 2021,
    arXiv 2101.06983): the outputs of all parts are made without a graph, the loss gives the gradient at each,
    and every part is made again with a graph and takes its share back. Costs a second forward pass.

    Args:
        forward: rows [n] int64 of the batch -> outputs; the same rows must give the same outputs each time.
            An output is [n, ...], or a scalar that is a sum over the rows.
        num: rows in the batch.
        num_parts: 1 works through the batch at once.
        loss_of: outputs of all rows -> the loss, and anything to hand back.
        network: what is trained; if it is a DDP wrapper, gradients travel once.
    """
    rows = torch.arange(num, device=device)
    if num_parts == 1:
        loss, result = loss_of(forward(rows))
        loss.backward()
        return result
    parts = rows.chunk(num_parts)
    with torch.no_grad():
        made = [forward(part) for part in parts]
    outputs = tuple(_joined(pieces).requires_grad_() for pieces in zip(*made, strict=True))
    loss, result = loss_of(outputs)
    loss.backward()
    gradients = [torch.zeros_like(output) if output.grad is None else output.grad for output in outputs]
    for number, part in enumerate(parts):
        with nullcontext() if number == len(parts) - 1 else without_sync(network):
            again = forward(part)
            shares = [gradient[part] if gradient.ndim else gradient for gradient in gradients]
            trained = [(a, s) for a, s in zip(again, shares, strict=True) if a.requires_grad]
            torch.autograd.backward([a for a, _ in trained], [s for _, s in trained])
    return result


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(pieces) if pieces[0].ndim else torch.stack(pieces).sum()
