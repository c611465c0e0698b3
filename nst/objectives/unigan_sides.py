"""The two sides of the unidirectional GAN: the encoders that judge, and what draws. One module each, so that
each has one DDP wrapper that sees one forward pass a step."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn

from nst.networks.content_encoder import ContentEncoder, ContentFeatures, ContentHeads
from nst.networks.generator import Generator
from nst.networks.wavelet_encoder import RealnessHeads, StyleEmbedding, WaveletEncoder, tap_statistics


class Judgement(NamedTuple):
    """What the encoders say: four things of pictures looked at for style, two of pictures looked at for
    content. M pictures of each."""

    z: Tensor  # [M, D] style, unit norm
    local: Tensor  # [M, 1, H/8, W/8] realness logits
    wide: Tensor  # [M, 1, H/16, W/16] realness logits
    statistics: Tensor  # [M, F] of the taps
    h: Tensor  # [M, D] content, unit norm
    q: Tensor  # [M, d, H/8, W/8] content of each place, unit norm


class Encoders(nn.Module):
    """E_c and E_s with their heads: the discriminators."""

    content: ContentEncoder
    style: WaveletEncoder
    embedding: StyleEmbedding

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        config = generator.config
        taps = generator.style_encoder.tap_channels
        mine = (generator.content_encoder, generator.style_encoder, generator.embedding)
        if not config.shared_encoders:
            mine = copy.deepcopy(mine)
        self.content, self.style, embedding = mine
        self.embedding = embedding or StyleEmbedding(taps, config.embedding_dim)
        self.realness = RealnessHeads(taps)
        self.content_heads = ContentHeads(config.content_widths[-1], config.embedding_dim)

    def judge_realness(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps of logits of `RealnessHeads`."""
        return self.realness(self.style(images))

    def forward(self, style_images: Tensor, content_images: Tensor) -> Judgement:
        """Both [M, 3, H, W] in [-1, 1]; their numbers may differ."""
        taps = self.style(style_images)
        statistics = tap_statistics(taps)
        local, wide = self.realness(taps)
        h, q = self.content_heads(self.content(content_images).eighth)
        return Judgement(self.embedding(statistics), local, wide, statistics, h, q)


class Drawing(nn.Module):
    """What the generator step trains: modulator and decoder, and the encoders before them only where the
    discriminators have encoders of their own."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.modulator, self.decoder = generator.modulator, generator.decoder
        self.owns_encoders = not generator.config.shared_encoders
        if self.owns_encoders:
            self.content_encoder, self.style_encoder = generator.content_encoder, generator.style_encoder
            self.embedding = generator.embedding
        # in a tuple: not a part of this module
        self._generator = (generator,)

    def look(self, contents: Tensor, styles: Tensor) -> tuple[ContentFeatures, Tensor]:
        """Content features and tap statistics of pictures [M, 3, H, W]."""
        (generator,) = self._generator
        return generator.content_encoder(contents), generator.style_statistics(styles)

    def forward(self, contents: ContentFeatures | Tensor, styles: Tensor, colours: Tensor) -> Tensor:
        """M contents in M styles -> [M, 3, H, W] in [-1, 1]. Where the encoders belong here, `contents` and
        `styles` are pictures; else content features, and styles as the generator describes them."""
        if isinstance(contents, Tensor):
            contents, statistics = self.look(contents, styles)
            styles = self._generator[0].describe_style(statistics)
        return self.decoder(contents, self.modulator(styles, colours))
