"""What the paper's two approaches are made of: the networks and the weights of the losses, as frozen
dataclasses. `kind` tells them apart in JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name} must be above 0, not {value}")


def _require_weights(config: Any, *positive: str) -> None:
    """Numbers are 0 or more; those named are above 0."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, int | float):
            require(value >= 0, f"loss.{item.name} must be 0 or more, not {value}")
    require_positive(config, *positive)


@dataclass(frozen=True, kw_only=True)
class UniganModel:
    """Approach 2, the unidirectional GAN.

    Attributes:
        content_widths: channels of content encoder and decoder at strides 1, 2, 4, 8.
        style_width: channels of the wavelet encoder's first tap.
        num_blocks: AdaIN residual blocks of the decoder at stride 8.
        embedding_dim: length of the unit vectors *z* (style) and *h* (content).
        absolute_wavelets: absolute detail bands (Fujieda et al.) in place of signed ones.
        modulator: the style encoder's statistics drive the decoder through a network of the generator's own;
            without it the embedding *z* does, as in the paper.
        direct_statistics: each AdaIN takes the statistics of the style encoder's tap at its own stride, by a
            linear map that begins as the identity, in place of one code for all. Needs `modulator`.
        shared_encoders: the generator's encoders are the discriminators (the paper's claim). Otherwise the
            discriminators are encoders of their own, and the generator trains its encoders itself.
    """

    kind: Literal["unigan"] = "unigan"
    content_widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    style_width: int = 32
    num_blocks: int = 3
    embedding_dim: int = 128
    absolute_wavelets: bool = False
    modulator: bool = True
    direct_statistics: bool = False
    shared_encoders: bool = True

    def __post_init__(self) -> None:
        require(
            len(self.content_widths) == 4 and all(width >= 4 for width in self.content_widths),
            f"model.content_widths must be four numbers of 4 or more, not {self.content_widths}",
        )
        require_positive(self, "style_width", "num_blocks", "embedding_dim")
        require(
            self.modulator or not self.direct_statistics,
            "model.direct_statistics: z drives the decoder; set model.modulator=true",
        )


@dataclass(frozen=True, kw_only=True)
class UniganLoss:
    """Weights of the generator step's terms, then the encoder step's. 0 leaves a term out.

    Attributes:
        matrix: the stylized picture's *z* onto the artist's other work.
        reference: squared distance of the stylized picture's *z* to the reference's.
        content: pairwise distance of *h* between stylized picture and content.
        patch: PatchNCE of *q* between stylized picture and content.
        adversarial: realness as E_s sees it.
        mae: |G(c, s) - c|, the paper's L1.
        reconstruction: |G(x, x) - x|.
        luminance: low-band luminance between stylized picture and content.
        final_luminance: share of `luminance` that is left at the end of the training.
        statistics: distance of the wavelet encoder's tap statistics.
        bands: sliced Wasserstein distance of Haar bands.
        perceptual: content and style distances of VGG-19 features; needs its weights.
        perceptual_style: how many times as much the style's distance counts in it as the content's.
        grid: energy at periods of 2 to 8 px above that of the frequencies around.
        metric: how artists are told apart: `matrix`, each row against all columns, or `pairs`, the pairwise
            margin loss on one positive and one negative a row.
        fakes_as_negatives: stylized pictures are columns of the encoder's matrix loss.
        realness: weight of the encoder step's hinge loss.
        encoder_patch: PatchNCE of *q* between a content and another rendering of it.
        temperature: tau of the matrix loss.
        patch_temperature: tau of PatchNCE.
        margin: m of the pairwise margin loss.
        r1: gamma of the lazy gradient penalty.
        r1_every: steps between two penalties.
    """

    kind: Literal["unigan"] = "unigan"
    matrix: float = 1.0
    reference: float = 0.5
    content: float = 0.5
    patch: float = 1.0
    adversarial: float = 1.0
    mae: float = 0.0
    reconstruction: float = 10.0
    luminance: float = 1.0
    final_luminance: float = 0.25
    statistics: float = 2.0
    bands: float = 1.0
    perceptual: float = 0.0
    perceptual_style: float = 1.0
    grid: float = 0.0
    metric: Literal["matrix", "pairs"] = "matrix"
    fakes_as_negatives: bool = True
    realness: float = 1.0
    encoder_patch: float = 0.5
    temperature: float = 0.2
    patch_temperature: float = 0.07
    margin: float = 1.0
    r1: float = 1.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        _require_weights(self, "temperature", "patch_temperature", "margin", "r1_every")

    @property
    def asks_encoders(self) -> bool:
        """Whether any of the generator's terms is a judgement by the encoders."""
        judged = (self.matrix, self.reference, self.content, self.patch, self.adversarial, self.statistics)
        return any(judged)


@dataclass(frozen=True, kw_only=True)
class RganModel:
    """Approach 1, the conditional GAN with a U-Net generator and two discriminators.

    Attributes:
        fusion: how the style enters the generator. `concat6`: the style picture beside the content, six
            channels, as in the original. `wavelet_skips`: a wavelet CNN's features of the style picture
            beside the content's skips, the original's variant. `adain`: the statistics of a wavelet encoder
            drive every norm, and no place of the style picture reaches the stylized one.
        palette: what the last layer gives the picture's RGB mean and deviation from: the `style`, the
            `content`, or nothing, the `network` being free to choose, as in the original.
        widths: channels behind each of the generator's stride-2 convolutions, the last being the bottleneck.
        style_width: channels of the wavelet encoders' first tap, in style discriminator and generator.
        style_side: px; `concat6` and `wavelet_skips` keep a style as a square picture of this side.
        absolute_wavelets: absolute detail bands (Fujieda et al.) in place of signed ones.
        style_discriminator: what is made of wavelet features: their `statistics`, or a 4x4 `grid`, as in the
            original.
        embedding_dim: length of the style discriminator's unit vector.
        patch_widths: channels of the content discriminator.
        patch_field: px that each of its logits sees: 70 as in pix2pix, 94 as in the original.
    """

    kind: Literal["rgan"] = "rgan"
    fusion: Literal["adain", "concat6", "wavelet_skips"] = "adain"
    palette: Literal["style", "content", "network"] = "style"
    widths: tuple[int, ...] = (32, 64, 128, 256, 256, 256)
    style_width: int = 32
    style_side: int = 256
    absolute_wavelets: bool = False
    style_discriminator: Literal["statistics", "grid"] = "statistics"
    embedding_dim: int = 128
    patch_widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    patch_field: Literal[70, 94] = 70

    def __post_init__(self) -> None:
        fewest = 6 if self.fusion == "wavelet_skips" else 2  # five levels of style features, and a bottleneck
        require(
            len(self.widths) >= fewest and all(width >= 1 for width in self.widths),
            f"model.widths must be {fewest} or more numbers above 0 for {self.fusion}, not {self.widths}",
        )
        require(
            all(width >= 1 for width in self.patch_widths),
            f"model.patch_widths must be above 0, not {self.patch_widths}",
        )
        require(self.style_side >= 32, f"model.style_side must be 32 or more, not {self.style_side}")
        require_positive(self, "style_width", "embedding_dim")


@dataclass(frozen=True, kw_only=True)
class RganLoss:
    """Weights of the generator's terms, then what the discriminators learn by. 0 leaves a term out.

    Attributes:
        style: pairwise distance of (style, stylized) as the style discriminator sees it.
        adversarial: (content, stylized) as the content discriminator sees it.
        mae: |G(c, s) - c|, the paper's L1.
        reconstruction: |G(x, x) - x|.
        luminance: low-band luminance between stylized picture and content.
        gan: the content discriminator's loss: `hinge`, or `bce` as in the paper.
        augment: the content discriminator sees its pictures shifted and cut (DiffAugment).
        margin: m of the pairwise margin loss.
        r1: gamma of the content discriminator's lazy gradient penalty.
        r1_every: steps between two penalties.
    """

    kind: Literal["rgan"] = "rgan"
    style: float = 0.6
    adversarial: float = 0.4
    mae: float = 0.0
    reconstruction: float = 10.0
    luminance: float = 1.0
    gan: Literal["hinge", "bce"] = "hinge"
    augment: bool = True
    margin: float = 1.0
    r1: float = 1.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        _require_weights(self, "margin", "r1_every")


ModelConfig = UniganModel | RganModel
LossConfig = UniganLoss | RganLoss
