"""Large pictures in overlapping tiles that are blended where they meet. A tile's outermost pixels saw a
padded border instead of their neighbours, so they do not count at all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GUARD = 1 / 4  # of the overlap: what is left out at each end of it


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
        write: float [3, h, W] -> the type of the result.
        tile, overlap, stride: px, as in `spans`.
    """
    height, width = picture.shape[1:]
    rows, columns = spans(height, tile, overlap, stride), spans(width, tile, overlap, stride)
    across = [window(span, width, overlap) for span in columns]
    result: Tensor | None = None
    strip, weight = torch.empty(0), torch.empty(0)
    for index, (top, bottom) in enumerate(rows):
        previous_strip, previous_weight = strip, weight
        strip, weight = torch.zeros(3, bottom - top, width), torch.zeros(bottom - top, width)
        if index:
            shared = rows[index - 1][1] - top
            strip[:, :shared], weight[:shared] = previous_strip[:, -shared:], previous_weight[-shared:]
        down = window((top, bottom), height, overlap)
        for (left, right), along in zip(columns, across, strict=True):
            share = torch.outer(down, along)
            strip[:, :, left:right] += render(picture[:, top:bottom, left:right]) * share
            weight[:, left:right] += share
        num_done = (rows[index + 1][0] if index + 1 < len(rows) else bottom) - top
        done = write(strip[:, :num_done] / weight[:num_done])
        if result is None:
            result = torch.empty((3, height, width), dtype=done.dtype)
        result[:, top : top + num_done] = done
    assert result is not None
    return result
