"""What is trained: one base, each claim of the paper taken out of it alone, and the other approach beside it.
All are a preset and changes as `--set` says them, so that any row can be trained by hand too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nst.config import TrainConfig, to_dict
from nst.presets import resolve_config

DEFAULT_IMAGES = 12_000

# A training of minutes: 64 px crops in batches of 8 artists x 2 works, and the rates of the preset `smoke`.
SHORT = {
    "batch.size": "64",
    "batch.num_classes": "8",
    "batch.works_per_class": "2",
    "optim.encoder_lr": "0.0003",
    "optim.generator_lr": "0.001",
    "optim.warmup_images": "200",
    "optim.betas": "[0.5, 0.99]",
    "optim.ema_decay": "0.99",
    "optim.encoder_images": "0",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the ablation.

    Attributes:
        preset: where its configuration starts.
        changes: section.field -> value, beyond those of `SHORT`.
        question: what the row answers, for a reader.
    """

    name: str
    preset: str = "micro"
    changes: Mapping[str, str] = field(default_factory=dict)
    question: str


BASE = Variant(name="base", question="the method as it is: what all other rows are held against")

ABLATIONS = (
    Variant(
        name="random_batches",
        changes={"batch.sampling": "random"},
        question="claim 6: batches of random works in place of P artists x K works",
    ),
    Variant(
        name="fixed_pairs",
        changes={"loss.metric": "pairs"},
        question="claim 6: one positive and one negative pair a row in place of the matrix loss",
    ),
    Variant(
        name="separate_encoders",
        changes={"model.shared_encoders": "false"},
        question="claim 5: discriminators that are encoders of their own in place of the generator's",
    ),
    Variant(
        name="no_fake_negatives",
        changes={"loss.fakes_as_negatives": "false"},
        question="stylized pictures are no negatives of the style encoder",
    ),
    Variant(
        name="no_modulator",
        changes={"model.modulator": "false"},
        question="the embedding z drives the decoder, as in the paper, in place of the encoder's statistics",
    ),
)

OTHERS = (
    Variant(
        name="rgan",
        preset="rgan",
        # a half of the preset's channels, as the base has a half of those of the preset `main`
        changes={
            "model.widths": "[16, 32, 64, 128, 128, 128]",
            "model.style_width": "16",
            "model.patch_widths": "[32, 64, 128, 256]",
        },
        question="claims 4 and 5: approach 1, channels halved like the base's, at the same size and budget",
    ),
    Variant(
        name="paper_unigan",
        preset="paper_unigan",
        changes={"model.content_widths": "[16, 32, 64, 96]", "model.style_width": "16"},
        question="approach 2 with the losses of the paper alone",
    ),
)

VARIANTS = {variant.name: variant for variant in (BASE, *ABLATIONS, *OTHERS)}
DEFAULT_VARIANTS = tuple(variant.name for variant in (BASE, *ABLATIONS))


def variants_named(names: str) -> list[Variant]:
    """Variants of a comma-separated list; "all" means every one, "" those that one part is taken from.

    Raises:
        ValueError: there is no such variant.
    """
    wanted = list(VARIANTS) if names == "all" else names.split(",") if names else list(DEFAULT_VARIANTS)
    for name in wanted:
        if name not in VARIANTS:
            raise ValueError(f"there is no variant {name!r}; there are: {', '.join(VARIANTS)}")
    return [VARIANTS[name] for name in wanted]


def assignments(variant: Variant, seed: int, num_images: int) -> list[str]:
    """What follows `--set`, one by one."""
    progress = {
        "seed": str(seed),
        "log_every": str(max(1, num_images // 60)),
        "checkpoint_every": str(max(1, num_images // 6)),
        "preview_every": str(num_images),
    }
    return [f"{path}={value}" for path, value in {**SHORT, **progress, **variant.changes}.items()]


def resolve(variant: Variant, seed: int, num_images: int) -> TrainConfig:
    """The configuration of one run. Raises ValueError if a preset or field is not there."""
    return resolve_config(variant.preset, num_images, assignments(variant, seed, num_images))


def differences(first: TrainConfig, second: TrainConfig) -> set[str]:
    """The fields in which two configurations differ, as section.field."""
    flat = [_flatten(to_dict(config)) for config in (first, second)]
    return {path for path in flat[0].keys() | flat[1].keys() if flat[0].get(path) != flat[1].get(path)}


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
