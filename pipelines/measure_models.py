"""What turns pairs into pictures, and the figures of those pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nst.metrics import baselines, pair_measures, shift_consistency, style_sensitivity
from nst.stylize import Stylizer, joined_codes
from nst.vgg import VGGFeatures
from pipelines.artist_judge import ArtistJudge
from pipelines.console import Progress
from pipelines.evaluation_set import EvaluationSet

BATCH = 8  # pairs
NUM_SENSITIVITY_CONTENTS, NUM_SENSITIVITY_STYLES = 8, 4

Method = Callable[[Tensor, Tensor], Tensor]  # contents and styles [N, 3, H, W] in [0, 1] -> pictures


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A method's figures and its pictures, uint8 [N, 3, H, W].

    Attributes:
        figures: by measure; one a pair in the order of the set where `rows` does not say otherwise.
        rows: as `nst.intervals.summarize` takes it.
    """

    pictures: Tensor
    figures: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)


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
    figures["style_sensitivity"] = sensitivities(chosen, method)
    figures["shift_consistency"] = shift_consistencies(chosen, method)
    rows = {"style_sensitivity": [], "shift_consistency": list(range(len(chosen)))[:BATCH]}
    if judge is not None and len(judge.rows) < len(chosen):
        rows["artist_top1"] = judge.rows
    return Measured(pictures=torch.cat(pictures), figures=figures, rows=rows)


def sensitivities(chosen: EvaluationSet, method: Method) -> list[float]:
    """`style_sensitivity` of up to 8 contents, each in the same up to 4 styles."""
    rows = np.unique(chosen.content_names, return_index=True)[1][:NUM_SENSITIVITY_CONTENTS]
    style_rows = np.unique(chosen.style_names, return_index=True)[1][:NUM_SENSITIVITY_STYLES]
    styles = chosen.style[style_rows]
    if len(styles) < 2:
        return [0.0]
    return [style_sensitivity(method(chosen.content[[row] * len(styles)], styles)) for row in rows]


def shift_consistencies(chosen: EvaluationSet, method: Method) -> list[float]:
    """`shift_consistency` of the first pairs, each content in its own style."""
    content, style = chosen.content[:BATCH], chosen.style[:BATCH]
    return shift_consistency(lambda moved: method(moved, style), content).tolist()
