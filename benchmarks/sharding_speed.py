"""Sharding speed: JPEGs into WebDataset tars, beside tarfile, ShardWriter, Ray Data and img2dataset.

    python -m benchmarks.sharding_speed --pictures FOLDER --rounds 5

Every turn is a process of its own, which gets ready (imports, cluster, a few pictures to begin with) before
it is timed. What is counted is that process and all that it starts."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks import timing
from benchmarks.processes import ProcessTree, go_on, wait_for
from benchmarks.sharding_contenders import CONTENDERS, DONE, QUALITY, READY, SIZE, WARM_UP
from benchmarks.timing import RESULTS, Spread

PROGRAM = Path(__file__).parent / "sharding_contenders.py"
REPOSITORY = PROGRAM.parent.parent
REFERENCE, OURS, OURS_ALONE = "bare tarfile loop", "nst shard", "nst write_shard"
PARALLEL = ("Ray Data write_webdataset", "img2dataset", OURS)
GOAL = 1.15  # times the bare loop's CPU time an image
TASKS = {"copy": "copied", "reencode": f"decoded, resized to {SIZE} px, encoded (quality {QUALITY}, 4:4:4)"}
# Pinned: what was current for img2dataset when this was written. It shares no environment with ours.
IMG2DATASET = (
    *("img2dataset==1.47.0", "opencv-python-headless==4.14.0.94", "albumentations==1.4.24"),
    *("webdataset==0.2.111", "pyarrow==26.0.1", "pandas==2.3.3", "numpy==2.4.6"),
)
ENVIRONMENT = REPOSITORY / ".nst" / "img2dataset"
SECONDS_FOR_A_TURN = 600
TICK = 0.01  # s of CPU time; the kernel counts no finer


# --- the pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureSet:
    """`num` JPEGs of `size` pixels, each put together from `grid` (columns, rows) real pictures."""

    name: str
    title: str
    num: int
    size: tuple[int, int]
    grid: tuple[int, int]

    def make(self, sources: Sequence[Path], folder: Path) -> None:
        folder.mkdir()
        chance = random.Random(0)
        grain = np.random.default_rng(0).normal(0, 2.5, self.size[::-1]).astype(np.int16)[..., None]
        for number in range(self.num):
            columns, rows = self.grid
            width, height = -(-self.size[0] // columns), -(-self.size[1] // rows)
            whole = Image.new("RGB", (width * columns, height * rows))
            places = itertools.product(range(0, whole.width, width), range(0, whole.height, height))
            for place, source in zip(places, chance.sample(sources, columns * rows), strict=True):
                whole.paste(Image.open(source).convert("RGB").resize((width, height)), place)
            # A camera's picture is soft where it is enlarged, but it has grain.
            pixels = np.asarray(whole.crop((0, 0, *self.size))) + np.roll(grain, number, axis=1)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / f"{number:05d}.jpg", quality=90
            )


def picture_sets(num_small: int, num_camera: int) -> list[PictureSet]:
    return [
        PictureSet("small", "512 px", num_small, (512, 512), (2, 2)),
        PictureSet("camera", "4032x3024 px", num_camera, (4032, 3024), (4, 3)),
    ]


# --- the turns ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What one contender needed for one job: seconds by the clock and of CPU time, to get ready and to work,
    and the highest memory while it worked (bytes)."""

    start_wall: float
    start_cpu: float
    wall: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Job:
    """One task for all contenders: `urls` is a file with the pictures' addresses on a local server."""

    task: str
    pictures: PictureSet
    folder: Path
    urls: Path
    num_cpus: int


def take_turn(name: str, job: Job, python: str) -> Turn:
    """Runs a contender once. Raises RuntimeError if it fails or does not store every image."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryDirectory(prefix="sharding-speed-") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [python, str(PROGRAM), name, job.task, str(job.folder), out, str(job.urls), str(job.num_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
        )
        tree = ProcessTree(psutil.Process(process.pid))
        too_late = threading.Timer(SECONDS_FOR_A_TURN, process.kill)
        too_late.start()
        try:
            begun = tree.usage()
            wait_for(process, READY)
            ready = tree.usage()
            tree.forget_memory()
            go_on(process)
            wait_for(process, DONE)
            done = tree.usage()
            go_on(process)
            process.wait()
        except (EOFError, OSError):
            log.seek(0)
            raise RuntimeError(f"{name} failed: {' | '.join(log.read().splitlines()[-3:])}") from None
        finally:
            too_late.cancel()
            tree.close()
            process.communicate()
        num_stored = count_images(Path(out))
    if num_stored != job.pictures.num:
        raise RuntimeError(f"{name} stored {num_stored} of {job.pictures.num} images")
    return Turn(
        start_wall=ready.wall - begun.wall,
        start_cpu=ready.cpu,
        wall=done.wall - ready.wall,
        cpu=max(done.cpu - ready.cpu, TICK),
        memory=done.memory,
    )


def count_images(folder: Path) -> int:
    """Those in the tars below `folder`, but for what was made to warm up."""
    num_images = 0
    for path in folder.rglob("*.tar"):
        if WARM_UP not in path.relative_to(folder).parts:
            with tarfile.open(path) as tar:
                num_images += sum(member.name.endswith(".jpg") for member in tar)
    return num_images


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """The address of a server of the files in `folder`, in a process that no contender's figures contain."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"port (\d+)", process.stdout.readline())
        assert found is not None
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        process.kill()
        process.communicate()


def python_with_img2dataset() -> str:
    """Makes its environment if it is not there. Raises RuntimeError if that cannot be done."""
    python = ENVIRONMENT / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True, capture_output=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *IMG2DATASET], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise RuntimeError(f"cannot be installed: {said[-1]}") from None
    return str(python)


def run_rounds(
    pythons: Mapping[str, str], jobs: Sequence[Job], num_rounds: int
) -> dict[str, dict[str, list[Turn]]]:
    """All contenders do all jobs once a round, every second round backwards: job -> contender -> turns."""
    turns: dict[str, dict[str, list[Turn]]] = {title_of(job): {name: [] for name in pythons} for job in jobs}
    pairs = list(itertools.product(jobs, pythons))
    for number in range(num_rounds):
        for job, name in reversed(pairs) if number % 2 else pairs:
            turn = take_turn(name, job, pythons[name])
            turns[title_of(job)][name].append(turn)
            print(f"round {number + 1}: {name}, {title_of(job)}: {turn.cpu:.1f} CPU s", file=sys.stderr)
    return turns


def title_of(job: Job) -> str:
    return f"{job.pictures.num} JPEGs of {job.pictures.title}, {TASKS[job.task]}"


# --- the page ----------------------------------------------------------------------------------------


def row(turns: Sequence[Turn], reference: Sequence[Turn], num_images: int) -> dict[str, Any]:
    """A contender's figures for one job; ratios to the reference are taken within a round."""
    pairs = list(zip(turns, reference, strict=True))
    return {
        "images a second": Spread.of([num_images / turn.wall for turn in turns]),
        "images a core-second": Spread.of([num_images / turn.cpu for turn in turns]),
        "CPU ms an image": Spread.of([1e3 * turn.cpu / num_images for turn in turns]),
        "times the CPU time": Spread.of([turn.cpu / other.cpu for turn, other in pairs]),
        "times as fast": Spread.of([other.wall / turn.wall for turn, other in pairs]),
        "peak MB": Spread.of([turn.memory / 1e6 for turn in turns]),
        "seconds to get ready": Spread.of([turn.start_wall for turn in turns]),
        "CPU seconds to get ready": Spread.of([turn.start_cpu for turn in turns]),
    }


def rows_of(turns: Mapping[str, Sequence[Turn]], num_images: int) -> dict[str, dict[str, Any]]:
    return {name: row(its, turns[REFERENCE], num_images) for name, its in turns.items()}


def verdicts(title: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The project's goals for re-encoding: the bare loop's CPU time, and ahead of the other parallel ones."""
    lines = []
    for name in (OURS_ALONE, OURS):
        ratio = rows[name]["times the CPU time"]
        word = "met" if ratio.median <= GOAL else "NOT met"
        lines.append(f"- {title}: `{name}` within {GOAL} times the bare loop's CPU time: **{word}**, {ratio}")
    for name in PARALLEL:
        for column in ("images a second", "images a core-second") if name in rows and name != OURS else ():
            mine, its = rows[OURS][column].median, rows[name][column].median
            word = "met" if mine > its else "NOT met"
            lines.append(
                f"- {title}: `{OURS}` ahead of {name} in {column}: **{word}**, {mine / its:.3g} times"
            )
    return lines


def page(
    facts: Mapping[str, Any],
    jobs: Sequence[Job],
    turns: Mapping[str, Mapping[str, Sequence[Turn]]],
    left_out: Mapping[str, str],
) -> str:
    num_rounds = len(turns[title_of(jobs[0])][REFERENCE])
    lines = [
        "# Sharding speed",
        "",
        f"{num_rounds} interleaved rounds; median (lowest–highest); ratios to the bare loop are taken round "
        "by round. Counted is a process with all that it starts. "
        f"{', '.join(PARALLEL)} may use all {jobs[0].num_cpus} cores, the others are one process.",
        "",
        "*Ready* is the time before: imports, cluster, workers. Memory is the highest sum of proportional "
        "set sizes while working. img2dataset starts its workers while it works; it fetches through a local "
        "HTTP server, whose own time is not counted, and shrinks with OpenCV's area filter. What *nst* "
        "copies it has decoded first, to refuse broken files.",
    ]
    header = ["", "images/s", "images/core-s", "CPU ms an image", "× CPU time", "× as fast", "peak MB"]
    header += ["ready s", "ready CPU s"]
    goals: list[str] = []
    for job in jobs:
        rows = rows_of(turns[title_of(job)], job.pictures.num)
        body = [[name, *values.values()] for name, values in rows.items()]
        lines += ["", f"## {title_of(job)}", "", timing.table(header, body)]
        goals += verdicts(job.pictures.title, rows) if job.task == "reencode" else []
    lines += ["", "## Goals", "", *goals, ""]
    lines += [f"Left out: {name}: {why}\n" for name, why in left_out.items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join([*lines, f"- {versions}", timing.describe(facts), ""])


# --- the program -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of real pictures (.jpg)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", type=int, default=1000, help="number of 512 px JPEGs")
    parser.add_argument("--camera", type=int, default=100, help="number of camera-size JPEGs")
    parser.add_argument("--without", default="", help="contenders to leave out, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    sources = sorted(options.pictures.rglob("*.jpg"))
    if len(sources) < 12:
        parser.error(f"{options.pictures} has {len(sources)} .jpg files; 12 or more are needed")
    unwanted = set(filter(None, options.without.split(",")))
    facts: dict[str, Any] = timing.machine(torch.device("cpu")) | {"allocator": {"glibc": "as it comes"}}
    pythons = {name: sys.executable for name in CONTENDERS if name not in unwanted}
    left_out = dict.fromkeys(sorted(unwanted), "not wanted")
    names = ("pillow", "webdataset", "ray")
    facts["versions"] = {name: importlib.metadata.version(name) for name in names}
    if "img2dataset" in pythons:
        try:
            pythons["img2dataset"] = python_with_img2dataset()
            facts["versions"] |= dict(pin.split("==") for pin in IMG2DATASET[:2])
        except RuntimeError as error:
            del pythons["img2dataset"]
            left_out["img2dataset"] = str(error)
    with tempfile.TemporaryDirectory(prefix="sharding-pictures-") as work:
        jobs = []
        with http_server(Path(work)) as address:
            for pictures in picture_sets(options.small, options.camera):
                folder, urls = Path(work, pictures.name), Path(work, f"{pictures.name}.txt")
                pictures.make(sources, folder)
                lines = [f"{address}/{pictures.name}/{path.name}" for path in sorted(folder.iterdir())]
                urls.write_text("\n".join(lines) + "\n")
                for task in TASKS:
                    jobs.append(Job(task, pictures, folder, urls, facts["cores"]))
            turns = run_rounds(pythons, jobs, options.rounds)
    figures = {
        "machine": facts,
        "jobs": {
            title_of(job): {
                "rows": timing.as_json(rows_of(turns[title_of(job)], job.pictures.num)),
                "rounds": timing.as_json(turns[title_of(job)]),
            }
            for job in jobs
        },
        "left_out": left_out,
    }
    timing.write_results(options.out, "sharding_speed", figures, page(facts, jobs, turns, left_out))


if __name__ == "__main__":
    main()
