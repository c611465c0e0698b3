"""What a generator is, whichever approach it belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.style_code import StyleCode

MIN_SIDE = 16
MIN_STYLE_SIDE = 64


class StyleGenerator(nn.Module, ABC):
    """Any content in any style: `generator(content, generator.encode_style(style))`.

    Images are [N, 3, H, W] in [-1, 1]; any H and W from 16 up (padded inside to a multiple of `stride`).
    """

    stride: int  # a class attribute, or one set by the constructor

    @abstractmethod
    def encode_style(self, style: Tensor) -> StyleCode:
        """style [M, 3, h, w] in [-1, 1] -> the codes of M styles, to be used for any number of contents."""

    @abstractmethod
    def forward(self, content: Tensor, code: StyleCode) -> Tensor:
        """content [N, 3, H, W] in [-1, 1], code of 1 or N styles -> [N, 3, H, W] in [-1, 1]."""


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pads at the right and the bottom by mirroring, to and fro as often as it takes: a large stride may need
    more than a small picture's own length. Returns the original (H, W) too."""
    height, width = images.shape[2:]
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"an image of {width}x{height} pixels is too small: at least {MIN_SIDE}x{MIN_SIDE} are needed"
        )
    for dim, side in ((2, height), (3, width)):
        if side % multiple:
            period = 2 * side - 2
            places = torch.arange(side + -side % multiple, device=images.device) % period
            images = images.index_select(dim, torch.minimum(places, period - places))
    return images, (height, width)


def fit_for_statistics(style: Tensor, stride: int) -> Tensor:
    """Style pictures [M, 3, h, w] of any size, fit for a wavelet encoder: enlarged where too small for its
    statistics to mean anything, sides padded to multiples of `stride`."""
    shorter = min(style.shape[2:])
    if shorter < MIN_STYLE_SIDE:
        size = [max(MIN_STYLE_SIDE, round(side * MIN_STYLE_SIDE / shorter)) for side in style.shape[2:]]
        style = F.interpolate(style, size, mode="bilinear", antialias=True)
    return pad_to_multiple(style, stride)[0]
