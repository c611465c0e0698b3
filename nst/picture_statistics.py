"""The statistics that a generator's norms would see in a picture that is too large for one pass.

A norm takes mean and deviation of each channel over the whole picture. Tiles that took their own would not
fit together; those of a thumbnail fit, but differ from the whole picture's, which has more detail. Taking
every norm's in turn, each from a pass over the whole picture, is exact and takes a dozen passes.

So: a sample, small crops from all over the picture that go through the network as one batch, whose norms
normalise by what the crops have in common. Then the whole picture goes through in cells, normalised by the
same, and what every norm is given is added up. The sample goes through again, each norm correcting what it
sees by the difference between the whole and the sample, so that what follows from an early norm's correction
reaches the later ones. This is repeated until little changes. Crops of full size answer to a correction as
the picture does; a thumbnail, which was here before, does so less.

Measured with the model in the box on four photographs of 1600x1200 px in cells of 768 px, as the mean
difference to the untiled picture in levels of 255. 0.3 to 0.4 of it are the borders of tiles: it is there
with exact statistics too.

- the sample's own statistics: 7 to 20;
- after one pass over the picture: 1.2 to 2.1, which is mostly the norms in the middle of the network;
- after two, where it mostly ends: 0.3 to 0.5, in 3.9 times the untiled picture's time;
- in cells of 512 and 640 px: the same, now and then with a pass more. In ones of 256, for when memory is
  short: 0.5 to 1.3, with three or four passes, since more of them is near a border;
- with what half the picture's size has, exactly: 1.2 to 1.8 (with other models). The finest detail counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from nst.networks.blocks import EPSILON, InstanceNorm, Statistics, replay_statistics
from nst.pictures import as_float

HALO = 64  # px around a cell: next to a border, a norm is given something else than inside
NUM_CROPS_ALONG, MIN_CROP = 6, 64  # of the side of what is run at once; many small say more than few large
MAX_PASSES = 4
SMALL_CHANGE = 3.0  # levels of 255, of the mean change in the sample; a quarter of it or less is still wrong

Run = Callable[[Tensor], Tensor]  # float [N, 3, h, w] in [-1, 1] through the generator
Moments = Tensor  # [2, 1, C] in float64: the channels' means and mean squares
Given = dict[str, list[Moments]]  # what every norm is given, by its name, in order of its calls
Region = tuple[tuple[float, float], tuple[float, float]]  # rows and columns of a picture, in 0..1
Span = tuple[int, int]


def picture_statistics(
    network: nn.Module, planes: Tensor, run: Run, side: int, stride: int
) -> dict[str, Statistics]:
    """What every InstanceNorm of `network` sees in the whole of [3, H, W]; by name, in order of its calls.

    Args:
        run: pictures through `network`.
        side: px; `side`² of them are run at once. A multiple of the network's `stride`.
    """
    crops, inside = _sample(planes, side, stride)
    drawn, statistics, sampled = _pass_over_sample(network, run, crops, inside)
    if not any(sampled.values()):
        return statistics
    for _ in range(MAX_PASSES):
        whole = _given_in_cells(network, planes, run, statistics, side, stride)
        before = drawn
        drawn, statistics, sampled = _pass_over_sample(network, run, crops, inside, (whole, sampled))
        if float((drawn - before).abs().mean()) * 127.5 < SMALL_CHANGE:
            break
    return statistics


def _sample(planes: Tensor, side: int, stride: int) -> tuple[Tensor, Region]:
    """Crops of [3, H, W], float [N, 3, h, w] of at most `side`² px together, and what of each is not near its
    borders. Places by a sequence of low discrepancy (R2; Roberts 2018), on multiples of `stride`."""
    length = max(side // NUM_CROPS_ALONG // stride * stride, MIN_CROP, 2 * stride)
    size = [min(length, whole) for whole in planes.shape[1:]]
    crops = []
    for index in range(1, max(1, side**2 // length**2) + 1):
        down, along = (
            int((0.5 + index * step) % 1 * (whole - part)) // stride * stride
            for step, whole, part in zip((0.7548776662, 0.5698402910), planes.shape[1:], size, strict=True)
        )
        crops.append(planes[:, down : down + size[0], along : along + size[1]])
    rows, columns = (
        (1 / 8, 7 / 8) if part < whole else (0.0, 1.0)
        for part, whole in zip(size, planes.shape[1:], strict=True)
    )
    return as_float(torch.stack(crops)), (rows, columns)


def _pass_over_sample(
    network: nn.Module,
    run: Run,
    crops: Tensor,
    inside: Region,
    known: tuple[Given, Given] | None = None,
) -> tuple[Tensor, dict[str, Statistics], Given]:
    """The crops drawn, what every norm normalised by, and what it was given.

    Args:
        known: what the norms were given in the whole picture and in the sample, both normalised alike. Each
            normalises by what it is given now, corrected by that difference.
    """
    given: Given = {name: [] for name, _ in _norms(network)}
    used: dict[str, Statistics] = {name: [] for name in given}

    def statistics(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            call = len(used[name])
            mean, std = _mean_and_std(given[name][call])
            if known is not None:
                whole_mean, whole_std = _mean_and_std(known[0][name][call])
                sample_mean, sample_std = _mean_and_std(known[1][name][call])
                mean = mean + (whole_mean - sample_mean) / sample_std * std
                std = std * whole_std / sample_std
            used[name].append((mean.float(), std.float()))
            yield used[name][-1]

    with _replay(network, statistics), _hear(network, inside, given):
        return run(crops), used, given


def _given_in_cells(
    network: nn.Module,
    planes: Tensor,
    run: Run,
    statistics: dict[str, Statistics],
    side: int,
    stride: int,
) -> Given:
    """What every norm is given in the whole picture, if all normalise by `statistics`."""
    totals: Given = {}
    halo, (height, width) = min(-(-HALO // stride), side // 4 // stride) * stride, planes.shape[1:]
    down, along = cells(height, side - 2 * halo, stride), cells(width, side - 2 * halo, stride)
    for (top, bottom), (left, right) in product(down, along):
        rows = around((top, bottom), height, longest(down) + 2 * halo, stride)
        columns = around((left, right), width, longest(along) + 2 * halo, stride)
        inside = _shares_of((top, bottom), rows), _shares_of((left, right), columns)
        given: Given = {name: [] for name in statistics}
        with replay_statistics(network, statistics), _hear(network, inside, given):
            run(as_float(planes[None, :, slice(*rows), slice(*columns)]))
        share = (bottom - top) * (right - left) / (height * width)
        for name, moments in given.items():
            sums = totals.setdefault(name, [torch.zeros_like(one) for one in moments])
            for total, one in zip(sums, moments, strict=True):
                total += one * share
    return totals


def cells(length: int, side: int, stride: int) -> list[Span]:
    """Divides 0..length evenly, on multiples of `stride`, into parts of `side` and less (the last of up to a
    stride more)."""
    num = -(-length // side)
    edges = [length * index // num // stride * stride for index in range(num)]
    return list(pairwise([*edges, length]))


def longest(found: list[Span]) -> int:
    return max(stop - start for start, stop in found)


def around(cell: Span, length: int, side: int, stride: int) -> Span:
    """A cell amid `side` of 0..`length`: all of one size (the last up to a stride more), so that memory
    that one frees fits the next."""
    start = (cell[0] + cell[1] - side) // 2 // stride * stride
    start = max(0, min(start, (length - side) // stride * stride))
    return start, (length if start + side + stride > length else start + side)


def _shares_of(part: Span, whole: Span) -> tuple[float, float]:
    """Where `part` begins and ends in `whole`, in 0..1: features have fewer rows than the picture."""
    length = whole[1] - whole[0]
    return (part[0] - whole[0]) / length, (part[1] - whole[0]) / length


def _norms(network: nn.Module) -> list[tuple[str, InstanceNorm]]:
    return [(name, norm) for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)]


@contextmanager
def _replay(
    network: nn.Module, statistics: Callable[[str], Iterator[tuple[Tensor, Tensor]]]
) -> Iterator[None]:
    """Every InstanceNorm of `network` normalises by what `statistics` of its name yields."""
    for name, norm in _norms(network):
        norm.replayed = statistics(name)
    try:
        yield
    finally:
        for _, norm in _norms(network):
            norm.replayed = None


@contextmanager
def _hear(network: nn.Module, region: Region, given: Given) -> Iterator[None]:
    """Adds to `given` what every InstanceNorm is given in the `region` of each picture, before it
    normalises."""

    def note(name: str, features: Tensor) -> None:
        given[name].append(_moments(features, region))

    for name, norm in _norms(network):
        norm.heard = functools.partial(note, name)
    try:
        yield
    finally:
        for _, norm in _norms(network):
            norm.heard = None


def _moments(features: Tensor, region: Region) -> Moments:
    rows, columns = map(_places, region, features.shape[2:])
    part = features[:, :, rows, columns].float()
    return torch.stack([part.mean(dim=(0, 2, 3)), part.square().mean(dim=(0, 2, 3))]).double()[:, None]


def _places(shares: tuple[float, float], length: int) -> slice:
    """One at least."""
    start = min(round(shares[0] * length), length - 1)
    return slice(start, max(round(shares[1] * length), start + 1))


def _mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    mean, square = moments
    return mean, ((square - mean.square()).clamp(min=0) + EPSILON).sqrt()
