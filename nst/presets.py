"""Named configurations. Each is a function, so that one can stand on another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from nst.approaches import RganLoss, RganModel, UniganLoss, UniganModel
from nst.config import BatchConfig, OptimConfig, TrainConfig, override


def main() -> TrainConfig:
    """The full model: 256 px, 16 artists a step, the encoders 64,000 images ahead; for a GPU node or more."""
    return TrainConfig(batch=BatchConfig(num_classes=16), optim=OptimConfig(encoder_images=64_000))


def small() -> TrainConfig:
    """Half the channels of a production model; still 256 px."""
    return replace(main(), model=UniganModel(content_widths=(24, 48, 96, 128), style_width=24))


def micro() -> TrainConfig:
    """The smallest that is worth shipping; stylizes on a laptop's CPU."""
    return replace(main(), model=UniganModel(content_widths=(16, 32, 64, 96), style_width=16))


def paper_unigan() -> TrainConfig:
    """Approach 2 by the paper's own terms: 0.5 style, 0.5 content, 1 MAE, nothing else; *z* drives the
    decoder. 128 px, batches of 16, Adam at 1e-4 (method: the original's numbers)."""
    return TrainConfig(
        model=UniganModel(modulator=False, embedding_dim=32),
        loss=UniganLoss(
            matrix=0.5,
            reference=0.0,
            content=0.5,
            patch=0.0,
            adversarial=0.0,
            mae=1.0,
            reconstruction=0.0,
            luminance=0.0,
            statistics=0.0,
            bands=0.0,
            realness=0.0,
            encoder_patch=0.0,
            r1=0.0,
        ),
        batch=BatchConfig(num_classes=8, size=128),
        optim=OptimConfig(
            encoder_lr=1e-4, generator_lr=1e-4, betas=(0.9, 0.999), encoder_images=64_000, success_gate=1.0
        ),
    )


def rgan() -> TrainConfig:
    """Approach 1, 256 px: the style's statistics drive a U-Net, the style discriminator begins ahead."""
    return replace(main(), model=RganModel(), loss=RganLoss())


def paper_rgan() -> TrainConfig:
    """Approach 1 with the original's topology, sizes and weights: 0.6 style, 0.4 binary cross-entropy, 1 MAE;
    128 px, batches of 16, Adam at 1e-4 throughout. `model.fusion=wavelet_skips` is its variant."""
    return TrainConfig(
        model=RganModel(
            fusion="concat6",
            palette="network",
            widths=(64, 128, 256, 512, 512, 512, 64),
            style_width=64,
            style_side=128,
            style_discriminator="grid",
            embedding_dim=16,
            patch_field=94,
        ),
        loss=RganLoss(mae=1.0, reconstruction=0.0, luminance=0.0, gan="bce", augment=False, r1=0.0),
        batch=BatchConfig(num_classes=8, size=128),
        optim=OptimConfig(
            encoder_lr=1e-4, generator_lr=1e-4, final_lr=1.0, betas=(0.9, 0.999), success_gate=1.0
        ),
    )


def perceptual() -> TrainConfig:
    """The recipe of the model in the box: a small network trained by VGG-19's features alone, without
    discriminators; statistics of the style reach the decoder directly. The weights of the loss are for the
    normalised VGG-19. Minutes on a GPU (`compile=true`), days on a CPU."""
    return TrainConfig(
        model=UniganModel(
            content_widths=(16, 24, 48, 96), style_width=24, direct_statistics=True, shared_encoders=False
        ),
        loss=UniganLoss(
            matrix=0.0,
            reference=0.0,
            content=0.0,
            patch=0.0,
            adversarial=0.0,
            reconstruction=0.0,
            luminance=0.0,
            statistics=0.0,
            bands=0.0,
            perceptual=1.0,
            perceptual_style=20.0,
            grid=3.0,
        ),
        batch=BatchConfig(num_classes=8, min_scale=0.5),
        optim=OptimConfig(
            generator_lr=1.2e-3, final_lr=0.02, warmup_images=4_000, gradient_clip=10.0, betas=(0.9, 0.99)
        ),
        num_images=216_000,
        decode="resident",
        log_every=2_000,
        checkpoint_every=20_000,
        preview_every=100_000,
    )


def smoke() -> TrainConfig:
    """Two minutes on two CPU cores: shows that the whole chain works, not what the method can do.

    What a minute can teach is weighed up: bands and statistics of the style, less of the contrastive terms
    that pay off later.
    """
    return TrainConfig(
        model=UniganModel(content_widths=(16, 24, 32, 48), style_width=8, num_blocks=2, embedding_dim=64),
        loss=UniganLoss(bands=3.0, reconstruction=25.0, luminance=0.5, patch=0.5),
        batch=BatchConfig(num_classes=4, size=64),
        optim=OptimConfig(
            encoder_lr=3e-4, generator_lr=1e-3, warmup_images=200, betas=(0.5, 0.99), ema_decay=0.99
        ),
        num_images=3_200,
        precision="fp32",
        log_every=80,
        checkpoint_every=800,
        preview_every=800,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "main": main,
    "small": small,
    "micro": micro,
    "paper_unigan": paper_unigan,
    "rgan": rgan,
    "paper_rgan": paper_rgan,
    "perceptual": perceptual,
    "smoke": smoke,
}


def resolve_config(name: str, num_images: int | None, assignments: Iterable[str]) -> TrainConfig:
    """Preset, then changes as `section.field=value`, then the number of images.

    Raises:
        ValueError: no such preset or field, or a value of the wrong kind.
    """
    changes = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} must be SECTION.FIELD=VALUE, such as loss.bands=3")
        changes[path] = value
    if num_images is not None:
        changes["num_images"] = str(num_images)
    return override(preset(name), changes)


def preset(name: str) -> TrainConfig:
    """The configuration of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]()
