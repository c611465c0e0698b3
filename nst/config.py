"""The configuration: frozen dataclasses that validate themselves, and how they become JSON and come back.

Where the cluster is (addresses, workers, endpoints) is a setting, not configuration: it is never in here and
never in a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from nst.approaches import LossConfig, ModelConfig, UniganLoss, UniganModel, require, require_positive


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Dynamic batches: P classes x K works, with as many fresh photos (method: dynamic batch sampling).

    Attributes:
        num_classes: P, over all ranks. Taken down to the number of classes there are.
        works_per_class: K.
        size: side in pixels of the square crops; a multiple of 16.
        sizes: sides that steps take in turn, each once in len(sizes) steps in random order; empty: always
            `size`. A batch then holds as many classes as fit into the pixels of P x K crops at `size`.
        min_scale: smallest share of the shorter side that a crop may take.
        sampling: random draws N = P*K artworks from the whole corpus, whoever made them (ablation).
        adaptive: how strongly the classes with a high recent loss are drawn more often; 0: not at all.
        accumulate: parts that a rank's batch is worked through in, to save memory; the gradients stay those
            of the whole batch.
        window_shards: shards at a time that neighbouring steps draw from, for corpora larger than the cache
            of shards (what then still holds: `nst.sampling.DynamicBatchSampler`); 0: all.
    """

    num_classes: int = 8
    works_per_class: int = 2
    size: int = 256
    sizes: tuple[int, ...] = ()
    min_scale: float = 0.6
    sampling: Literal["dynamic", "random"] = "dynamic"
    adaptive: float = 0.0
    accumulate: int = 1
    window_shards: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "num_classes", "accumulate")
        require(
            self.works_per_class >= 2, f"batch.works_per_class must be 2 or more, not {self.works_per_class}"
        )
        require(
            self.size >= 32 and self.size % 16 == 0,
            f"batch.size must be a multiple of 16 from 32 up, not {self.size}",
        )
        for size in self.sizes:
            require(
                size >= 32 and size % 16 == 0,
                f"batch.sizes must be multiples of 16 from 32 up; {size} is none",
            )
            # one class alone has nothing to be told apart from
            require(
                self.classes_within_budget(size) >= min(2, self.num_classes),
                f"batch.sizes: {size} px leaves room for fewer than 2 classes in the pixels of "
                f"{self.num_classes} x {self.works_per_class} crops at {self.size} px; use a larger "
                "batch.num_classes or batch.size",
            )
        require(0 < self.min_scale <= 1, f"batch.min_scale must be in (0, 1], not {self.min_scale}")
        require(
            self.window_shards >= 0, f"batch.window_shards must be 0 (off) or more, not {self.window_shards}"
        )
        require(0 <= self.adaptive < math.inf, f"batch.adaptive must be 0 or more, not {self.adaptive}")
        require(
            not (self.adaptive and self.sampling == "random"),
            "batch.adaptive chooses among classes, batch.sampling=random does not: set one of them back",
        )

    def classes_within_budget(self, size: int) -> int:
        """How many classes have, at that size, no more pixels than P at `self.size`."""
        return self.num_classes * self.size**2 // size**2


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
        encoder_images: images for which the encoders train alone, before the generator joins.
        success_gate: accuracy of the realness judgement above which the discriminator waits for the
            generator.
    """

    encoder_lr: float = 2e-4
    generator_lr: float = 1e-4
    final_lr: float = 0.1
    warmup_images: int = 2000
    betas: tuple[float, float] = (0.0, 0.99)
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    encoder_images: int = 0
    success_gate: float = 0.9

    def __post_init__(self) -> None:
        require_positive(self, "encoder_lr", "generator_lr", "gradient_clip")
        require(
            self.encoder_images >= 0, f"optim.encoder_images must be 0 or more, not {self.encoder_images}"
        )
        require(
            0.5 < self.success_gate <= 1, f"optim.success_gate must be in (0.5, 1], not {self.success_gate}"
        )
        require(0 <= self.ema_decay < 1, f"optim.ema_decay must be in [0, 1), not {self.ema_decay}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training, whole. Progress is counted in content images, over all ranks.

    Attributes:
        num_images: images to train for.
        seed: of weights, batches and augmentations.
        precision: bf16 means autocast; wavelets, norms and losses stay fp32.
        compile: run the networks through torch.compile; needs a C++ compiler.
        decode: where JPEGs are decoded: in loader workers (cpu), on a CUDA device (gpu), or there if there is
            one (auto). The pixels differ by a few grey levels, so that batches follow from the configuration
            alone only without auto. `resident`: once, all of them, into the memory of the device that trains,
            which cuts the crops; for corpora that fit.
        log_every, checkpoint_every, preview_every: in images.
    """

    model: ModelConfig = field(default_factory=UniganModel)
    loss: LossConfig = field(default_factory=UniganLoss)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    num_images: int = 1_000_000
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    decode: Literal["cpu", "gpu", "auto", "resident"] = "cpu"
    log_every: int = 2_000
    checkpoint_every: int = 50_000
    preview_every: int = 50_000

    def __post_init__(self) -> None:
        require_positive(self, "num_images", "log_every", "checkpoint_every", "preview_every")
        require(
            self.model.kind == self.loss.kind,
            f"the networks are those of {self.model.kind}, the losses those of {self.loss.kind}: start from "
            "a preset of the approach that is meant",
        )
        if isinstance(self.model, UniganModel) and isinstance(self.loss, UniganLoss):
            require(
                self.loss.asks_encoders or not self.model.shared_encoders,
                "model.shared_encoders: no term of the loss asks the encoders, nothing would train them; set "
                "it to false, and the generator trains them",
            )
            require(
                self.loss.asks_encoders or not self.optim.encoder_images,
                "optim.encoder_images: no term of the loss asks the encoders; set it to 0",
            )


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
    if typing.get_origin(hint) is types.UnionType and isinstance(value, dict):
        hint = _of_kind(typing.get_args(hint), value, name)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, not {value!r}")
        return from_dict(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            raise ValueError(f"{name} must be {len(arguments)} values, not {value!r}")
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


def _of_kind(kinds: tuple[type, ...], value: dict[str, Any], name: str) -> type:
    """The dataclass of a union that `value["kind"]` names."""
    by_name = {kind.kind: kind for kind in kinds}  # type: ignore[attr-defined]
    if value.get("kind") not in by_name:
        raise ValueError(f"{name}.kind must be {' or '.join(map(repr, by_name))}, not {value.get('kind')!r}")
    return by_name[value["kind"]]
