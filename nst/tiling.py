"""Large pictures in overlapping tiles that are blended where they meet. A tile's outermost pixels saw a
padded border instead of their neighbours, so they do not count at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 1 / 4  # of the overlap: what is left out at each end of it
ROWS_AT_ONCE = 256  # written to the result


def spans(length: int, tile: int, overlap: int, stride: int) -> list[tuple[int, int]]:
    """Intervals that cover 0..length: evenly spread, each `tile` long (the last up to `stride` longer), at
    least `overlap` shared by neighbours, starts on multiples of `stride`, as the network's grid has them."""
    assert tile % stride == 0, (tile, stride)
    assert 0 <= overlap <= tile - 2 * stride, (tile, overlap, stride)
    if length <= tile:
        return [(0, length)]
    num = math.ceil((length - overlap) / (tile - overlap - stride))
    starts = [(length - tile) * index // (num - 1) // stride * stride for index in range(num)]
    return [(start, length if start == starts[-1] else start + tile) for start in starts]


def window(span: tuple[int, int], length: int, overlap: int) -> Tensor:
    """The weight of each position of `span`: 1 inside, a raised cosine over an overlap, next to nothing in
    the overlap's outermost quarter. No fading at the ends of 0..length, where nothing is blended."""
    positions = torch.arange(span[1] - span[0], dtype=torch.float32) + 0.5
    guard = overlap * GUARD
    ramp = ((positions - guard) / (overlap - 2 * guard)).clamp(0, 1)
    rise = (0.5 - 0.5 * torch.cos(math.pi * ramp)).clamp(min=1e-6)
    weights = torch.ones_like(positions)
    if span[0] > 0:
        weights = weights * rise
    if span[1] < length:
        weights = weights * rise.flip(0)
    return weights


def shares(intervals: list[tuple[int, int]], length: int, overlap: int) -> list[Tensor]:
    """The share of each interval at each of its positions: their windows, made to sum to 1 everywhere."""
    windows = [window(span, length, overlap) for span in intervals]
    total = torch.zeros(length)
    for (start, stop), weights in zip(intervals, windows, strict=True):
        total[start:stop] += weights
    return [weights / total[slice(*span)] for span, weights in zip(intervals, windows, strict=True)]


def render_in_tiles(
    picture: Tensor,
    render: Callable[[Tensor], Tensor],
    write: Callable[[Tensor], Tensor],
    tile: int,
    overlap: int,
    stride: int,
) -> Tensor:
    """Passes `picture` through `render` tile by tile.

    Besides the picture and its result, memory holds one tile and one strip of a tile's height in fp32.

    Args:
        picture: [3, H, W] of any type.
        render: a tile of the picture [3, h, w] -> float [3, h, w] on the CPU.
        write: float [3, h, W] -> the type of the result, which has the picture's.
        tile, overlap, stride: px, as in `spans`.
    """
    height, width = picture.shape[1:]
    rows, columns = spans(height, tile, overlap, stride), spans(width, tile, overlap, stride)
    down, along = shares(rows, height, overlap), shares(columns, width, overlap)
    result = torch.empty_like(picture)
    above = torch.empty(3, 0, width)  # of the tiles that went before, what this strip shares with them
    for index, (top, bottom) in enumerate(rows):
        strip = torch.zeros(3, bottom - top, width)
        strip[:, : above.shape[1]] = above
        for (left, right), share in zip(columns, along, strict=True):
            tile_done = render(picture[:, top:bottom, left:right])
            strip[:, :, left:right] += tile_done * torch.outer(down[index], share)
        num_done = (rows[index + 1][0] if index + 1 < len(rows) else bottom) - top
        above = strip[:, num_done:].clone()
        for start in range(0, num_done, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, num_done)
            result[:, top + start : top + stop] = write(strip[:, start:stop])
    return result
