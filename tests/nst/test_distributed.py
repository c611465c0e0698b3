"""Two ranks with half of a batch each against one rank with all of it: the same loss and the same gradients
once DDP has averaged them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nst.distributed import gather, gather_labels, mean_over_ranks, rank, reduce_mean, world_size
from nst.losses import matrix_loss

NUM, WORLD_SIZE = 16, 2
KINDS = ("plain", "masked", "fakes", "missing")


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Works and fakes [16, 6], labels [16] of 4 artists x 2 works on each rank, and a projection [6, 5]."""
    generator = torch.Generator().manual_seed(0)
    works, fakes = (torch.randn(NUM, 6, generator=generator) for _ in range(2))
    weights = torch.randn(6, 5, generator=generator)
    return works, fakes, torch.arange(NUM) // 2, weights


def loss_of(kind: str, works: Tensor, fakes: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What one rank makes of its rows, as the encoder step does.

    `plain`: against all works; `masked`: without the row itself; `fakes`: they are columns too; `missing`:
    rows of artist 0 have no positive, so that the ranks have unequally many."""
    z, z_fake = (F.normalize(part @ weights, dim=1) for part in (works, fakes))
    columns, all_labels = gather(z), gather_labels(labels)
    first = rank() * len(works)
    positives = (torch.arange(len(works)) ^ 1) + first
    mask = labels[:, None] == all_labels[None, :]
    if kind == "plain":
        return matrix_loss(z, columns, positives, 0.2)
    if kind == "masked":
        return matrix_loss(z, columns, positives, 0.2, mask)
    columns, mask = torch.cat([columns, gather(z_fake)]), F.pad(mask, (0, len(columns)))
    if kind == "fakes":
        return matrix_loss(z, columns, positives, 0.2, mask)
    valid = labels != 0
    each = matrix_loss(z, columns, positives, 0.2, mask, valid, reduction="none")
    return each.sum() / (mean_over_ranks(valid.sum().float()))


def all_results(rows: slice) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss and gradient of the projection, averaged over ranks as DDP does."""
    works, fakes, labels, weights = inputs()
    found = {}
    for kind in KINDS:
        weights = weights.detach().requires_grad_()
        loss = loss_of(kind, works[rows], fakes[rows], labels[rows], weights)
        (gradient,) = torch.autograd.grad(loss, weights)
        found[kind] = (mean_over_ranks(loss), mean_over_ranks(gradient))
    return found


def one_of_two(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=number, world_size=WORLD_SIZE)
    half = NUM // WORLD_SIZE
    found = {
        "losses": all_results(slice(number * half, (number + 1) * half)),
        "rank": (rank(), world_size()),
        "labels": gather_labels(torch.tensor([10 * number, 10 * number + 1])),
        "means": reduce_mean({"b": torch.tensor(1.0 + number), "a": 4 * number}),
    }
    rows = torch.full((1, 2), float(number), requires_grad=True)
    columns = gather(rows)
    # what rank 0 says of rank 1's rows must reach rank 1
    (columns[1 - number] * (number + 1)).sum().backward()
    found |= {"columns": columns.detach(), "gradient": rows.grad}
    torch.save(found, f"{folder}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_of_two, args=(str(folder),), nprocs=WORLD_SIZE)  # type: ignore[attr-defined]
    return [torch.load(Path(folder, f"{number}.pt")) for number in range(WORLD_SIZE)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one(found: list[dict], kind: str) -> None:
    loss, gradient = all_results(slice(0, NUM))[kind]
    assert gradient.abs().max() > 1e-3
    for part in found:
        torch.testing.assert_close(part["losses"][kind][0], loss.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part["losses"][kind][1], gradient, rtol=1e-5, atol=1e-5)


def test_rows_come_in_rank_order_and_gradients_go_back_to_their_rank(found: list[dict]) -> None:
    for number, part in enumerate(found):
        assert part["rank"] == (number, WORLD_SIZE)
        assert part["labels"].tolist() == [0, 1, 10, 11]
        assert part["columns"].tolist() == [[0, 0], [1, 1]]
        assert part["gradient"].tolist() == [[2 - number] * 2]  # from the other rank alone, summed
        assert part["means"] == {"a": 2.0, "b": 1.5}


def test_one_process_is_the_identity() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather(rows) is rows
    assert gather_labels(torch.arange(3)).tolist() == [0, 1, 2]
    assert mean_over_ranks(torch.tensor(3.0)) == 3
    assert reduce_mean({"a": torch.tensor(2.0), "b": 1}) == {"a": 2.0, "b": 1.0}
    assert reduce_mean({}) == {}
    assert (rank(), world_size()) == (0, 1)
