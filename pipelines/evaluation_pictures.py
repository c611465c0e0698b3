"""The pictures of an evaluation's page: pairs that stand out, pairs evenly spread, and the plot of all."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from nst.grids import data_uri, picture_grid, square
from nst.metrics import color_transfer
from pipelines.evaluation import Evaluation, title_of
from pipelines.evaluation_set import pixels_of
from pipelines.measures import BASELINE_TITLES
from pipelines.pages import text

NUM_SPREAD_ROWS = 8
CELL, PAGE_CELL = 224, 256  # px
# As many as there may be models, on light and on dark; the shape tells those that are close apart.
MODEL_COLORS = (
    *("#b8742a", "#c2507a", "#2f8f83", "#8065c9", "#a0902c"),
    *("#4d7fc4", "#c8442f", "#4f9a3c", "#8d6552", "#6d7b8a"),
)
MODEL_MARKERS = "oD^vPX<>ph"
BASELINE_COLORS = {"content": "#5b8db8", "style": "#7a9a54", "color_transfer": "#a077ad"}
GREY = "#8a857c"
STANDING_OUT = (
    ("style_distance", {"best": "nearest to its style", "median": "in the middle", "worst": "farthest"}),
    ("content_distance", {"best": "nearest to its content", "median": "in the middle", "worst": "farthest"}),
)
RANKS = ("best", "median", "worst")


def standing_out(evaluation: Evaluation) -> str:
    """The first model's best, median and worst pairs by style and by content distance."""
    model = evaluation.models[0]
    parts = []
    for name, words in STANDING_OUT:
        values = model.measures[name]["values"]
        order = np.argsort(values, kind="stable")
        for rank, place in zip(RANKS, (0, (len(order) - 1) // 2, len(order) - 1), strict=True):
            row = int(order[place])
            heading = f"{name}: {rank}, {words[rank]}"
            note = f"{values[row]:.3f}, pair {row + 1}; rank {place + 1} of {len(order)} of {model.title}"
            parts.append(_strip(evaluation, row, heading, note))
    return "\n".join(parts)


def spread(evaluation: Evaluation) -> str:
    """Some of the pairs, evenly spread."""
    return "\n".join(_strip(evaluation, row, f"Pair {row + 1}", "") for row in _spread_rows(evaluation))


def _strip(evaluation: Evaluation, row: int, heading: str, note: str) -> str:
    chosen = evaluation.chosen
    figures = [
        _figure(pixels_of(chosen.content[row]), "content", chosen.content_names[row]),
        _figure(pixels_of(chosen.style[row]), "style", chosen.style_names[row]),
    ]
    for model in evaluation.models:
        figures.append(_figure(_array(model.pictures[row]), model.title, _distances(model.measures, row)))
    moved = _distances(evaluation.baselines["color_transfer"], row)
    figures.append(_figure(_moved(evaluation, row), BASELINE_TITLES["color_transfer"], moved))
    return (
        f'<section class="pair"><h3>{text(heading)} <span class="quiet small">{text(note)}</span></h3>'
        f'<div class="strip">{"".join(figures)}</div></section>'
    )


def _figure(pixels: NDArray[np.uint8], title: str, note: str) -> str:
    side = min(PAGE_CELL, *pixels.shape[:2])
    source = data_uri(np.asarray(square(pixels, side)), quality=84)
    return (
        f'<figure><img src="{source}" width="{side}" height="{side}" alt="{text(title)}: {text(note)}">'
        f'<figcaption>{text(title)}<span class="quiet small">{text(note)}</span></figcaption></figure>'
    )


def _distances(measures: Any, row: int) -> str:
    style, content = (measures[name]["values"][row] for name in ("style_distance", "content_distance"))
    return f"style {style:.2f} · content {content:.2f}"


def sheet(evaluation: Evaluation) -> NDArray[np.uint8]:
    """The pairs of `spread` as one picture, uint8 [H, W, 3]."""
    chosen = evaluation.chosen
    pictures = [
        [
            pixels_of(chosen.content[row]),
            pixels_of(chosen.style[row]),
            *(_array(model.pictures[row]) for model in evaluation.models),
            _moved(evaluation, row),
        ]
        for row in _spread_rows(evaluation)
    ]
    titles = [model.title for model in evaluation.models]
    labels = ["content", "style", *titles, f"{BASELINE_TITLES['color_transfer']} (baseline)"]
    return picture_grid(pictures, cell=CELL, column_labels=labels)


def _spread_rows(evaluation: Evaluation) -> list[int]:
    num = min(NUM_SPREAD_ROWS, len(evaluation.chosen))
    return np.linspace(0, len(evaluation.chosen) - 1, num).round().astype(int).tolist()


def _moved(evaluation: Evaluation, row: int) -> NDArray[np.uint8]:
    chosen = evaluation.chosen
    return pixels_of(color_transfer(chosen.content[row : row + 1], chosen.style[row : row + 1])[0])


def _array(picture: Tensor) -> NDArray[np.uint8]:
    return picture.permute(1, 2, 0).contiguous().numpy()


def trade_off(evaluation: Evaluation, style_measure: str, content_measure: str) -> str:
    """A `data:` URI of an SVG: style against content, all methods with their intervals, the models' pairs as
    dots; the corner at the lower left is where one wants to be."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.set_axisbelow(True)
    for color, model in zip(MODEL_COLORS, evaluation.models, strict=False):
        x, y = (model.measures[name]["values"] for name in (style_measure, content_measure))
        axis.scatter(x, y, s=9, color=color, alpha=0.3, linewidths=0)
    num_models = len(evaluation.models)
    marks = list(zip(MODEL_MARKERS, MODEL_COLORS, strict=True))[:num_models]
    marks += [("s", BASELINE_COLORS[name]) for name in evaluation.baselines]
    for (method, found), (marker, color) in zip(evaluation.summaries.items(), marks, strict=True):
        x, y = found[style_measure], found[content_measure]
        is_model = method not in evaluation.baselines
        axis.errorbar(
            x["mean"],
            y["mean"],
            xerr=_sides(x),
            yerr=_sides(y),
            fmt=marker,
            color=color,
            markersize=9 if is_model else 7,
            linewidth=2,
            label=title_of(method),
        )
    axis.margins(0.08)
    axis.set_xlabel(f"{style_measure}   (left: more like the style)", color=GREY)
    axis.set_ylabel(f"{content_measure}   (down: more of the content)", color=GREY)
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GREY, labelsize=8.5, length=0)
    axis.grid(color=GREY, alpha=0.22, linewidth=0.7)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("bottom", "left"))
        spine.set_color(GREY)
    figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=GREY, fontsize=9)
    return _svg_uri(figure)


def _sides(found: Any) -> list[list[float]]:
    return [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]


def _svg_uri(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
