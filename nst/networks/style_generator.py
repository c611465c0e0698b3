"""What a generator is, whichever approach it belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.style_code import StyleCode

MIN_SIDE = 16


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
    """Pads at the right and the bottom by mirroring; returns the original (H, W) too."""
    height, width = images.shape[2:]
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"an image of {width}x{height} pixels is too small: at least {MIN_SIDE}x{MIN_SIDE} are needed"
        )
    right, bottom = -width % multiple, -height % multiple
    if right or bottom:
        images = F.pad(images, (0, right, 0, bottom), mode="reflect")
    return images, (height, width)
