"""The style discriminator of approach 1: wavelet CNNs that give each picture a unit vector, near to those of
the same manner (paper, section on the conditional GAN; siamese, trained by the pairwise margin loss)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.approaches import RganModel
from nst.networks.blocks import conv
from nst.networks.wavelet_encoder import StyleEmbedding, WaveletEncoder, tap_statistics
from nst.wavelets import full_precision


class StyleDiscriminator(nn.Module):
    """The wavelet encoder, and a unit vector from its taps' means and deviations: no place in a picture
    matters, and any size will do.

    Args:
        width: channels of the wavelet encoder's first tap.
        embedding_dim: length of the unit vector.
        absolute: absolute detail bands (Fujieda et al.) in place of signed ones.
    """

    def __init__(self, width: int, embedding_dim: int, *, absolute: bool = False) -> None:
        super().__init__()
        self.encoder = WaveletEncoder(width, absolute=absolute)
        self.embedding = StyleEmbedding(self.encoder.tap_channels, embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [-1, 1], H and W multiples of 16 -> [N, D], fp32, unit norm."""
        return self.embedding(tap_statistics(self.encoder(images)))

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Takes this rank's pictures of a step into the running statistics; once a step, every rank."""
        self.embedding.observe(tap_statistics(self.encoder(images)))


class WaveletTrunk(nn.Module):
    """The wavelet CNN of the original: four Haar levels joined to a convolution trunk, and one convolution
    more. At its width of 64 and 128 px: 64@64², 128@32², 256@16², 256@8², 128@4² (method: variant)."""

    def __init__(self, width: int, *, absolute: bool = False) -> None:
        super().__init__()
        self.encoder = WaveletEncoder(width, absolute=absolute)
        self.channels = (*self.encoder.tap_channels, 2 * width)
        self.last = conv(4 * width, 2 * width, 3, 2)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images [N, 3, H, W] in [-1, 1], sides multiples of 16 from 32 up -> features at strides 2 to 32."""
        taps = self.encoder(images)
        return [*taps, F.leaky_relu(self.last(taps[-1]), 0.2)]


class GridStyleDiscriminator(nn.Module):
    """The original's style discriminator: the trunk's last features on a grid of 4x4, then two linear layers;
    4.3 M parameters at width 64 with a vector of 16 (the original's: 4.42 M). At sizes other than 128 px the
    grid is a mean over its cells."""

    grid = 4

    def __init__(self, width: int, embedding_dim: int, *, absolute: bool = False, hidden: int = 512) -> None:
        super().__init__()
        self.trunk = WaveletTrunk(width, absolute=absolute)
        num_features = self.trunk.channels[-1] * self.grid**2
        self.layers = nn.Sequential(
            nn.Linear(num_features, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, embedding_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] in [-1, 1], sides multiples of 16 from 32 up -> [N, D], fp32, unit norm."""
        features = F.adaptive_avg_pool2d(self.trunk(images)[-1], self.grid)
        return F.normalize(full_precision(self.layers(features.flatten(1))), dim=1)

    def observe(self, images: Tensor) -> None:
        """Nothing to take in."""


def build_style_discriminator(config: RganModel) -> StyleDiscriminator | GridStyleDiscriminator:
    kind = {"statistics": StyleDiscriminator, "grid": GridStyleDiscriminator}[config.style_discriminator]
    return kind(config.style_width, config.embedding_dim, absolute=config.absolute_wavelets)
