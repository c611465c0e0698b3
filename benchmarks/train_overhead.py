"""What a cluster costs a training, and what a second worker brings: images a second of whole trainings.

    python -m benchmarks.train_overhead
    python -m benchmarks.train_overhead --pictures FOLDER     # with content/ and style/ below it

Every turn is a training of its own, on two cores, with the same configuration, corpora and batches; what is
compared are the images a second of its steady part, as the training itself reports them (`metrics.jsonl`, or
the MLflow run). Turns that are done are kept in --work: stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import timing
from benchmarks.timing import RESULTS, Spread
from nst.presets import PRESETS

CHECKPOINT_SECONDS = (
    10  # a cost at this pace is easier to see; a third of it is that of a checkpoint every 30 s
)
GOAL_CHECKPOINT_SECONDS = 30
NEVER = 10**9  # images or seconds
NUM_REPORTS = 20  # of a training
WARM_UP = 0.25  # share of the images that is left out
SECONDS_FOR_A_TURN = 400
SECONDS_TO_STOP = 60

PLAIN_WITH_ROOM, RAY_WITH_ROOM, PLAIN, RAY, CHECKPOINTS, ONE_CORE, TWO_WORKERS, TWO_TRAININGS = (
    "nst.train, 1 process of 1 thread",
    "nst train, 1 worker of 1 thread",
    "nst.train, 1 process",
    "nst train, 1 worker",
    f"nst train, 1 worker, a checkpoint every {CHECKPOINT_SECONDS} s",
    "nst train, 1 worker on 1 core",
    "nst train, 2 workers",
    "2 × nst.train at once, each on a core of its own",
)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A training, or several at once, which share nothing but the machine. `seconds`: between checkpoints.
    `length`: how many times the images of the others."""

    with_ray: bool = True
    num_at_once: int = 1
    num_workers: int = 1
    num_cores: int = 2
    num_threads: int | None = None  # None: what the options say
    seconds: int = NEVER
    length: int = 1


CONTENDERS = {
    PLAIN_WITH_ROOM: Contender(with_ray=False, num_threads=1),
    RAY_WITH_ROOM: Contender(num_threads=1),
    PLAIN: Contender(with_ray=False),
    RAY: Contender(),
    CHECKPOINTS: Contender(seconds=CHECKPOINT_SECONDS, length=4),  # several checkpoints in its steady part
    ONE_CORE: Contender(num_cores=1, num_threads=1),
    TWO_WORKERS: Contender(num_workers=2, num_threads=1),
    TWO_TRAININGS: Contender(with_ray=False, num_at_once=2, num_threads=1),
}


# --- running -----------------------------------------------------------------------------------------


def environment(work: Path, num_threads: int) -> dict[str, str]:
    """Everything on this machine, with a registry of the benchmark's own."""
    known = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own = {"RAY_AUTH_MODE": "token", "MLFLOW_TRACKING_URI": f"sqlite:///{work.absolute()}/mlflow.db"}
    return {**known, **own, "OMP_NUM_THREADS": str(num_threads)}


def run(command: Sequence[str], work: Path, cores: Sequence[int], num_threads: int, name: str) -> None:
    """Runs a program of this project on those cores only. Raises RuntimeError if it fails or takes too long;
    whatever it started has ended then."""
    log_path = work / f"{name}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=Path(__file__).parent.parent,
            env=environment(work, num_threads),
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(os.sched_setaffinity, 0, set(cores)),
        )
        try:
            code = process.wait(SECONDS_FOR_A_TURN)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    if code != 0:
        how = f"took more than {SECONDS_FOR_A_TURN} s" if code is None else f"ended with {code}"
        last = " | ".join(log_path.read_text(errors="replace").splitlines()[-4:])
        raise RuntimeError(f"{' '.join(command)} {how}: {last}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks it to end, so that it can end what it started; then ends what is left of all that."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        with suppress(psutil.NoSuchProcess):
            descendant.kill()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all turns share. `cores`: two of them."""

    work: Path
    preset: str
    num_images: int
    num_threads: int
    cores: tuple[int, ...]

    def take_turn(self, name: str, number: int) -> float:
        """Trains once from the start; images a second of the steady part, of all trainings together."""
        contender = CONTENDERS[name]
        cores = self.cores[: contender.num_cores]
        share = len(cores) // contender.num_at_once
        place = list(CONTENDERS).index(name)

        def train(one: int) -> float:
            out = self.work / "runs" / f"{number}-{place}-{one}"
            return self.train(contender, out, cores[one * share : (one + 1) * share])

        with ThreadPoolExecutor(contender.num_at_once) as pool:
            return sum(pool.map(train, range(contender.num_at_once)))

    def train(self, contender: Contender, out: Path, cores: Sequence[int]) -> float:
        num_threads = contender.num_threads or self.num_threads
        num_images = self.num_images * contender.length
        shutil.rmtree(out, ignore_errors=True)  # of a turn that was cut off
        command = ["pipelines.cli", "train"] if contender.with_ray else ["nst.train"]
        for role in ("content", "style"):
            command += [f"--{role}", str(self.work / "corpora" / role)]
        command += ["--preset", self.preset, "--images", str(num_images), "--out", str(out)]
        every = {"log_every": max(self.num_images // NUM_REPORTS, 1), "preview_every": NEVER}
        for field, value in (every | {"checkpoint_every": NEVER}).items():
            command += ["--set", f"{field}={value}"]
        if contender.with_ray:
            command += ["--name", "turn", "--device", "cpu", "--num-workers", str(contender.num_workers)]
            command += ["--threads", str(num_threads), "--checkpoint-seconds", str(contender.seconds)]
        run(command, self.work, cores, num_threads, name=f"turn-{out.name}")
        return steady_rate(self.ray_reports(out) if contender.with_ray else plain_reports(out))

    def ray_reports(self, out: Path) -> list[tuple[int, float]]:
        from infra.tracking_server import client

        run_id = json.loads((out / "turn" / "run.json").read_text())["run_id"]
        tracked = client(environment(self.work, 1)["MLFLOW_TRACKING_URI"])
        return [(one.step, one.value) for one in tracked.get_metric_history(run_id, "images_per_second")]


def plain_reports(out: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(line["num_images_seen"], line["images_per_second"]) for line in lines]


def steady_rate(reports: Sequence[tuple[int, float]]) -> float:
    """Images a second behind the warm-up.

    Args:
        reports: (images seen so far, images a second since the report before).
    """
    reports = sorted(reports)
    last = reports[-1][0]
    images = seconds = 0.0
    for (before, _), (seen, rate) in pairwise(reports):
        if before >= WARM_UP * last:
            images += seen - before
            seconds += (seen - before) / rate
    if not seconds:
        raise RuntimeError(
            f"{len(reports)} reports over {last} images hold no steady part; give more --images"
        )
    return images / seconds


def make_corpora(pictures: Path | None, bench: Bench) -> None:
    """`content` and `style` below the working folder, unless they are there."""
    if pictures is None:
        from pipelines.demo import write_pictures

        written = write_pictures(bench.work / "pictures")
    else:
        written = {role: str((pictures / role).absolute()) for role in ("content", "style")}
    for role in ("content", "style"):
        if not (bench.work / "corpora" / role / "corpus.json").exists():
            command = ["pipelines.cli", "shard", written[role], str(bench.work / "corpora" / role)]
            run([*command, "--role", role], bench.work, bench.cores, bench.num_threads, name="shard")


def all_rounds(
    num_rounds: int, record_path: Path, take_turn: Callable[[str, int], float]
) -> list[dict[str, float]]:
    """For each round every contender's images a second, every second round backwards. What is on record is
    not done again."""
    record = json.loads(record_path.read_text())
    rounds: list[dict[str, float]] = record["rounds"]
    for number in range(num_rounds):
        if number == len(rounds):
            rounds.append({})
        for name in reversed(CONTENDERS) if number % 2 else CONTENDERS:
            if name not in rounds[number]:
                rounds[number][name] = take_turn(name, number)
                record_path.write_text(json.dumps(record))
                say(f"round {number + 1}: {name}: {rounds[number][name]:.2f} images/s")
    return rounds[:num_rounds]


def begin(work: Path, settings: Mapping[str, Any]) -> Path:
    """Where the record of the turns is; anew, unless it is of the same settings."""
    record_path = work / "turns.json"
    if record_path.exists() and json.loads(record_path.read_text())["settings"] == settings:
        return record_path
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    record_path.write_text(json.dumps({"settings": settings, "rounds": []}))
    return record_path


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- the page ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """`value` has to be at least, or at most, `bound`."""

    text: str
    value: Spread
    bound: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        return self.value.median >= self.bound if self.at_least else self.value.median <= self.bound


def goals_of(rounds: Sequence[Mapping[str, float]]) -> list[Goal]:
    """Ratios are taken within a round."""

    def ratio(name: str, reference: str) -> list[float]:
        return [its[name] / its[reference] for its in rounds]

    share = CHECKPOINT_SECONDS / GOAL_CHECKPOINT_SECONDS
    cost = [(1 - speed) * share for speed in ratio(CHECKPOINTS, RAY)]
    return [
        Goal(
            "`nst train` against `python -m nst.train`, where its threads leave a core to Ray: 0.97 times",
            Spread.of(ratio(RAY_WITH_ROOM, PLAIN_WITH_ROOM)),
            0.97,
        ),
        Goal("the same where they fill both cores: 0.97 times", Spread.of(ratio(RAY, PLAIN)), 0.97),
        Goal(
            "2 workers on 2 cores against 1 that shares its core with Ray: 1.6 times",
            Spread.of(ratio(TWO_WORKERS, ONE_CORE)),
            1.6,
        ),
        Goal(
            "2 workers on 2 cores against 1 that leaves a core to Ray: 1.6 times",
            Spread.of(ratio(TWO_WORKERS, RAY_WITH_ROOM)),
            1.6,
        ),
        Goal(
            f"a checkpoint every {GOAL_CHECKPOINT_SECONDS} s costs less than 0.03 of the images a second "
            f"(a share of {share:.2g} of what one every {CHECKPOINT_SECONDS} s costs)",
            Spread.of(cost),
            0.03,
            at_least=False,
        ),
    ]


def page(facts: Mapping[str, Any], asked: Mapping[str, Any], rounds: Sequence[Mapping[str, float]]) -> str:
    rates = [[name, Spread.of([its[name] for its in rounds])] for name in CONTENDERS]
    goals = [
        f"- {goal.text}: **{'met' if goal.is_met else 'NOT met'}**, {goal.value}" for goal in goals_of(rounds)
    ]
    lines = [
        "# What a cluster costs a training",
        "",
        f"Preset `{asked['preset']}`, {asked['images']} images a training "
        f"({CONTENDERS[CHECKPOINTS].length} times as many where there are checkpoints), {asked['pictures']}; "
        f"two cores, {asked['threads']} threads where nothing else is said and 1 a process in the first two "
        "and the last three rows. The last row, two trainings that share nothing, is what the machine allows "
        f"two workers. {len(rounds)} interleaved rounds, median (lowest–highest), ratios round by round. "
        f"Counted are the images a second behind the first {WARM_UP:.0%}, as the training reports them: "
        "start and end, and what Ray takes for them, are left out.",
        "",
        timing.table(["", "images/s"], rates),
        "",
        "## Goals",
        "",
        *goals,
        "",
        timing.describe(facts),
        "",
    ]
    return "\n".join(lines)


# --- the program -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--pictures", type=Path, help="folder with content/ and style/LABEL/; the demo's if left out"
    )
    parser.add_argument("--preset", default="micro", choices=sorted(PRESETS))
    parser.add_argument("--images", type=int, default=400, help="of a training")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the trainings that have both cores alone")
    default_work = Path(tempfile.gettempdir()) / "nst-train-overhead"
    parser.add_argument("--work", type=Path, default=default_work, help="removed when all is done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        parser.error("two cores are needed; this process may use one")
    facts = timing.machine(torch.device("cpu")) | {
        "threads": options.threads,
        "allocator": {"glibc": "as the trainings set it"},
    }
    bench = Bench(
        work=options.work,
        preset=options.preset,
        num_images=options.images,
        num_threads=options.threads,
        cores=tuple(cores),
    )
    asked = {
        "preset": options.preset,
        "images": options.images,
        "threads": options.threads,
        "pictures": f"pictures of {options.pictures.name}" if options.pictures else "the demo's pictures",
    }
    pictures = str(options.pictures.absolute()) if options.pictures else None
    record_path = begin(options.work, asked | {"folder": pictures})
    make_corpora(options.pictures, bench)
    rounds = all_rounds(options.rounds, record_path, bench.take_turn)
    facts["load_at_end"] = round(os.getloadavg()[0], 2)
    figures = {
        "machine": facts,
        "options": asked,
        "goals": timing.as_json(goals_of(rounds)),
        "rounds": rounds,
    }
    timing.write_results(options.out, "train_overhead", figures, page(facts, asked, rounds))
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
