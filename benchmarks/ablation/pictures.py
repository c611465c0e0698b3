"""Two pictures of an ablation: the same contents and styles through every variant, and the course of the
trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.ablation.measure import stylize
from benchmarks.ablation.pairs import UNSEEN_ARTISTS, UNSEEN_WORKS, Evaluation, Pairs
from nst.grids import picture_grid
from nst.stylize import Stylizer

NUM_CONTENTS, NUM_STYLES = 4, 4
CELL = 112  # px

# metric of the training -> what it is called above its curves
CURVES = {
    "encoder/guessing": "encoder's matrix loss / ln(columns): 1 is guessing",
    "encoder/style_cosine": "mean cosine between works: 1 is collapse",
    "encoder/realness_accuracy": "accuracy of the realness judgement",
    "generator/style_sensitivity": "style sensitivity: 0 is a style ignored",
    "generator/reconstruction": "generator: |G(x, x) - x|",
    "generator/statistics": "generator: tap statistics",
    "generator/bands": "generator: sliced Wasserstein of Haar bands",
    "generator/patch": "generator: PatchNCE",
}


def draw_grid(stylizers: Mapping[str, Stylizer], evaluation: Evaluation, path: Path) -> None:
    """Four contents in four styles, two by artists that were trained on and two by others: a row for each
    pair of them, a column for each variant."""
    works, artists = evaluation.groups[UNSEEN_WORKS], evaluation.groups[UNSEEN_ARTISTS]
    half = NUM_STYLES // 2
    styles = works.styles.take(range(half)).joined(artists.styles.take(range(half)))
    contents = works.contents[:NUM_CONTENTS]
    places = [(c, s) for s in range(len(styles)) for c in range(len(contents))]
    chosen = styles.take([s for _, s in places])
    pairs = Pairs(contents[[c for c, _ in places]], chosen, chosen, chosen)
    columns = [pairs.contents, pairs.styles.pictures]
    columns += [stylize(stylizer, pairs) for stylizer in stylizers.values()]
    rows = [[column[number] for column in columns] for number in range(len(places))]
    sheet = picture_grid(rows, cell=CELL, column_labels=["content", "style", *stylizers])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, optimize=True)


def draw_curves(metrics: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """One panel a metric, one colour a variant, one line a seed.

    Args:
        metrics: variant -> seed after seed what its training reported, as `run.read_metrics` gives it.
    """
    shown = [
        name
        for name in CURVES
        if any(name in line for runs in metrics.values() for run in runs for line in run)
    ]
    num_columns = 2
    num_rows = max(1, -(-len(shown) // num_columns))
    figure = Figure(figsize=(11, 2.6 * num_rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(num_rows, num_columns, squeeze=False)).flatten()
    colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axis, name in zip(axes, shown, strict=False):
        for number, (variant, runs) in enumerate(metrics.items()):
            for turn, run in enumerate(runs):
                known = [line for line in run if name in line]
                axis.plot(
                    [line["num_images_seen"] for line in known],
                    smooth([line[name] for line in known]),
                    color=colours[number % len(colours)],
                    label=variant if turn == 0 else None,
                    linewidth=1.0,
                    alpha=0.8,
                )
        axis.set_title(CURVES[name], fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("images", fontsize=7)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    if shown:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Mean of each value and those before it, `window` at most."""
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]
