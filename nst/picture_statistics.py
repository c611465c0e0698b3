"""The statistics that a generator's norms would see in a picture that is too large for one pass.

A norm takes mean and deviation of each channel over the whole picture. Tiles that took their own would not
fit together; those of a thumbnail fit, but differ from the whole picture's, which has more detail. Taking
every norm's in turn, each from a pass over the whole picture, is exact and takes a dozen passes.

So: the picture is gone through in cells, normalised by what is known so far, and what every norm is given is
added up and compared with what it is given in the same places of the thumbnail. Then the thumbnail goes
through once more, and each norm corrects what it sees by that difference, so that what follows from an
early norm's correction reaches the later ones. First a quarter of the cells, then all of them, until little
changes.

Measured as the mean difference to the untiled picture in levels of 255, with two trained models on four real
pictures of 1 to 3 megapixels, the side 256 px (costs in forward passes over the picture, of CPU seconds):

- a thumbnail's statistics: 2.9 to 11;
- a quarter of the cells (0.3 to 0.4): 0.9 to 7. Compared with the whole thumbnail instead: 5 to 10;
- a quarter, then all (1.3 to 1.7): 0.02 to 0.24 with the one model, 1.0 to 1.9 with the other, where what
  changed was more than `SMALL_CHANGE`; all once more (2.7 to 3.4): 0.1 to 0.6;
- all, then all (2.1 to 2.6): 0.1 to 0.2 and 0.7 to 1.2; the quarter stands for one of the two. Of 12
  megapixels with the first model, it takes 17 CPU seconds and the two 25;
- what half the picture's size has, exactly: 1.2 to 1.8. The finest detail counts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.blocks import EPSILON, InstanceNorm, Statistics, record_statistics, replay_statistics
from nst.pictures import MIN_SIDE, as_float

HALO = 32  # px around a cell: next to a border, a norm is given something else than inside
MAX_PASSES = 4
# Levels of 255, of the mean change in the thumbnail. Of an error that made it, a pass over everything leaves
# a quarter or less; one over a sample may leave nearly all.
SMALL_CHANGE, SMALL_CHANGE_OF_SAMPLE = 3.5, 1.0

Run = Callable[[Tensor], Tensor]  # float [1, 3, h, w] in [-1, 1] through the generator
Moments = Tensor  # [2, 1, C] in float64: the channels' means and mean squares
Region = tuple[tuple[float, float], tuple[float, float]]  # rows and columns of a picture, in 0..1
WHOLE: Region = (0.0, 1.0), (0.0, 1.0)


def picture_statistics(
    network: nn.Module, planes: Tensor, run: Run, side: int, stride: int
) -> dict[str, Statistics]:
    """What every InstanceNorm of `network` sees in the whole of [3, H, W]; by name, in order of its calls.

    Args:
        run: a picture through `network`.
        side: px, of what is run at once; a multiple of the network's `stride`.
    """
    thumbnail = _thumbnail(planes, side)
    with record_statistics(network) as recorded:
        drawn = run(thumbnail)
    statistics = dict(recorded)
    inner = side - 2 * _halo(stride)
    height, width = planes.shape[1:]
    rows, columns = cells(height, inner, stride), cells(width, inner, stride)
    sample, every = list(product(rows[::2], columns[::2])), list(product(rows, columns))
    passes = [(sample, SMALL_CHANGE_OF_SAMPLE), *[(every, SMALL_CHANGE)] * (MAX_PASSES - 1)]
    for chosen, small_change in passes:
        regions = [(_shares_of(down, (0, height)), _shares_of(along, (0, width))) for down, along in chosen]
        given = _moments_in_cells(network, planes, run, statistics, chosen, stride)
        with replay_statistics(network, statistics), _moments_given(network, regions) as reduced:
            run(thumbnail)
        with _replay_corrected(network, statistics, given, reduced) as corrected:
            before, drawn = drawn, run(thumbnail)
        statistics = corrected
        if float((drawn - before).abs().mean()) * 127.5 < small_change:
            break
    return statistics


def _thumbnail(planes: Tensor, side: int) -> Tensor:
    """[3, H, W] -> float [1, 3, h, w] of at most `side`² px."""
    shrink = min(1.0, side / math.sqrt(planes[0].numel()))
    size = [max(MIN_SIDE, round(length * shrink)) for length in planes.shape[1:]]
    return as_float(F.interpolate(planes[None], size=size, mode="bilinear", antialias=True))


def _moments_in_cells(
    network: nn.Module,
    planes: Tensor,
    run: Run,
    statistics: dict[str, Statistics],
    chosen: list[tuple[tuple[int, int], tuple[int, int]]],
    stride: int,
) -> dict[str, list[Moments]]:
    """What every norm is given in the `chosen` cells together, if all normalise by `statistics`."""
    totals: dict[str, list[Moments]] = {}
    halo, (height, width) = _halo(stride), planes.shape[1:]
    num_pixels = sum((bottom - top) * (right - left) for (top, bottom), (left, right) in chosen)
    for (top, bottom), (left, right) in chosen:
        rows = max(0, top - halo), min(height, bottom + halo)
        columns = max(0, left - halo), min(width, right + halo)
        inside = _shares_of((top, bottom), rows), _shares_of((left, right), columns)
        with replay_statistics(network, statistics), _moments_given(network, [inside]) as given:
            run(as_float(planes[None, :, slice(*rows), slice(*columns)]))
        share = (bottom - top) * (right - left) / num_pixels
        for name, moments in given.items():
            sums = totals.setdefault(name, [torch.zeros_like(one) for one in moments])
            for total, one in zip(sums, moments, strict=True):
                total += one * share
    return totals


def _halo(stride: int) -> int:
    return -(-HALO // stride) * stride


def cells(length: int, side: int, stride: int) -> list[tuple[int, int]]:
    """Divides 0..length evenly, on multiples of `stride`, into parts of `side` and less (the last of up to a
    stride more)."""
    num = -(-length // side)
    edges = [length * index // num // stride * stride for index in range(num)]
    return list(pairwise([*edges, length]))


def _shares_of(part: tuple[int, int], whole: tuple[int, int]) -> tuple[float, float]:
    """Where `part` begins and ends in `whole`, in 0..1: features have fewer rows than the picture."""
    length = whole[1] - whole[0]
    return (part[0] - whole[0]) / length, (part[1] - whole[0]) / length


@contextmanager
def _moments_given(network: nn.Module, regions: list[Region]) -> Iterator[dict[str, list[Moments]]]:
    """Collects what every InstanceNorm in `network` is given, whatever it normalises by; by name, in order
    of its calls, in the `regions` alone."""
    given: dict[str, list[Moments]] = {}
    with _hear(
        network, lambda name, features: given.setdefault(name, []).append(_moments(features, regions))
    ):
        yield given


@contextmanager
def _replay_corrected(
    network: nn.Module,
    known: dict[str, Statistics],
    whole: dict[str, list[Moments]],
    reduced: dict[str, list[Moments]],
) -> Iterator[dict[str, Statistics]]:
    """Every norm normalises by what it is given, corrected by how `whole` differs from `reduced`; collects
    what they normalise by."""
    corrected: dict[str, Statistics] = {name: [] for name in known}
    given: dict[str, list[Moments]] = {name: [] for name in known}

    def statistics(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for whole_moments, reduced_moments in zip(whole[name], reduced[name], strict=True):
            mean, std = _mean_and_std(given[name].pop())
            whole_mean, whole_std = _mean_and_std(whole_moments)
            reduced_mean, reduced_std = _mean_and_std(reduced_moments)
            mean = mean + (whole_mean - reduced_mean) / reduced_std * std
            corrected[name].append((mean.float(), (std * whole_std / reduced_std).float()))
            yield corrected[name][-1]

    norms = [(name, norm) for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)]
    for name, norm in norms:
        norm.replayed = statistics(name)
    try:
        with _hear(network, lambda name, features: given[name].append(_moments(features, [WHOLE]))):
            yield corrected
    finally:
        for _, norm in norms:
            norm.replayed = None


@contextmanager
def _hear(network: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Tells `note` the name and the input of every InstanceNorm in `network`, before it normalises."""
    norms = [(name, norm) for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)]
    for name, norm in norms:
        norm.heard = functools.partial(note, name)
    try:
        yield
    finally:
        for _, norm in norms:
            norm.heard = None


def _moments(features: Tensor, regions: list[Region]) -> Moments:
    total, num_pixels = torch.zeros((), dtype=torch.float64), 0
    for region in regions:
        rows, columns = map(_places, region, features.shape[2:])
        part = features[:, :, rows, columns].float()
        moments = torch.stack([part.mean(dim=(2, 3)), part.square().mean(dim=(2, 3))])
        area = part[0, 0].numel()
        total, num_pixels = total + moments.double() * area, num_pixels + area
    return total / num_pixels


def _places(shares: tuple[float, float], length: int) -> slice:
    """One at least."""
    start = min(round(shares[0] * length), length - 1)
    return slice(start, max(round(shares[1] * length), start + 1))


def _mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    mean, square = moments
    return mean, ((square - mean.square()).clamp(min=0) + EPSILON).sqrt()
