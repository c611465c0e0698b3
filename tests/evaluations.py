"""Evaluations as `nst evaluate` keeps them, made up from means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nst.intervals import summarize

NUM_PAIRS, NUM_STYLES = 24, 8

# Means over 24 pairs of photographs and paintings at 256 px, as nst.metrics gave them.
MEASURES = (
    "content_distance",
    "edge_ssim",
    "style_distance",
    "hist_style",
    "checkerboard",
    "style_sensitivity",
    "structure_copied",
)
BASELINES = {
    "content": (0.000, 1.000, 0.162, 0.712, -0.111, 0.000, 0.035),
    "style": (0.997, 0.195, 0.000, 0.000, -0.071, 0.208, 1.000),
    "color_transfer": (0.011, 0.897, 0.118, 0.541, -0.111, 0.125, 0.034),
}
BAD_MODELS = {
    "gives the content back": (
        (0.000, 1.000, 0.162, 0.712, -0.111, 0.000, 0.035),
        {"style_distance", "style_sensitivity"},
    ),
    "moves all of the colours": (
        (0.029, 0.887, 0.080, 0.400, -0.110, 0.125, 0.034),
        {"edge_ssim"},
    ),
    "moves the colours": ((0.011, 0.897, 0.118, 0.541, -0.111, 0.125, 0.034), {"style_distance"}),
    "copies the style": (
        (0.997, 0.195, 0.000, 0.000, -0.071, 0.208, 1.000),
        {"content_distance", "structure_copied"},
    ),
    "makes noise": (
        (0.983, 0.032, 0.613, 0.851, -0.061, 0.256, 0.020),
        {"content_distance", "edge_ssim", "style_distance"},
    ),
    "makes grey": (
        (0.931, 0.134, 0.373, 0.923, 0.000, 0.000, 0.069),
        {"content_distance", "edge_ssim", "style_distance", "style_sensitivity"},
    ),
    "one look for all styles": ((0.300, 0.600, 0.110, 0.600, -0.100, 0.005, 0.035), {"style_sensitivity"}),
    "leaves a grid": ((0.300, 0.600, 0.100, 0.500, 0.600, 0.120, 0.035), {"checkerboard"}),
    "exposes both": ((0.344, 0.458, 0.110, 0.650, -0.095, 0.104, 0.672), {"structure_copied"}),
    "is undefined": (
        (math.nan,) * 7,
        {"content_distance", "edge_ssim", "style_distance", "style_sensitivity"},
    ),
}
GOOD = (0.300, 0.600, 0.100, 0.500, -0.050, 0.120, 0.034)


def measures_of(means: tuple[float, ...], spread: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """Figures of 24 pairs with these very means. What makes a pair hard is the same for every method;
    `spread` is the standard deviation of what is a method's own."""
    shared = np.random.default_rng(7).normal(size=(len(MEASURES), NUM_PAIRS))
    own = np.random.default_rng(seed).normal(size=(len(MEASURES), NUM_PAIRS))
    around = 0.02 * (shared - shared.mean(axis=1, keepdims=True))
    around += spread * (own - own.mean(axis=1, keepdims=True)) / own.std(axis=1, keepdims=True)
    figures = np.asarray(means)[:, None] + around
    return summarize({name: values.tolist() for name, values in zip(MEASURES, figures, strict=True)})


def evaluation_of(
    means: tuple[float, ...], digest: str | None = "", *, spread: float = 0.0, **evaluation_set: Any
) -> dict[str, Any]:
    known = {"content_digest": "c", "style_digest": "s", "num_pairs": NUM_PAIRS, "seed": 0, "size": 256}
    measured = {"measures_version": 1, "vgg_digest": None}
    places = range(NUM_PAIRS)
    return {
        "measures": measures_of(means, spread),
        "baselines": {name: measures_of(figures) for name, figures in BASELINES.items()},
        "evaluation_set": {**known, **measured, **evaluation_set},
        "pairs": {"content": list(places), "style": [place % NUM_STYLES for place in places]},
        "model_digest": digest,
        "seen": {"content": 0, "style": 0, "pictures": [], "unknown": ""},
    }
