"""The content discriminator of approach 1: does the second picture show what is in the first? (paper, section
on the conditional GAN; PatchGAN: Isola et al. 2017, pix2pix)"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = {70: (2, 2, 2, 1, 1), 94: (2, 2, 2, 2, 2)}  # of the five convolutions, by the field of a logit


class PatchDiscriminator(nn.Module):
    """Five 4x4 convolutions on content and picture side by side; each logit judges one patch.

    No norm: an instance norm would hide colour and contrast, and a batch norm would mix real and fake.

    Args:
        widths: channels of the first four convolutions; the fifth gives the logits.
        field: px that a logit sees: 70, the PatchGAN of pix2pix, whose last two convolutions have stride 1;
            or 94, where all have stride 2, as in the original.
    """

    def __init__(
        self, widths: tuple[int, int, int, int] = (64, 128, 256, 512), field: Literal[70, 94] = 70
    ) -> None:
        super().__init__()
        channels = pairwise((6, *widths, 1))
        self.layers = nn.ModuleList(
            [
                _conv(num_in, num_out, stride)
                for (num_in, num_out), stride in zip(channels, STRIDES[field], strict=True)
            ]
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """pairs [N, 6, H, W] in [-1, 1], content and picture, 32 px or more a side -> logits [N, 1, h, w]."""
        features = self.layers[0](pairs)
        for layer in self.layers[1:]:
            features = layer(F.leaky_relu(features, 0.2))
        return features


def _conv(num_in: int, num_out: int, stride: int) -> nn.Conv2d:
    """4x4; one pixel of border whatever the stride, as in pix2pix. Starts so that signals keep their size."""
    layer = nn.Conv2d(num_in, num_out, 4, stride, 1, padding_mode="reflect")
    nn.init.kaiming_normal_(layer.weight, a=0.2)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
