"""`nst evaluate`: a model's figures beside those of doing nothing, copying the style and moving colours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from infra import evaluations, places, registry
from nst.intervals import summarize
from nst.metrics import (
    LOWER_IS_BETTER,
    MIN_SIDE,
    STRIDE,
    baselines,
    pair_measures,
    shift_consistency,
    style_sensitivity,
)
from nst.stylize import Stylizer, joined_codes
from nst.vgg import VGGFeatures, load_vgg
from pipelines.console import Progress, Stage, say
from pipelines.evaluation_report import TITLES, write_report
from pipelines.evaluation_set import EvaluationSet, make_evaluation_set, open_pictures
from pipelines.models import ResolvedModel, resolve_model

BATCH = 8  # pairs
MIN_SIZE = MIN_SIDE + STRIDE  # px; a picture is also moved by a few
NUM_SENSITIVITY_CONTENTS, NUM_SENSITIVITY_STYLES = 8, 4

Figures = dict[str, list[float]]
Method = Callable[[Tensor, Tensor], Tensor]


@click.command("evaluate", cls=Stage)
@click.argument("model", metavar="MODEL")
@click.option("--content", "content_uri", required=True, metavar="URI", help="Corpus or folder of photos.")
@click.option("--style", "style_uri", required=True, metavar="URI", help="Corpus or folder of artworks.")
@click.option("--report", "report_uri", required=True, metavar="DIR", help="Where the report is written.")
@click.option("--pairs", type=click.IntRange(min=2), default=64, show_default=True, help="How many.")
@click.option("--size", type=click.IntRange(min=MIN_SIZE), default=256, show_default=True, help="Side in px.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the pairs.")
@click.option("--vgg", "vgg_path", metavar="FILE", help="VGG-19 as safetensors: adds its measures.")
@click.option(
    "--model-name",
    default=registry.DEFAULT_MODEL,
    show_default=True,
    help="For a MODEL that is a number.",
)
def evaluate(
    model: str,
    content_uri: str,
    style_uri: str,
    report_uri: str,
    pairs: int,
    size: int,
    seed: int,
    vgg_path: str | None,
    model_name: str,
) -> dict[str, Any]:
    """Measure MODEL on fixed pairs of content and style, beside three baselines.

    The same pictures, pairs, size and seed give the same pairs, so that models can be compared. Read content
    and style figures together: the unchanged content has the best content figures, the copied style the best
    style figures. DIR gets report.html, evaluation.json and grid.jpg. The figures of a registered version are
    kept with it, for `nst promote`.

    \b
    Examples:
      nst evaluate models:/nst@challenger --content held-out/photos --style held-out/art --report report
      nst evaluate runs/first/checkpoint --content s3://data/content --style s3://data/style --report report
    """
    if model.isdecimal():
        model = f"models:/{model_name}/{model}"
    vgg = load_vgg(vgg_path) if vgg_path else None
    resolved = resolve_model(model)
    content, style = open_pictures(content_uri), open_pictures(style_uri)
    chosen = make_evaluation_set(content, style, num_pairs=pairs, size=size, seed=seed)
    if len(chosen) < pairs:
        say(f"there are only {len(chosen)} different pairs; all of them are measured")
    stylizer = Stylizer.load(resolved.checkpoint_dir)
    figures, stylized = measure(chosen, stylizer, vgg)
    evaluation = {
        "measures": summarize(figures.pop("model")),
        "baselines": {name: summarize(values) for name, values in figures.items()},
        "evaluation_set": chosen.identity(),
        "model_digest": resolved.digest,
    }
    write_report(
        places.absolute(report_uri), evaluation, chosen, stylized, _facts(resolved, content.uri, style.uri)
    )
    _print_table(evaluation)
    recorded = _record(model, resolved, evaluation)
    if recorded:
        say(f"kept with {recorded}")
    result = {"model": resolved.name, "report": places.join(report_uri, "report.html"), "recorded": recorded}
    say(f"report    {result['report']}")
    return {**result, **evaluation}


@torch.inference_mode()
def measure(
    chosen: EvaluationSet, stylizer: Stylizer, vgg: VGGFeatures | None
) -> tuple[dict[str, Figures], Tensor]:
    """(method -> measure -> figures, the model's pictures [N, 3, H, W] in [0, 1]). The method "model" is the
    stylizer; the others are the baselines."""
    methods = methods_of(stylizer)
    figures: dict[str, Figures] = {name: {} for name in methods}
    pictures: list[Tensor] = []
    starts = range(0, len(chosen), BATCH)
    with Progress("evaluate", total=len(chosen), unit="pair") as progress:
        for start in starts:
            content, style = chosen.content[start : start + BATCH], chosen.style[start : start + BATCH]
            for name, method in methods.items():
                made = method(content, style)
                found = pair_measures(made, content, style)
                if vgg is not None:
                    found |= vgg.pair_measures(made, content, style)
                for measure_name, values in found.items():
                    figures[name].setdefault(measure_name, []).extend(values)
                if name == "model":
                    pictures.append(made)
            progress.advance(len(content))
    for name, method in methods.items():
        figures[name]["style_sensitivity"] = sensitivities(chosen, method)
        figures[name]["shift_consistency"] = shift_consistencies(chosen, method)
    return figures, torch.cat(pictures)


def methods_of(stylizer: Stylizer) -> dict[str, Method]:
    """What turns [N, 3, H, W] contents and styles in [0, 1] into pictures: the model and the baselines."""

    def model(content: Tensor, style: Tensor) -> Tensor:
        code = joined_codes([stylizer.encode_style(one * 2 - 1) for one in style])
        pixels = (content * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(stylizer.stylize_batch(pixels, code)).permute(0, 3, 1, 2).float() / 255

    def baseline(name: str) -> Method:
        return lambda content, style: baselines(content, style)[name]

    return {"model": model, **{name: baseline(name) for name in TITLES}}


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


def _facts(resolved: ResolvedModel, content_uri: str, style_uri: str) -> dict[str, str]:
    return {
        "Model": f"{resolved.name} ({resolved.digest[:12]})",
        "Content": content_uri,
        "Style": style_uri,
    }


def _record(model: str, resolved: ResolvedModel, evaluation: dict[str, Any]) -> str | None:
    """Keeps the figures with the registered version; None for a model that is not registered."""
    if resolved.version is None:
        return None
    name = re.match(r"models:/([^/@]+)", model)
    assert name is not None, model
    evaluations.record_evaluation(name[1], resolved.version, evaluation)
    return f"models:/{name[1]}/{resolved.version}"


def _print_table(evaluation: dict[str, Any]) -> None:
    baselines_found = evaluation["baselines"]
    heads = "".join(f"  {TITLES[name]:>18}" for name in baselines_found)
    say(f"{'':18}  {'model':>24}{heads}")
    for name, found in evaluation["measures"].items():
        better = "lower" if LOWER_IS_BETTER.get(name, True) else "higher"
        interval = f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
        others = "".join(f"  {figures[name]['mean']:>18.3f}" for figures in baselines_found.values())
        say(f"{name:18}  {interval:>24}{others}   {better} is better")


if __name__ == "__main__":
    evaluate()
