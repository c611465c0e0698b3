"""The report of an evaluation: one HTML page with table, plots and pictures, and the figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from infra import places, storage
from nst.grids import data_uri, picture_grid
from nst.images import encode_jpeg
from nst.metrics import LOWER_IS_BETTER, color_transfer
from pipelines.evaluation_set import EvaluationSet
from pipelines.pages import fact_list, page, text

TITLES = {"content": "content unchanged", "style": "style copied", "color_transfer": "colours moved"}
COLORS = {"model": "#b8742a", "content": "#5b8db8", "style": "#7a9a54", "color_transfer": "#a077ad"}
GREY = "#8a857c"  # readable on light and dark
MAX_GRID_ROWS = 8
CELL = 224  # px

MEANINGS = {
    "content_distance": "Structure: where it is light and where edges are, at three Haar levels.",
    "edge_ssim": "Edges: SSIM of Sobel magnitudes.",
    "ssim": "SSIM of luminance.",
    "hist_content": "Colours, against the content: Hellinger distance of RGB histograms.",
    "style_distance": "Colours and textures: statistics of Haar wavelet packets over four levels.",
    "hist_style": "Colours, against the style: Hellinger distance of RGB histograms.",
    "checkerboard": "Grids from upsampling: energy at periods of 2 and 4 px, log10.",
    "border_error": "Change near the border over change inside; 1 is even.",
    "style_sensitivity": "How much pictures differ from style to style.",
    "shift_consistency": "How much a picture changes where the content is only moved by a few pixels.",
    "content_r31": "VGG-19 relu3_1, mean squared difference to the content.",
    "style_r11": "VGG-19 relu1_1, means and deviations against the style.",
    "style_r21": "VGG-19 relu2_1, likewise.",
    "style_r31": "VGG-19 relu3_1, likewise.",
    "content_r41": "VGG-19 relu4_1, mean squared difference to the content.",
    "style_r41": "VGG-19 relu4_1, means and deviations against the style.",
    "gram": "VGG-19 Gram matrices, relative squared distance to the style.",
}


def write_report(
    report_uri: str,
    evaluation: Mapping[str, Any],
    chosen: EvaluationSet,
    stylized: Tensor,
    facts: Mapping[str, object],
) -> None:
    """Writes evaluation.json, grid.jpg and report.html below `report_uri`.

    Args:
        evaluation: measures and baselines as {name: {mean, low, high}}.
        stylized: the model's pictures [N, 3, H, W] in [0, 1].
    """
    grid = _grid(chosen, stylized)
    found = chosen.identity()
    shown = {
        **facts,
        "Pairs": f"{found['num_pairs']} at {found['size']} px, seed {found['seed']}",
        "Evaluation set": f"content {chosen.content_digest[:12]}, style {chosen.style_digest[:12]}",
    }
    content = page(
        "evaluation.html",
        facts=fact_list(shown),
        rows="\n".join(_row(name, evaluation) for name in evaluation["measures"]),
        baseline_heads="".join(f'<th class="number">{text(title)}</th>' for title in TITLES.values()),
        intervals=_svg_uri(_plot_intervals(evaluation)),
        trade_off=_svg_uri(_plot_trade_off(evaluation)),
        grid=data_uri(grid, quality=86),
        num_rows=str(min(MAX_GRID_ROWS, len(chosen))),
    )
    data = json.dumps(evaluation, indent=2, sort_keys=True).encode()
    storage.write_bytes(places.join(report_uri, "evaluation.json"), data)
    storage.write_bytes(places.join(report_uri, "grid.jpg"), encode_jpeg(grid, quality=90))
    storage.write_bytes(places.join(report_uri, "report.html"), content.encode())


def _grid(chosen: EvaluationSet, stylized: Tensor) -> np.ndarray:
    """Content, style, the model's picture, and the best baseline beside it, pair by pair."""
    num = min(MAX_GRID_ROWS, len(chosen))
    rows = np.linspace(0, len(chosen) - 1, num).round().astype(int)
    moved = color_transfer(chosen.content[rows], chosen.style[rows])
    columns = [chosen.content[rows], chosen.style[rows], stylized[rows], moved]
    pictures = [[_pixels(column[row]) for column in columns] for row in range(num)]
    labels = ["content", "style", "stylized", "colours moved (baseline)"]
    return picture_grid(pictures, cell=CELL, column_labels=labels)


def _pixels(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _row(name: str, evaluation: Mapping[str, Any]) -> str:
    found = evaluation["measures"][name]
    better = "lower" if LOWER_IS_BETTER.get(name, True) else "higher"
    cells = "".join(
        f'<td class="number">{evaluation["baselines"][baseline][name]["mean"]:.3f}</td>'
        for baseline in TITLES
    )
    return (
        f"<tr><td><code>{text(name)}</code></td>"
        f'<td class="number"><strong>{found["mean"]:.3f}</strong></td>'
        f'<td class="number quiet">{found["low"]:.3f} – {found["high"]:.3f}</td>{cells}'
        f'<td class="quiet">{better}</td><td class="quiet">{text(MEANINGS.get(name, ""))}</td></tr>'
    )


def _plot_intervals(evaluation: Mapping[str, Any]) -> Figure:
    """A small plot a measure: the model and the baselines, mean and interval."""
    names = list(evaluation["measures"])
    num_columns = 4
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(12, 1.75 * num_rows), layout="constrained")
    methods = {"model": evaluation["measures"], **evaluation["baselines"]}
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for axis, name in zip(axes, names, strict=False):
        for place, (method, found) in enumerate(reversed(methods.items())):
            entry = found[name]
            axis.plot([entry["low"], entry["high"]], [place, place], color=COLORS[method], linewidth=2.5)
            axis.plot(entry["mean"], place, "o", color=COLORS[method], markersize=6)
        axis.set_title(name, fontsize=10, loc="left", color=GREY)
        axis.set_yticks(range(len(methods)), [TITLES.get(one, one) for one in reversed(methods)])
        axis.set_ylim(-0.6, len(methods) - 0.4)
    for axis in figure.axes:
        _plain(axis)
        axis.set_visible(axis.has_data())
    return figure


def _plot_trade_off(evaluation: Mapping[str, Any]) -> Figure:
    """Content against style: the corner at the lower left is where one wants to be."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.subplots()
    methods: dict[str, Any] = {"model": evaluation["measures"], **evaluation["baselines"]}
    for method, found in methods.items():
        x, y = found["style_distance"], found["content_distance"]
        axis.errorbar(
            x["mean"],
            y["mean"],
            xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
            yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]],
            fmt="o",
            color=COLORS[method],
            markersize=8,
            linewidth=2,
        )
        is_left = method == "color_transfer"  # it lies close to the unchanged content
        axis.annotate(
            TITLES.get(method, method),
            (x["mean"], y["mean"]),
            xytext=(-4 if is_left else 9, 9),
            textcoords="offset points",
            horizontalalignment="right" if is_left else "left",
            color=COLORS[method],
            fontsize=10,
        )
    axis.margins(0.18)
    axis.set_xlabel("style_distance", color=GREY)
    axis.set_ylabel("content_distance", color=GREY)
    _plain(axis)
    return figure


def _plain(axis: Any) -> None:
    axis.patch.set_alpha(0)
    axis.tick_params(colors=GREY, labelsize=8.5, length=0)
    axis.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.7)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)


def _svg_uri(figure: Figure) -> str:
    figure.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
