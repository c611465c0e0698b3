"""W, the wavelet CNN: the manner of a picture (Fujieda et al., arXiv 1805.08620; method: style encoder).

Every Haar level joins the trunk through its own convolutions. Low bands carry the global part of a style,
high bands the local one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.blocks import RunningStandardisation, channel_statistics, conv
from nst.wavelets import full_precision, haar_pyramid

NUM_LEVELS = 4


class WaveletEncoder(nn.Module):
    """Four Haar levels joined to a convolution trunk.

    Args:
        width: b of the specification; taps have b, 2b, 4b, 4b channels at strides 2, 4, 8, 16.
        absolute: take the absolute value of the detail bands, as the paper's source does, in place of the
            signed ones.
    """

    stride = 2**NUM_LEVELS

    def __init__(self, width: int, *, absolute: bool = False) -> None:
        super().__init__()
        b = width
        self.absolute = absolute
        self.tap_channels = (b, 2 * b, 4 * b, 4 * b)
        # each level's own path: its 12 bands -> as many channels as the trunk brings
        self.lateral = nn.ModuleList(
            [
                nn.Sequential(conv(12, b, 3)),
                nn.Sequential(conv(12, b, 3)),
                nn.Sequential(conv(12, b, 3), nn.LeakyReLU(0.2), conv(b, 2 * b, 3)),
                nn.Sequential(conv(12, b, 3), nn.LeakyReLU(0.2), conv(b, 4 * b, 3)),
            ]
        )
        joined = (2 * b, 4 * b, 8 * b)
        self.join = nn.ModuleList([conv(n, c, 3) for n, c in zip(joined, self.tap_channels[1:], strict=True)])
        self.down = nn.ModuleList([conv(c, c, 3, 2) for c in self.tap_channels[:-1]])

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [N, 3, H, W] in [-1, 1], H and W multiples of 16 -> taps at strides 2, 4, 8, 16."""
        taps: list[Tensor] = []
        trunk: Tensor | None = None
        for level, bands in enumerate(haar_pyramid(images, NUM_LEVELS)):
            if self.absolute:
                bands = torch.cat([bands[:, :3], bands[:, 3:].abs()], dim=1)
            features = F.leaky_relu(self.lateral[level](bands.contiguous()), 0.2)
            if trunk is not None:
                features = F.leaky_relu(self.join[level - 1](torch.cat([trunk, features], dim=1)), 0.2)
            taps.append(features)
            if level < NUM_LEVELS - 1:
                trunk = F.leaky_relu(self.down[level](features), 0.2)
        return taps


def tap_statistics(taps: list[Tensor]) -> Tensor:
    """Means and standard deviations of all taps, in fp32: [N, 2 * sum of tap channels]."""
    return torch.cat([part for tap in taps for part in channel_statistics(tap)], dim=1)


class StyleEmbedding(nn.Module):
    """*z*: a unit vector an image from the taps' means and standard deviations, standardised first: what
    tells one artist from another is small beside what all pictures share."""

    def __init__(self, tap_channels: tuple[int, ...], embedding_dim: int = 128, hidden: int = 256) -> None:
        super().__init__()
        num_statistics = 2 * sum(tap_channels)
        self.standardise = RunningStandardisation(num_statistics)
        self.layers = nn.Sequential(
            nn.Linear(num_statistics, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, embedding_dim)
        )

    def observe(self, statistics: Tensor) -> None:
        """Takes this rank's batch into the running statistics; once a step, every rank."""
        self.standardise.update(statistics)

    def forward(self, statistics: Tensor) -> Tensor:
        """statistics [N, F] of `tap_statistics` -> z [N, D], fp32, unit norm."""
        return F.normalize(full_precision(self.layers(self.standardise(statistics))), dim=1)


class RealnessHeads(nn.Module):
    """Does it look like art? Maps of logits at strides 8 and 16, the second seeing most of a picture. Needed
    in training only."""

    def __init__(self, tap_channels: tuple[int, ...]) -> None:
        super().__init__()
        local, wide = tap_channels[2:]
        self.local = nn.Sequential(conv(local, local, 3), nn.LeakyReLU(0.2), conv(local, 1, 1))
        self.wide = nn.Sequential(
            conv(wide, wide, 3),
            nn.LeakyReLU(0.2),
            conv(wide, wide, 3),
            nn.LeakyReLU(0.2),
            conv(wide, 1, 1),
        )

    def forward(self, taps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Taps of `WaveletEncoder` -> [N, 1, H/8, W/8] and [N, 1, H/16, W/16]."""
        return self.local(taps[2]), self.wide(taps[3])
