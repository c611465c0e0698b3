"""The configuration: frozen dataclasses that validate themselves, and how they become JSON and come back.

Where the cluster is (addresses, workers, endpoints) is a setting, not configuration: it is never in here and
never in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{type(config).__name__}.{name} must be above 0, not {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the networks are.

    Attributes:
        content_widths: channels of content encoder and decoder at strides 1, 2, 4, 8.
        style_width: channels of the wavelet encoder's first tap.
        num_blocks: AdaIN residual blocks of the decoder at stride 8.
        embedding_dim: length of the unit vectors *z* (style) and *h* (content).
        absolute_wavelets: absolute detail bands (Fujieda et al.) in place of signed ones.
    """

    content_widths: tuple[int, int, int, int] = (32, 64, 128, 192)
    style_width: int = 32
    num_blocks: int = 3
    embedding_dim: int = 128
    absolute_wavelets: bool = False

    def __post_init__(self) -> None:
        _require(
            len(self.content_widths) == 4 and all(width >= 4 for width in self.content_widths),
            f"model.content_widths must be four numbers of 4 or more, not {self.content_widths}",
        )
        _require_positive(self, "style_width", "num_blocks", "embedding_dim")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the generator step's terms, then the encoder step's. 0 leaves a term out.

    Attributes:
        matrix: cross-entropy of the stylized picture's *z* onto the artist's other work.
        reference: squared distance of the stylized picture's *z* to the reference's.
        content: pairwise distance of *h* between stylized picture and content.
        patch: PatchNCE of *q* between stylized picture and content.
        adversarial: realness as E_s sees it.
        reconstruction: |G(x, x) - x|.
        luminance: low-band luminance between stylized picture and content.
        statistics: distance of the wavelet encoder's tap statistics.
        bands: sliced Wasserstein distance of Haar bands.
        temperature: tau of the matrix loss.
        patch_temperature: tau of PatchNCE.
        margin: m of the pairwise margin loss.
        r1: gamma of the lazy gradient penalty.
        r1_every: steps between two penalties.
    """

    matrix: float = 1.0
    reference: float = 0.5
    content: float = 0.5
    patch: float = 1.0
    adversarial: float = 1.0
    reconstruction: float = 10.0
    luminance: float = 1.0
    statistics: float = 2.0
    bands: float = 1.0
    temperature: float = 0.2
    patch_temperature: float = 0.07
    margin: float = 1.0
    r1: float = 1.0
    r1_every: int = 16

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _require(value >= 0, f"loss.{item.name} must be 0 or more, not {value}")
        _require_positive(self, "temperature", "patch_temperature", "margin", "r1_every")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Dynamic batches: P classes x K works, with as many fresh photos (method: dynamic batch sampling).

    Attributes:
        num_classes: P, over all ranks. Taken down to the number of classes there are.
        works_per_class: K.
        size: side in pixels of the square crops; a multiple of 16.
        min_scale: smallest share of the shorter side that a crop may take.
    """

    num_classes: int = 8
    works_per_class: int = 2
    size: int = 256
    min_scale: float = 0.6

    def __post_init__(self) -> None:
        _require_positive(self, "num_classes")
        _require(
            self.works_per_class >= 2, f"batch.works_per_class must be 2 or more, not {self.works_per_class}"
        )
        _require(
            self.size >= 32 and self.size % 16 == 0,
            f"batch.size must be a multiple of 16 from 32 up, not {self.size}",
        )
        _require(0 < self.min_scale <= 1, f"batch.min_scale must be in (0, 1], not {self.min_scale}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam for encoders and generator, and what keeps them steady.

    Attributes:
        encoder_lr, generator_lr: learning rates at the start.
        final_lr: share of the learning rate that a cosine leaves at the end.
        warmup_images: images over which the rates rise from 0.
        betas: Adam's.
        gradient_clip: largest norm of a step's gradient.
        ema_decay: of the averaged weights that become the model, per 32 images.
    """

    encoder_lr: float = 2e-4
    generator_lr: float = 1e-4
    final_lr: float = 0.1
    warmup_images: int = 2000
    betas: tuple[float, float] = (0.0, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        _require_positive(self, "encoder_lr", "generator_lr", "gradient_clip")
        _require(0 <= self.ema_decay < 1, f"optim.ema_decay must be in [0, 1), not {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training, whole. Progress is counted in content images, over all ranks.

    Attributes:
        num_images: images to train for.
        seed: of weights, batches and augmentations.
        precision: bf16 means autocast; wavelets, norms and losses stay fp32.
        log_every, checkpoint_every, preview_every: in images.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    num_images: int = 1_000_000
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    log_every: int = 2_000
    checkpoint_every: int = 50_000
    preview_every: int = 50_000

    def __post_init__(self) -> None:
        _require_positive(self, "num_images", "log_every", "checkpoint_every", "preview_every")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The inverse of `to_dict`; unknown names and wrong types are refused.

    Raises:
        ValueError: a name or value that the configuration does not have.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; it has: {', '.join(sorted(hints))}")
    return kind(
        **{name: _convert(hints[name], value, f"{kind.__name__}.{name}") for name, value in values.items()}
    )


def override(config: Any, assignments: dict[str, str]) -> Any:
    """A copy with fields changed, as `--set section.field=value` says it.

    Raises:
        ValueError: no such field, or a value of the wrong kind.
    """
    values = to_dict(config)
    for path, text in assignments.items():
        *sections, name = path.split(".")
        target = values
        for section in sections:
            target = target.get(section)
            if not isinstance(target, dict):
                raise ValueError(f"--set {path}={text}: there is no section {section!r}")
        if name not in target or isinstance(target[name], dict):
            fields = ", ".join(key for key, value in target.items() if not isinstance(value, dict))
            raise ValueError(f"--set {path}={text}: there is no field {name!r} here; there are: {fields}")
        try:
            target[name] = json.loads(text)
        except json.JSONDecodeError:
            target[name] = text
    return from_dict(type(config), values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, not {value!r}")
        return from_dict(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(arguments):
        return tuple(_convert(kind, item, name) for kind, item in zip(arguments, value, strict=True))
    if origin is Literal and value in arguments:
        return value
    if origin is types.UnionType and value is None and type(None) in arguments:
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    expected = (
        " or ".join(map(repr, arguments)) if origin is Literal else getattr(hint, "__name__", str(hint))
    )
    raise ValueError(f"{name} must be {expected}, not {value!r}")
