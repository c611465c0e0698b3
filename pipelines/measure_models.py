"""What turns pairs into pictures, and the figures of those pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nst.metrics import baselines, pair_measures, sensitivity_parts, shift_consistency
from nst.stylize import Stylizer, joined_codes
from nst.vgg import VGGFeatures
from pipelines.artist_judge import ArtistJudge
from pipelines.console import Progress
from pipelines.evaluation_set import EvaluationSet

BATCH = 8  # pairs
# Of up to 64 pairs; of more, more: whoever evaluates more pairs gets narrower intervals of these too.
NUM_SENSITIVITY_CONTENTS, NUM_SENSITIVITY_STYLES, NUM_SHIFTED = 8, 4, 8
PAIRS_FOR_THESE = 64

Pairs = dict[str, list[int]]  # which content and which style each figure is of
Method = Callable[[Tensor, Tensor], Tensor]  # contents and styles [N, 3, H, W] in [0, 1] -> pictures


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A method's figures and its pictures, uint8 [N, 3, H, W].

    Attributes:
        figures: by measure; one a pair in the order of the set where `own_pairs` does not say otherwise.
        own_pairs: as `nst.intervals.summarize` takes it.
    """

    pictures: Tensor
    figures: dict[str, list[float]] = field(default_factory=dict)
    own_pairs: dict[str, Pairs] = field(default_factory=dict)


def model_method(stylizer: Stylizer) -> Method:
    """The model itself."""

    def stylize(content: Tensor, style: Tensor) -> Tensor:
        code = joined_codes([stylizer.encode_style(one * 2 - 1) for one in style])
        pixels = (content * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(stylizer.stylize_batch(pixels, code)).permute(0, 3, 1, 2).float() / 255

    return stylize


def baseline_method(name: str) -> Method:
    """One of `nst.metrics.baselines`."""
    return lambda content, style: baselines(content, style)[name]


@torch.inference_mode()
def measure(
    chosen: EvaluationSet,
    method: Method,
    progress: Progress,
    *,
    vgg: VGGFeatures | None = None,
    judge: ArtistJudge | None = None,
) -> Measured:
    """Every measure of the method's pictures of all pairs; `progress` counts pairs."""
    figures: dict[str, list[float]] = {}
    pictures: list[Tensor] = []
    for start in range(0, len(chosen), BATCH):
        content, style = chosen.content[start : start + BATCH], chosen.style[start : start + BATCH]
        made = method(content, style)
        found = pair_measures(made, content, style)
        if vgg is not None:
            found |= vgg.pair_measures(made, content, style)
        if judge is not None:
            found["artist_top1"] = judge.hits(made, range(start, start + len(content)))
        for name, values in found.items():
            figures.setdefault(name, []).extend(values)
        pictures.append((made * 255).round().byte())
        progress.advance(len(content))
    own_pairs = {}
    figures["style_sensitivity"], own_pairs["style_sensitivity"] = sensitivities(chosen, method)
    figures["shift_consistency"] = shift_consistencies(chosen, method)
    own_pairs["shift_consistency"] = _pairs_of(chosen, range(len(figures["shift_consistency"])))
    if judge is not None and len(judge.rows) < len(chosen):
        own_pairs["artist_top1"] = _pairs_of(chosen, judge.rows)
    return Measured(pictures=torch.cat(pictures), figures=figures, own_pairs=own_pairs)


def sensitivities(chosen: EvaluationSet, method: Method) -> tuple[list[float], Pairs]:
    """`style_sensitivity` of some contents, each in the same styles, in parts: one for each content and
    style, whose mean it is (0 where there is only one style); and which content and style each part is of."""
    growth = math.sqrt(max(1.0, len(chosen) / PAIRS_FOR_THESE))
    rows = np.unique(chosen.content_names, return_index=True)[1][: round(NUM_SENSITIVITY_CONTENTS * growth)]
    style_rows = np.unique(chosen.style_names, return_index=True)[1][: round(NUM_SENSITIVITY_STYLES * growth)]
    styles = chosen.style[style_rows]
    figures: list[float] = []
    for row in rows:
        made = method(chosen.content[[row] * len(styles)], styles)
        figures += sensitivity_parts(made)
    contents = np.repeat(np.arange(len(rows)), len(styles)).tolist()
    return figures, {"content": contents, "style": list(range(len(styles))) * len(rows)}


def shift_consistencies(chosen: EvaluationSet, method: Method) -> list[float]:
    """`shift_consistency` of the first pairs, each content in its own style."""
    num = min(len(chosen), max(NUM_SHIFTED, len(chosen) * NUM_SHIFTED // PAIRS_FOR_THESE))
    figures: list[float] = []
    for start in range(0, num, BATCH):
        some = slice(start, min(start + BATCH, num))
        styles = chosen.style[some]
        moved = shift_consistency(
            lambda content, styles=styles: method(content, styles), chosen.content[some]
        )
        figures += moved.tolist()
    return figures


def _pairs_of(chosen: EvaluationSet, rows: Iterable[int]) -> Pairs:
    chosen_rows = list(rows)
    return {side: [labels[row] for row in chosen_rows] for side, labels in chosen.pairs().items()}
