"""The unidirectional GAN's generator (approach 2): encoders, modulator and decoder (paper, section on the
unidirectional network). All that inference needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.approaches import UniganModel
from nst.networks.blocks import AdaptiveNorm, AdaptiveResBlock, InstanceNorm, conv, upsample
from nst.networks.content_encoder import ContentEncoder, ContentFeatures
from nst.networks.style_code import (
    EmbeddingModulator,
    Modulator,
    StatisticsModulator,
    StyleCode,
    colour_statistics,
)
from nst.networks.style_generator import StyleGenerator, fit_for_statistics, pad_to_multiple
from nst.networks.wavelet_encoder import StyleEmbedding, WaveletEncoder, tap_statistics
from nst.wavelets import full_precision


class Decoder(nn.Module):
    """AdaIN residual blocks at stride 8, then up to full size; gated skips at strides 4 and 2.

    Skips pass an instance norm, so that they carry where things are and not how they looked.
    """

    def __init__(self, widths: tuple[int, int, int, int], num_blocks: int) -> None:
        super().__init__()
        full, half, quarter, eighth = widths
        self.blocks = nn.ModuleList([AdaptiveResBlock(eighth) for _ in range(num_blocks)])
        self.enter = InstanceNorm()
        self.up = nn.ModuleList([conv(eighth, quarter, 3), conv(quarter, half, 3), conv(half, full, 3)])
        self.skip = nn.ModuleList([conv(quarter, quarter, 1), conv(half, half, 1)])
        self.skip_norm = InstanceNorm()
        self.gate = nn.ParameterList([nn.Parameter(torch.full((1, n, 1, 1), 0.1)) for n in (quarter, half)])
        self.norms = nn.ModuleList([AdaptiveNorm() for _ in range(3)])
        self.to_rgb = conv(full, 3, 7)
        self.colour_norm = InstanceNorm()
        # taps of the wavelet encoder that drive each norm, and its channels: the tap of its stride (there
        # is none of stride 1); the coarsest one, which has no norm of its stride, joins the next
        self.driven = [((2, 3), eighth)] * (2 * num_blocks) + [((1,), quarter), ((0,), half), ((0,), full)]
        self.splits = [2 * channels for _, channels in self.driven]

    def forward(self, features: ContentFeatures, code: StyleCode) -> Tensor:
        """features of N images, code of N styles -> [N, 3, H, W] in [-1, 1]."""
        parts = iter(code.modulation.split(self.splits, dim=1))
        hidden = self.enter(features.eighth)
        for block in self.blocks:
            hidden = block(hidden, next(parts), next(parts))
        skips = (features.quarter, features.half, None)
        for level, skip in enumerate(skips):
            hidden = self.up[level](upsample(hidden))
            if skip is not None:
                hidden = hidden + self.gate[level] * self.skip[level](self.skip_norm(skip))
            hidden = F.relu(self.norms[level](hidden, next(parts)))
        # the style's own colour statistics: the decoder draws, the palette is the reference's
        rgb = self.colour_norm(full_precision(self.to_rgb(hidden)), code.colour_std, code.colour_mean)
        return soft_clip(rgb)


def soft_clip(images: Tensor) -> Tensor:
    """The identity up to 0.8, then smoothly towards 1: keeps colours that a tanh would dull."""
    knee = 0.8
    excess = images.abs() - knee
    bent = knee + (1 - knee) * torch.tanh(excess / (1 - knee))
    return torch.where(excess > 0, images.sign() * bent, images)


class Generator(StyleGenerator):
    """Encoders, modulator and decoder: `generator(content, generator.encode_style(style))`."""

    stride = ContentEncoder.stride

    def __init__(self, config: UniganModel) -> None:
        super().__init__()
        self.config = config
        self.content_encoder = ContentEncoder(config.content_widths)
        self.style_encoder = WaveletEncoder(config.style_width, absolute=config.absolute_wavelets)
        self.decoder = Decoder(config.content_widths, config.num_blocks)
        num_outputs, taps = sum(self.decoder.splits), self.style_encoder.tap_channels
        self.embedding = None if config.modulator else StyleEmbedding(taps, config.embedding_dim)
        if self.embedding is not None:
            self.modulator = EmbeddingModulator(config.embedding_dim, num_outputs)
        elif config.direct_statistics:  # z is for losses only, here and below
            self.modulator = StatisticsModulator(taps, self.decoder.driven)
        else:
            self.modulator = Modulator(2 * sum(taps), num_outputs)

    def style_statistics(self, images: Tensor) -> Tensor:
        """Tap statistics of style images [M, 3, h, w], sides multiples of 16: [M, F]."""
        return tap_statistics(self.style_encoder(images))

    def describe_style(self, statistics: Tensor) -> Tensor:
        """What the modulator takes of tap statistics [M, F]: themselves, or *z*."""
        return statistics if self.embedding is None else self.embedding(statistics)

    def encode_style(self, style: Tensor) -> StyleCode:
        """style [M, 3, h, w] in [-1, 1] -> the codes of M styles, to be used for any number of contents."""
        fitted = fit_for_statistics(style, self.style_encoder.stride)
        described = self.describe_style(self.style_statistics(fitted))
        return self.modulator(described, colour_statistics(style))

    def decode(self, features: ContentFeatures, code: StyleCode) -> Tensor:
        return self.decoder(features, code.expand(len(features.eighth)))

    def forward(self, content: Tensor, code: StyleCode) -> Tensor:
        """content [N, 3, H, W] in [-1, 1], code of 1 or N styles -> [N, 3, H, W] in [-1, 1]."""
        padded, (height, width) = pad_to_multiple(content, self.stride)
        return self.decode(self.content_encoder(padded), code)[:, :, :height, :width]
