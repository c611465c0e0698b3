"""The statistics that a generator's norms would see in a picture that is too large for one pass.

A norm takes mean and deviation of each channel over the whole picture. Tiles that took their own would not
fit together; those of a thumbnail fit, but differ from the whole picture's, which has more detail. Taking
every norm's in turn, each from a pass over the whole picture, is exact and takes a dozen passes.

So: the picture is gone through in cells, normalised by what is known so far, and what every norm is given is
added up and compared with what it is given in the thumbnail. Then the thumbnail goes through once more, and
each norm corrects what it sees by that difference, so that what follows from an early norm's correction
reaches the later ones. Measured as the mean difference to the untiled picture, in levels of 255: a thumbnail
of 768 px of a picture of 1000 px leaves 1.4 and one pass 0.04; one of 384 px leaves 7.2, one pass 1.2 and two
0.06.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.blocks import EPSILON, InstanceNorm, Statistics, record_statistics, replay_statistics
from nst.pictures import MIN_SIDE, as_float

HALO = 32  # px around a cell: next to a border, a norm is given something else than inside
MAX_PASSES = 4
SMALL_CHANGE = 2.0  # levels of 255 in the thumbnail; of an error that made it, a quarter or less is left

WHOLE = (0.0, 1.0)

Run = Callable[[Tensor], Tensor]  # float [1, 3, h, w] in [-1, 1] through the generator
Moments = Tensor  # [2, 1, C] in float64: the channels' means and mean squares


def picture_statistics(
    network: nn.Module, planes: Tensor, run: Run, side: int, stride: int
) -> dict[str, Statistics]:
    """What every InstanceNorm of `network` sees in the whole of [3, H, W]; by name, in order of its calls.

    Args:
        run: a picture through `network`.
        side: px, of what is run at once; a multiple of the network's `stride`.
    """
    thumbnail = _thumbnail(planes, side)
    with record_statistics(network) as statistics:
        drawn = run(thumbnail)
    statistics = dict(statistics)
    for _ in range(MAX_PASSES):
        whole = _moments_in_cells(network, planes, run, statistics, side, stride)
        with replay_statistics(network, statistics), _moments_given(network) as reduced:
            run(thumbnail)
        with _replay_corrected(network, statistics, whole, reduced) as corrected:
            before, drawn = drawn, run(thumbnail)
        statistics = corrected
        if float((drawn - before).abs().mean()) * 127.5 < SMALL_CHANGE:
            break
    return statistics


def _thumbnail(planes: Tensor, side: int) -> Tensor:
    """[3, H, W] -> float [1, 3, h, w] of at most `side`² px."""
    shrink = min(1.0, side / math.sqrt(planes[0].numel()))
    size = [max(MIN_SIDE, round(length * shrink)) for length in planes.shape[1:]]
    return as_float(F.interpolate(planes[None], size=size, mode="bilinear", antialias=True))


def _moments_in_cells(
    network: nn.Module, planes: Tensor, run: Run, statistics: dict[str, Statistics], side: int, stride: int
) -> dict[str, list[Moments]]:
    """What every norm is given over the whole picture, if all normalise by `statistics`."""
    totals: dict[str, list[Moments]] = {}
    halo = -(-HALO // stride) * stride
    height, width = planes.shape[1:]
    edges = (cells(length, side - 2 * halo, stride) for length in (height, width))
    for (top, bottom), (left, right) in itertools.product(*edges):
        rows = slice(max(0, top - halo), min(height, bottom + halo))
        columns = slice(max(0, left - halo), min(width, right + halo))
        inside = _share_of(top, bottom, rows), _share_of(left, right, columns)
        with replay_statistics(network, statistics), _moments_given(network, inside) as given:
            run(as_float(planes[None, :, rows, columns]))
        share = (bottom - top) * (right - left) / (height * width)
        for name, moments in given.items():
            sums = totals.setdefault(name, [torch.zeros_like(one) for one in moments])
            for total, one in zip(sums, moments, strict=True):
                total += one * share
    return totals


def cells(length: int, side: int, stride: int) -> list[tuple[int, int]]:
    """Divides 0..length evenly, on multiples of `stride`, into parts of `side` and less (the last of up to a
    stride more)."""
    num = -(-length // side)
    edges = [length * index // num // stride * stride for index in range(num)]
    return list(itertools.pairwise([*edges, length]))


def _share_of(start: int, stop: int, whole: slice) -> tuple[float, float]:
    """Where start..stop begins and ends in `whole`, in 0..1: features have fewer rows than the picture."""
    length = whole.stop - whole.start
    return (start - whole.start) / length, (stop - whole.start) / length


@contextmanager
def _moments_given(
    network: nn.Module, inside: tuple[tuple[float, float], tuple[float, float]] = (WHOLE, WHOLE)
) -> Iterator[dict[str, list[Moments]]]:
    """Collects what every InstanceNorm in `network` is given, whatever it normalises by; by name, in order
    of its calls, of the rows and columns `inside` alone."""
    given: dict[str, list[Moments]] = {}

    def note(name: str, features: Tensor) -> None:
        rows, columns = (
            slice(*(round(edge * length) for edge in edges))
            for edges, length in zip(inside, features.shape[2:], strict=True)
        )
        given.setdefault(name, []).append(_moments(features[:, :, rows, columns]))

    with _hear(network, note):
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
    given: dict[str, list[Tensor]] = {name: [] for name in known}

    def statistics(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        differences = zip(map(_mean_and_std, whole[name]), map(_mean_and_std, reduced[name]), strict=True)
        for recorded in known[name]:
            if not given[name]:  # asked for something that no norm is given: the content's own colours
                corrected[name].append(recorded)
            else:
                (mean, std), (whole_part, reduced_part) = _mean_and_std(given[name].pop()), next(differences)
                mean = mean + (whole_part[0] - reduced_part[0]) / reduced_part[1] * std
                corrected[name].append((mean.float(), (std * whole_part[1] / reduced_part[1]).float()))
            yield corrected[name][-1]

    norms = [(name, norm) for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)]
    for name, norm in norms:
        norm.replayed = statistics(name)
    try:
        with _hear(network, lambda name, features: given[name].append(_moments(features))):
            yield corrected
    finally:
        for _, norm in norms:
            norm.replayed = None


@contextmanager
def _hear(network: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Tells `note` the name and the input of every InstanceNorm in `network`, before it normalises."""

    def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda norm, inputs: note(name, inputs[0])

    norms = [(name, norm) for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)]
    handles = [norm.register_forward_pre_hook(listener(name)) for name, norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moments(features: Tensor) -> Moments:
    features = features.float()
    return torch.stack([features.mean(dim=(2, 3)), features.square().mean(dim=(2, 3))]).double()


def _mean_and_std(moments: Moments) -> tuple[Tensor, Tensor]:
    mean, square = moments
    return mean, ((square - mean.square()).clamp(min=0) + EPSILON).sqrt()
