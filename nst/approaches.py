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
    shared_encoders: bool = True

    def __post_init__(self) -> None:
        require(
            len(self.content_widths) == 4 and all(width >= 4 for width in self.content_widths),
            f"model.content_widths must be four numbers of 4 or more, not {self.content_widths}",
        )
        require_positive(self, "style_width", "num_blocks", "embedding_dim")


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
        metric: how artists are told apart: `matrix`, each row against all columns, or `pairs`, the pairwise
            margin loss on one positive and one negative a row.
        fakes_as_negatives: stylized pictures are columns of the encoder's matrix loss.
        realness: weight of the encoder step's hinge loss.
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
    metric: Literal["matrix", "pairs"] = "matrix"
    fakes_as_negatives: bool = True
    realness: float = 1.0
    temperature: float = 0.2
    patch_temperature: float = 0.07
    margin: float = 1.0
    r1: float = 1.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        _require_weights(self, "temperature", "patch_temperature", "margin", "r1_every")


@dataclass(frozen=True, kw_only=True)
class RganModel:
    """Approach 1, the conditional GAN with a U-Net generator and two discriminators.

    Attributes:
        fusion: how the style enters.
        style_width: channels of the wavelet style discriminator's first level.
        embedding_dim: length of the style discriminator's unit vector.
    """

    kind: Literal["rgan"] = "rgan"
    fusion: Literal["adain", "concat6", "wavelet_skips"] = "adain"
    style_width: int = 32
    embedding_dim: int = 128

    def __post_init__(self) -> None:
        require_positive(self, "style_width", "embedding_dim")


@dataclass(frozen=True, kw_only=True)
class RganLoss:
    """Weights of the generator's terms, then the discriminators'. 0 leaves a term out.

    Attributes:
        style: margin distance of (style, stylized) as the style discriminator sees it.
        adversarial: (content, stylized) as the content discriminator sees it.
        mae: |G(c, s) - c|, the paper's L1.
        reconstruction: |G(x, x) - x|.
        luminance: low-band luminance between stylized picture and content.
        margin: m of the pairwise margin loss.
    """

    kind: Literal["rgan"] = "rgan"
    style: float = 0.6
    adversarial: float = 0.4
    mae: float = 0.0
    reconstruction: float = 10.0
    luminance: float = 1.0
    margin: float = 1.0
    r1: float = 1.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        _require_weights(self, "margin", "r1_every")


ModelConfig = UniganModel | RganModel
LossConfig = UniganLoss | RganLoss
