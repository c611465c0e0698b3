"""Haar analysis and synthesis as fixed convolutions. The filters are those of PyWavelets, orthonormal and
signed, so that the transform is invertible and keeps energy."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=8)
def _filters(device: torch.device) -> Tensor:
    """[4, 1, 2, 2]: low, horizontal, vertical and diagonal detail, in the order of `pywt.dwt2`."""
    haar = pywt.Wavelet("haar")  # pyright: ignore[reportAttributeAccessIssue]
    # pywt keeps filters reversed for convolution; a PyTorch convolution is a correlation
    low, high = np.array(haar.dec_lo[::-1]), np.array(haar.dec_hi[::-1])
    rows_columns = [(low, low), (high, low), (low, high), (high, high)]
    stacked = np.stack([np.outer(rows, columns) for rows, columns in rows_columns])
    return torch.tensor(stacked[:, None], dtype=torch.float32, device=device)


def haar_analysis(images: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the 2-D Haar transform, always in fp32.

    Args:
        images: [N, C, H, W]. An odd side is extended by its last row or column, as `pywt.dwt2` does in
            its default mode `symmetric`.

    Returns:
        low [N, C, ceil(H/2), ceil(W/2)], and high [N, 3C, ceil(H/2), ceil(W/2)] with the three detail
        bands (horizontal, vertical, diagonal) of a channel side by side.
    """
    num, channels, height, width = images.shape
    with torch.autocast(images.device.type, enabled=False):
        images = F.pad(images.float(), (0, width % 2, 0, height % 2), mode="replicate")
        flat = images.reshape(num * channels, 1, *images.shape[2:])
        bands = F.conv2d(flat, _filters(images.device), stride=2)  # [N*C, 4, h, w]
    bands = bands.reshape(num, channels, 4, *bands.shape[2:])
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
        details = high.float().reshape(num, channels, 3, height, width)
        bands = torch.cat([low.float()[:, :, None], details], dim=2).reshape(num * channels, 4, height, width)
        images = F.conv_transpose2d(bands, _filters(low.device), stride=2)
    images = images.reshape(num, channels, 2 * height, 2 * width)
    return images if size is None else images[:, :, : size[0], : size[1]]


def haar_pyramid(images: Tensor, num_levels: int) -> list[Tensor]:
    """The bands of each level, the low one first: level k is [N, 4C, H/2^k, W/2^k], k = 1..num_levels.

    The low band of a level is divided by two before the next, so that every level's low band is the mean
    of its pixels and stays in the range of the input.
    """
    levels = []
    for _ in range(num_levels):
        low, high = haar_analysis(images)
        images = low / 2
        levels.append(torch.cat([images, high / 2], dim=1))
    return levels
