"""E_c: what is in a picture, whatever its style (approach 2; method: content encoder)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.blocks import CriticResBlock, conv
from nst.wavelets import full_precision


class ContentFeatures(NamedTuple):
    """Features at strides 2, 4 and 8: the last is the decoder's input, the others its skips."""

    half: Tensor  # [N, C1, H/2, W/2]
    quarter: Tensor  # [N, C2, H/4, W/4]
    eighth: Tensor  # [N, C3, H/8, W/8]


class ContentEncoder(nn.Module):
    """conv7, three k4 s2 convolutions, residual blocks; no norm, since it also judges.

    Args:
        widths: channels at strides 1, 2, 4, 8.
        num_blocks: residual blocks at stride 8.
    """

    stride = 8

    def __init__(self, widths: tuple[int, int, int, int], num_blocks: int = 2) -> None:
        super().__init__()
        full, half, quarter, eighth = widths
        self.stem = conv(3, full, 7)
        self.down = nn.ModuleList(
            [conv(full, half, 4, 2), conv(half, quarter, 4, 2), conv(quarter, eighth, 4, 2)]
        )
        self.blocks = nn.Sequential(*[CriticResBlock(eighth) for _ in range(num_blocks)])

    def forward(self, images: Tensor) -> ContentFeatures:
        """images [N, 3, H, W] in [-1, 1]; H and W multiples of 8."""
        features = self.stem(images)
        levels = []
        for down in self.down:
            features = down(F.leaky_relu(features, 0.2))
            levels.append(features)
        return ContentFeatures(levels[0], levels[1], self.blocks(levels[2]))


class ContentHeads(nn.Module):
    """The embeddings that E_c is judged and judges by: *h*, one unit vector an image, and *q*, a map of
    unit vectors at stride 8. Needed in training only."""

    def __init__(
        self, num_channels: int, embedding_dim: int = 128, patch_dim: int = 64, hidden: int = 256
    ) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(num_channels, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, embedding_dim)
        )
        self.patch = nn.Sequential(
            conv(num_channels, hidden, 1), nn.LeakyReLU(0.2), conv(hidden, patch_dim, 1)
        )

    def forward(self, eighth: Tensor) -> tuple[Tensor, Tensor]:
        """eighth [N, C, h, w] -> h [N, D], q [N, d, h, w]; fp32, unit norm."""
        pooled = self.image(eighth.mean(dim=(2, 3)))
        patches = full_precision(self.patch(eighth))
        return F.normalize(full_precision(pooled), dim=1), F.normalize(patches, dim=1)
