"""Random crops: decoded pixels -> squares of the batch's size, in the same 8 bits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nst.config import BatchConfig


class Crop(NamedTuple):
    """A square of an image, in pixels, and whether it is mirrored."""

    top: int
    left: int
    side: int
    is_mirrored: bool


def choose_crop(height: int, width: int, config: BatchConfig, key: int, size: int) -> Crop:
    """A random square, mirrored half of the time; `key` decides. Never smaller than `config.min_scale` of the
    shorter side, nor than `size` where the image is large enough."""
    draw = np.random.Generator(np.random.Philox(key=key)).random(4)
    short = min(height, width)
    # never enlarge more than the image demands
    smallest = min(short, max(config.min_scale * short, size))
    side = round(smallest + float(draw[0]) * (short - smallest))
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    return Crop(top, left, side, bool(draw[3] < 0.5))


def cut(image: Tensor, crop: Crop, size: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size]."""
    square = image[:, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    if crop.side != size:
        if image.device.type == "cpu":  # resizes 8-bit pixels, fastest where colours are neighbours in memory
            pixels = square[None].contiguous(memory_format=torch.channels_last)
        else:
            pixels = square[None].float()
        resized = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0]
        square = resized if resized.dtype == torch.uint8 else resized.round_().clamp_(0, 255).byte()
    return square.flip(2) if crop.is_mirrored else square


def cut_at_random(image: Tensor, config: BatchConfig, key: int, size: int) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, size, size], the square that `key` decides."""
    _, height, width = image.shape
    return cut(image, choose_crop(height, width, config, key, size), size)


def to_range(pixels: Tensor) -> Tensor:
    """uint8 [..., 3, H, W] -> float32 in [-1, 1]; four dimensions come out with channels last."""
    layout = torch.channels_last if pixels.ndim == 4 else torch.contiguous_format
    return pixels.to(torch.float32, memory_format=layout).div_(127.5).sub_(1.0)


def random_crop(image: np.ndarray, config: BatchConfig, key: int, size: int | None = None) -> Tensor:
    """A random square of the image, mirrored half of the time.

    Args:
        image: uint8 [H, W, 3].
        key: decides the crop.
        size: side of the result; None: the batch's.

    Returns:
        [3, size, size] in [-1, 1].
    """
    size = size or config.size
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return to_range(cut_at_random(pixels, config, key, size))
