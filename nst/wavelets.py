"""Haar analysis and synthesis as fixed convolutions (Mallat 1989; Haar 1910). Orthonormal and signed, in the
order of PyWavelets, so that the transform is invertible and keeps energy. An autocast around it changes
nothing: half types become fp32, float64 stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _filters(images: Tensor, num_channels: int, scale: float) -> Tensor:
    """[4 C, 1, 2, 2]: low band, then horizontal, vertical and diagonal detail (`pywt.dwt2`), a channel.

    Filled on the device at each call: a cached tensor would be in the way of `torch.export`, and one copied
    from the host would wait for the GPU.
    """
    filters = images.new_full((num_channels, 4, 2, 2), 0.5 * scale)
    filters[:, 1, 1, :] = -0.5 * scale  # rows differ: horizontal edges
    filters[:, 2, :, 1] = -0.5 * scale  # columns differ: vertical edges
    filters[:, 3, 0, 1] = -0.5 * scale
    filters[:, 3, 1, 0] = -0.5 * scale
    return filters.flatten(0, 1)[:, None]


def full_precision(tensor: Tensor) -> Tensor:
    """fp32 for half types; float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _bands(images: Tensor, scale: float = 1.0) -> Tensor:
    """[N, C, H, W] -> [N, C, 4, ceil(H/2), ceil(W/2)], all four bands times `scale`."""
    num, channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):
        images = full_precision(images)
        # (not F.pad: its backward pass does not compile)
        if height % 2:
            images = torch.cat([images, images[:, :, -1:]], dim=2)
        if width % 2:
            images = torch.cat([images, images[:, :, :, -1:]], dim=3)
        bands = F.conv2d(images, _filters(images, channels, scale), stride=2, groups=channels)
    return bands.reshape(num, channels, 4, *bands.shape[2:])


def haar_analysis(images: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the 2-D Haar transform, in fp32 (float64 for float64).

    Args:
        images: [N, C, H, W] of any range. An odd side is extended by its last row or column, as `pywt.dwt2`
            does in its default mode `symmetric`.

    Returns:
        low [N, C, ceil(H/2), ceil(W/2)], and high [N, 3C, ceil(H/2), ceil(W/2)] with the three detail
        bands (horizontal, vertical, diagonal) of a channel side by side. The low band of a constant image is
        twice the image.
    """
    bands = _bands(images)
    return bands[:, :, 0], bands[:, :, 1:].flatten(1, 2)


def haar_synthesis(low: Tensor, high: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The inverse of `haar_analysis`; `size` (H, W) cuts off what an odd side was extended by.

    Args:
        low: [N, C, h, w]; high: [N, 3C, h, w].

    Returns:
        [N, C, 2h, 2w], or [N, C, *size].
    """
    num, channels, height, width = low.shape
    assert high.shape == (num, 3 * channels, height, width), (low.shape, high.shape)
    with torch.autocast(low.device.type, enabled=False):
        low, high = full_precision(low), full_precision(high)
        bands = torch.cat([low[:, :, None], high.reshape(num, channels, 3, height, width)], dim=2).flatten(
            1, 2
        )
        images = F.conv_transpose2d(bands, _filters(bands, channels, 1.0), stride=2, groups=channels)
    return images if size is None else images[:, :, : size[0], : size[1]]


def haar_pyramid(images: Tensor, num_levels: int) -> list[Tensor]:
    """The bands of each level, the low one first: level k is [N, 4C, H/2^k, W/2^k], k = 1..num_levels, sides
    rounded up. Order of channels: C low, then `high` of `haar_analysis`.

    Every band is divided by two before the next level, so that a level's low band is the mean of its pixels
    and stays in the range of the input.
    """
    levels = []
    for _ in range(num_levels):
        bands = _bands(images, scale=0.5)
        images = bands[:, :, 0]
        levels.append(torch.cat([images, bands[:, :, 1:].flatten(1, 2)], dim=1))
    return levels
