"""Measures one run, or one of the baselines, on the pairs of `pairs.load_evaluation`. A run's measures are
kept beside its checkpoint and made again when anything that they depend on has changed."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import combinations, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablation.judge import Judge
from benchmarks.ablation.own_encoder import (
    embedding_of,
    load_objective,
    probe_encoder,
    trained_parameters,
)
from benchmarks.ablation.pairs import SEEN, UNSEEN_ARTISTS, UNSEEN_WORKS, Evaluation, Pairs, Pixels
from benchmarks.ablation.run import Run, read_metrics, read_record
from nst import metrics
from nst.checkpoint import model_digest
from nst.planning import digest_of
from nst.standalone import find_checkpoint
from nst.stylize import Stylizer
from nst.vgg import VGGFeatures, load_vgg

VERSION = 2  # of what is measured: higher makes the kept figures void
MEASURES_FILE = "measures.json"
NUM_SPREAD_CONTENTS, NUM_SPREAD_STYLES = 8, 8
CHUNK = 16  # pictures in one pass
TAIL = 15  # of a training's 60 reports: what "at its end" means; a report is of one batch

# Beside `nst.metrics.LOWER_IS_BETTER`. None: neither way is better by itself.
LOWER_IS_BETTER: dict[str, bool | None] = {
    **metrics.LOWER_IS_BETTER,
    "content_r31": True,
    "style_r11": True,
    "style_r21": True,
    "style_r31": True,
    "gram": True,
    "artist_found": False,
    "artist_precision": False,
    "reference_copied": True,
    "manner": False,
    "reference_pull": None,
    "hist_content_kept": True,
    "diversity": False,
    "style_distance_gap": True,
    "artist_precision_gap": True,
    "shift_consistency": True,
    "retrieval_seen": False,
    "retrieval_unseen": False,
    "retrieval_gap": True,
    "metric_seen": True,
    "metric_unseen": True,
    "metric_gap": True,
    "cosine": True,
    "guessing": True,
    "alarms": True,
}


@dataclass(frozen=True)
class Instruments:
    """What measures are made with: `vgg` may be missing."""

    evaluation: Evaluation
    judge: Judge
    vgg: VGGFeatures | None

    @property
    def digest(self) -> str:
        """Equal digests give equal figures for the same model."""
        return digest_of(
            {
                "version": VERSION,
                "pairs": self.evaluation.digest,
                "judge": self.judge.digest,
                "vgg": self.vgg is not None,
            }
        )


# --- runs --------------------------------------------------------------------------------------------


def measure_all(
    runs: Sequence[Run], instruments: Instruments, *, num_at_once: int = 2
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run with what `measure_run` says of it, in order; some at a time, in processes of one thread
    each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_at_once, context, torch.set_num_threads, (1,)) as pool:
        yield from zip(runs, pool.map(measure_run, runs, repeat(instruments)), strict=True)


def measure_run(run: Run, instruments: Instruments) -> dict[str, Any]:
    """{"groups": group -> measure -> a figure a pair, "scalars": name -> figure, "cost": ...} of a finished
    run."""
    checkpoint = find_checkpoint(run.folder)
    if checkpoint is None:
        raise ValueError(f"{run.folder} has no checkpoint; train it first")
    key = digest_of({"model": model_digest(checkpoint), "instruments": instruments.digest})
    path = run.folder / MEASURES_FILE
    if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
        measures = kept["measures"]
    else:
        measures = _measure_model(checkpoint, instruments)
        path.write_text(json.dumps({"key": key, "measures": measures}) + "\n")
    measures["scalars"] |= _training_end(run)
    measures["cost"] = _cost(run) | measures["parameters"]
    return measures


def _measure_model(checkpoint: str, instruments: Instruments) -> dict[str, Any]:
    stylizer, objective = Stylizer.load(checkpoint, device="cpu"), load_objective(checkpoint)
    evaluation, groups = instruments.evaluation, {}
    for name, pairs in evaluation.groups.items():
        outputs = stylize(stylizer, pairs)
        groups[name] = measure_outputs(outputs, pairs, instruments, with_vgg=name != SEEN)
        kept = as_unit(stylize(stylizer, pairs, colors="content"))
        groups[name]["hist_content_kept"] = metrics.histogram_distance(kept, as_unit(pairs.contents)).tolist()
    scalars = _spread(stylizer, evaluation) | probe_encoder(embedding_of(objective), evaluation)
    for measure, sign in (("style_distance", 1), ("artist_precision", -1)):
        seen, unseen = (float(np.mean(groups[name][measure])) for name in (SEEN, UNSEEN_WORKS))
        scalars[f"{measure}_gap"] = sign * (unseen - seen)
    return {"groups": groups, "scalars": scalars, "parameters": trained_parameters(objective)}


def stylize(stylizer: Stylizer, pairs: Pairs, *, colors: str = "style") -> Pixels:
    """Each content in its style: [N, S, S, 3], rounded to 8 bits as files are."""
    return np.concatenate(
        [
            _stylize_some(stylizer, pairs.contents[rows], pairs.styles.pictures[rows], colors)
            for rows in _chunks(len(pairs))
        ]
    )


def _stylize_some(stylizer: Stylizer, contents: Pixels, styles: Pixels, colors: str = "style") -> Pixels:
    with torch.inference_mode():
        codes = stylizer.generator.encode_style(as_unit(styles) * 2 - 1)
    return stylizer.stylize_batch(contents, codes, colors=colors)


def _spread(stylizer: Stylizer, evaluation: Evaluation) -> dict[str, float]:
    """style_sensitivity and shift_consistency as in `nst.metrics`; diversity: mean style distance of one
    content's pictures in different styles, over that of the styles themselves: 0 is collapse, 1 as various as
    the styles."""
    pairs, others = evaluation.groups[UNSEEN_WORKS], evaluation.groups[UNSEEN_ARTISTS]
    half = NUM_SPREAD_STYLES // 2
    styles = np.concatenate([pairs.styles.pictures[:half], others.styles.pictures[:half]])
    sensitivities, diversities, shifts = [], [], []
    for content in pairs.contents[:NUM_SPREAD_CONTENTS]:
        outputs = as_unit(_stylize_some(stylizer, np.stack([content] * len(styles)), styles))
        sensitivities.append(metrics.style_sensitivity(outputs))
        diversities.append(_mean_distance(outputs))
        shifts += _shift_consistency(stylizer, content, styles)
    return {
        "style_sensitivity": float(np.mean(sensitivities)),
        "shift_consistency": float(np.mean(shifts)),
        "diversity": float(np.mean(diversities)) / _mean_distance(as_unit(styles)),
    }


def _shift_consistency(stylizer: Stylizer, content: Pixels, styles: Pixels) -> list[float]:
    """One content in every style, a figure each."""

    def render(pictures: Tensor) -> Tensor:
        return as_unit(_stylize_some(stylizer, as_pixels(pictures), styles))

    return metrics.shift_consistency(render, as_unit(np.stack([content] * len(styles)))).tolist()


def _mean_distance(pictures: Tensor) -> float:
    first, second = zip(*combinations(range(len(pictures)), 2), strict=True)
    return float(metrics.style_distance(pictures[list(first)], pictures[list(second)]).mean())


def _training_end(run: Run) -> dict[str, float]:
    """guessing: matrix loss over ln(columns) as the training reports it at its end, NaN where it has none.
    alarms: how many alarms are up there on average."""
    tail = read_metrics(run)[-TAIL:]
    guessing = [figures["encoder/guessing"] for figures in tail if "encoder/guessing" in figures]
    alarms = [sum(value for name, value in figures.items() if name.startswith("alarm/")) for figures in tail]
    return {
        "guessing": float(np.mean(guessing)) if guessing else math.nan,
        "alarms": float(np.mean(alarms)) if alarms else math.nan,
    }


def _cost(run: Run) -> dict[str, float]:
    """Wall seconds (other programs and a neighbouring run slow it down) and CPU seconds, start and previews
    in."""
    record = read_record(run)
    steps = max(1.0, record["images"] / (run.config.batch.num_classes * run.config.batch.works_per_class))
    return {
        "seconds": record["seconds"],
        "cpu_seconds": record["cpu_seconds"],
        "seconds_per_step": record["seconds"] / steps,
        "cpu_seconds_per_step": record["cpu_seconds"] / steps,
    }


# --- pictures ----------------------------------------------------------------------------------------


def measure_baselines(instruments: Instruments, path: Path) -> dict[str, dict[str, dict[str, list[float]]]]:
    """baseline -> group -> measure -> a figure a pair: doing nothing, copying the style, moving the
    colours. Kept at `path`."""
    if path.exists() and (kept := json.loads(path.read_text()))["key"] == instruments.digest:
        return kept["measures"]
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for group, pairs in instruments.evaluation.groups.items():
        made = metrics.baselines(as_unit(pairs.contents), as_unit(pairs.styles.pictures))
        for name, outputs in made.items():
            measures = measure_outputs(as_pixels(outputs), pairs, instruments, with_vgg=group != SEEN)
            found.setdefault(name, {})[group] = measures
    path.write_text(json.dumps({"key": instruments.digest, "measures": found}) + "\n")
    return found


def measure_outputs(
    outputs: Pixels, pairs: Pairs, instruments: Instruments, *, with_vgg: bool = True
) -> dict[str, list[float]]:
    """measure -> a figure a pair; VGG's, which take most of the time, can be left out. Beside those of
    `nst.metrics` and `nst.vgg`:

    artist_found: 1 where the work that the encoder trained apart finds nearest is by the artist of the style.
    artist_precision: the average precision of finding all works by that artist.
    reference_copied: how much nearer the picture's structure is to the very style's than to another style's
        (difference of `content_distance`): 0 is chance, about 1 is a copy.
    manner: how much nearer its statistics are to another work by the artist than to another artist's work
        (difference of `style_distance`).
    reference_pull: and how much nearer to the very style than to that other work by the artist.
    """
    measures: dict[str, list[float]] = {}
    for rows in _chunks(len(pairs)):
        stylized, content, style, same, other = (
            as_unit(part[rows])
            for part in (
                outputs,
                pairs.contents,
                pairs.styles.pictures,
                pairs.same_artist.pictures,
                pairs.other_artist.pictures,
            )
        )
        to_style = metrics.style_distance(stylized, style)
        to_same, to_other = (metrics.style_distance(stylized, works) for works in (same, other))
        own, chance = (metrics.content_distance(stylized, works) for works in (style, other))
        some: dict[str, list[float]] = {
            **metrics.pair_measures(stylized, content, style),
            "reference_copied": (chance - own).tolist(),
            "manner": (to_other - to_same).tolist(),
            "reference_pull": (to_same - to_style).tolist(),
        }
        if with_vgg and instruments.vgg is not None:
            some |= instruments.vgg.pair_measures(stylized, content, style)
        for name, values in some.items():
            measures.setdefault(name, []).extend(values)
    found = instruments.judge.look_up(outputs, pairs.styles)
    measures["artist_found"] = found.hits.tolist()
    measures["artist_precision"] = found.average_precisions.tolist()
    return measures


def means(measures: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in measures.items()}


def as_unit(pictures: Pixels) -> Tensor:
    """uint8 [N, S, S, 3] -> float [N, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def as_pixels(pictures: Tensor) -> Pixels:
    """float [N, 3, S, S] in [0, 1] -> uint8 [N, S, S, 3]."""
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _chunks(num: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, num, CHUNK)]


def vgg_features(path: Path | None) -> VGGFeatures | None:
    """The features of a local file. Raises ValueError if it cannot be used."""
    return None if path is None else load_vgg(str(path))
