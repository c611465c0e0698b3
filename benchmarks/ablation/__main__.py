"""Everything one behind the other: corpora, trainings, measures, report. Can be stopped and called again.

    python -m benchmarks.ablation --pictures FOLDER --vgg FILE               # all, 6 variants x 3 seeds
    python -m benchmarks.ablation --pictures FOLDER --variants all           # the other approach and losses
    too python -m benchmarks.ablation --pictures FOLDER --only-report            # what is finished so far

Corpora, runs and the grid of pictures go to --work: the pictures may be others' and are not for this
repository. Figures and curves go to --results."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.ablation import pairs, pictures, report
from benchmarks.ablation.corpora import Corpora, make_corpora
from benchmarks.ablation.judge import NUM_STEPS, train_judge
from benchmarks.ablation.measure import Instruments, measure_all, measure_baselines, vgg_features
from benchmarks.ablation.run import Run, is_finished, plan_runs, read_metrics, read_record, say, train_all
from benchmarks.ablation.summary import Measures
from benchmarks.ablation.variants import DEFAULT_IMAGES, variants_named
from nst.standalone import find_checkpoint
from nst.stylize import Stylizer


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, _stop)
    torch.set_num_threads(1)  # a second one only waits where others work too
    try:
        return _run(options)
    except ValueError as error:
        print(f"ablation: {error}", file=sys.stderr)
        return 2


def _stop(*_: object) -> None:
    """Ends the trainings under way too, since it is an exception and no sudden death."""
    say("told to stop; the same command goes on from here")
    sys.exit(143)


def _run(options: argparse.Namespace) -> int:
    variants = variants_named(options.variants)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    corpora = make_corpora(options.pictures, options.work / "corpora")
    for name, counts in corpora.counts.items():
        say(f"{name}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    say(f"held out whole: {', '.join(corpora.unseen_artists)}")
    runs = plan_runs(variants, seeds, options.images, options.work / "runs")
    for run in runs:
        is_finished(run)  # a wrong folder is told of before hours of training
    evaluation = pairs.load_evaluation(corpora, num_contents=options.pairs)
    vgg = vgg_features(options.vgg)
    say("training the artist encoder, unless it is there")
    judge = train_judge(corpora, evaluation, options.work / "judge", num_steps=options.judge_steps)
    accuracy = judge.accuracy(evaluation)
    say("it finds the artist in: " + ", ".join(f"{name} {share:.3f}" for name, share in accuracy.items()))

    failed = [] if options.only_report else train_all(runs, corpora, num_at_once=options.at_once)

    finished = [run for run in runs if is_finished(run)]
    if not finished:
        say("no run is finished: nothing to report")
        return 1
    instruments = Instruments(evaluation, judge, vgg)
    by_variant: dict[str, dict[int, Measures]] = {}
    say(f"measuring {len(finished)} runs")
    for run, measures in measure_all(finished, instruments, num_at_once=options.at_once):
        by_variant.setdefault(run.variant.name, {})[run.seed] = measures
        say(f"{run.name} measured")
    baselines = measure_baselines(instruments, options.work / "baselines.json")
    facts = _facts(options, corpora, finished, accuracy)
    report.write_report(by_variant, baselines, facts, options.results)
    _draw(finished, seeds[0], evaluation, options)
    say(f"written: {options.results / 'ablation.md'}, .json, _curves.png; {options.work / 'grid.png'}")
    return 1 if failed else 0


def _draw(runs: list[Run], seed: int, evaluation: pairs.Evaluation, options: argparse.Namespace) -> None:
    metrics: dict[str, list[list[dict[str, Any]]]] = {}
    stylizers: dict[str, Stylizer] = {}
    for run in runs:
        metrics.setdefault(run.variant.name, []).append(read_metrics(run))
        checkpoint = find_checkpoint(run.folder)
        if run.seed == seed and checkpoint is not None:
            stylizers[run.variant.name] = Stylizer.load(checkpoint, device="cpu")
    pictures.draw_curves(metrics, options.results / "ablation_curves.png")
    pictures.draw_grid(stylizers, evaluation, options.work / "grid.png")


def _facts(
    options: argparse.Namespace, corpora: Corpora, runs: list[Run], judge: Mapping[str, float]
) -> dict[str, Any]:
    batch = runs[0].config.batch
    return {
        "command": command_text(options),
        "machine": f"{os.cpu_count()} cores ({_cpu_name()}), torch {torch.__version__}",
        "num_images": options.images,
        "seeds": sorted({run.seed for run in runs}),
        "batch": batch.num_classes * batch.works_per_class,
        "size": batch.size,
        "side": pairs.SIDE,
        "num_pairs": options.pairs,
        "counts": corpora.counts,
        "unseen_artists": corpora.unseen_artists,
        "split_seed": corpora.seed,
        "judge": dict(judge),
        "code": sorted({digest for run in runs for digest in read_record(run)["code"]}),
    }


def command_text(options: argparse.Namespace) -> str:
    """The command that does this again, without the places of this machine."""
    command = ["python -m benchmarks.ablation --pictures FOLDER"]
    if options.vgg:
        command.append("--vgg FILE")
    command += [f"--images {options.images}", f"--seeds {options.seeds}", f"--pairs {options.pairs}"]
    if options.variants:
        command.append(f"--variants {options.variants}")
    if options.judge_steps != NUM_STEPS:
        command.append(f"--judge-steps {options.judge_steps}")
    return " ".join([*command, f"--at-once {options.at_once}"])


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pictures", type=Path, required=True, help="folder with LABELS.csv, content/ and style/"
    )
    parser.add_argument("--vgg", type=Path, help="VGG-19 weights, for the measures that peers report")
    parser.add_argument("--work", type=Path, default=Path(".nst/ablation"), help="for corpora and runs")
    parser.add_argument("--results", type=Path, default=report.RESULTS, help="for figures and curves")
    parser.add_argument("--images", type=int, default=DEFAULT_IMAGES, help="photos that a training sees")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--variants", default="", help='names separated by commas, or "all"')
    parser.add_argument("--pairs", type=int, default=pairs.NUM_CONTENTS, help="measured in each group")
    parser.add_argument("--judge-steps", type=int, default=NUM_STEPS, help="of training the artist encoder")
    parser.add_argument("--at-once", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--only-report", action="store_true", help="train nothing; report what is finished")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    timing.keep_freed_memory()
    sys.exit(main())
