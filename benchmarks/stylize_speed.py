"""Speed of `nst stylize` over a folder, beside a bare loop of decode, forward, encode in one process.

    python -m benchmarks.stylize_speed --rounds 3

Every turn is the real command (or the loop) in a process of its own, once over a few pictures and once over
all: the difference is what more pictures take, without Python's, Ray's and the model's start. Counted are the
process and all that it starts. The loop has as many PyTorch threads as there are cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from sklearn.datasets import load_sample_images

from benchmarks import timing
from benchmarks.processes import ProcessTree
from benchmarks.timing import RESULTS, Seconds, Spread
from nst.allocator import keep_freed_memory
from nst.checkpoint import CONFIG_FILE, FORMAT_VERSION, MODEL_FILE
from nst.config import TrainConfig, to_dict
from nst.images import encode_jpeg
from nst.networks.build import build_generator
from nst.presets import preset
from pipelines.styles import read_styles
from pipelines.stylize_worker import StylizeSettings, render, stylizer_of

REPOSITORY = Path(__file__).parent.parent
SIZES = ((320, 240), (512, 512), (640, 480), (480, 640), (800, 600), (1024, 768))  # width, height
NUM_FEW = 12
NUM_WORKERS = (1, 2, 4)
GOAL = 0.9  # times the loop's images a second
BARE = "bare loop"
SECONDS_FOR_A_TURN = 1_800


def make_pictures(folder: Path, num: int) -> None:
    """JPEGs of mixed sizes, cut out of real photographs."""
    photographs = [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        *load_sample_images().images,
    ]
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num):
        photograph = Image.fromarray(photographs[number % len(photographs)])
        width, height = SIZES[int(generator.integers(len(SIZES)))]
        scale = generator.uniform(0.6, 1.0) * min(photograph.width / width, photograph.height / height)
        across, down = width * scale, height * scale
        left = generator.uniform(0, photograph.width - across)
        top = generator.uniform(0, photograph.height - down)
        box = (left, top, left + across, top + down)
        cut = photograph.resize((width, height), Image.Resampling.LANCZOS, box=box)
        (folder / f"{number:05d}.jpg").write_bytes(encode_jpeg(cut, 90))


def make_checkpoint(folder: Path, name: str) -> None:
    """A preset's generator with random weights, which take as long as trained ones."""
    model = preset(name).model
    folder.mkdir()
    weights = {key: value.contiguous().clone() for key, value in build_generator(model).state_dict().items()}
    save_file(weights, folder / MODEL_FILE)
    config = {"format_version": FORMAT_VERSION, "config": to_dict(TrainConfig(model=model))}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def loop(source: Path, out: Path, checkpoint: str, style: str, precision: str) -> None:
    """What a person writes first: one picture after the other."""
    keep_freed_memory()
    settings = StylizeSettings(precision=precision)
    stylizer = stylizer_of(checkpoint, settings)
    code = stylizer.encode_style(read_styles([style])[0].rgb)
    out.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        (out / path.name).write_bytes(render(path.read_bytes(), stylizer, code, settings).data)


def turn(command: Sequence[str], out: Path) -> Seconds:
    """Seconds of a process and all that it starts."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    tree = ProcessTree(psutil.Process(process.pid))
    try:
        _, errors = process.communicate(timeout=SECONDS_FOR_A_TURN)
        wall = time.perf_counter() - started
        cpu = tree.usage().cpu
    finally:
        tree.close()
    if process.returncode:
        raise RuntimeError(f"{command}: {errors.decode()[-2000:]}")
    shutil.rmtree(out)
    return Seconds(wall, cpu)


def measure(
    folder: Path, num: int, contenders: Sequence[str], precision: str
) -> dict[str, dict[str, Seconds]]:
    """contender -> seconds of the run over all, and of a picture more."""
    found = {}
    for contender in contenders:
        seconds = {}
        for name in ("few", "all"):
            out = folder / "out"
            arguments = [str(folder / name), str(out)]
            style, model = str(folder / "style.jpg"), str(folder / "model")
            if contender == BARE:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.stylize_speed",
                    "--loop",
                    *arguments,
                    model,
                    style,
                ]
            else:
                command = [sys.executable, "-m", "pipelines.stylize_bucket", *arguments, "--num-workers"]
                command += [contender.split()[0], "--style", style, "--model", model]
            seconds[name] = turn([*command, "--precision", precision], out)
        more = num - NUM_FEW
        found[contender] = {
            "whole run": seconds["all"],
            "a picture": Seconds(
                (seconds["all"].wall - seconds["few"].wall) / more,
                (seconds["all"].cpu - seconds["few"].cpu) / more,
            ),
        }
        print(contender, found[contender], file=sys.stderr, flush=True)
    return found


def page(facts: dict[str, Any], num: int, options: argparse.Namespace, rounds: list[dict[str, Any]]) -> str:
    rows = []
    for contender in rounds[0]:
        mine = [one[contender]["a picture"] for one in rounds]
        bare = [one[BARE]["a picture"] for one in rounds]
        rows.append(
            [
                contender,
                Spread.of([1 / one.wall for one in mine]),
                timing.speedup(mine, bare),
                Spread.of([one.cpu for one in mine]),
                timing.speedup(mine, bare, clock="cpu"),
                Spread.of([one[contender]["whole run"].wall for one in rounds]),
            ]
        )
    header = ["", "images/s", "times the loop's", "CPU s a picture", "loop's CPU s / its", "s for all"]
    best = max(
        timing.speedup(
            [one[name]["a picture"] for one in rounds], [one[BARE]["a picture"] for one in rounds]
        ).median
        for name in rounds[0]
        if name != BARE
    )
    sizes = ", ".join(f"{width}×{height}" for width, height in SIZES)
    return "\n".join(
        [
            "# `nst stylize` over a folder",
            "",
            timing.describe(facts),
            f"- {num} JPEGs cut out of photographs ({sizes}), preset {options.preset}, {options.precision}, "
            f"{len(rounds)} rounds; median (lowest–highest)",
            "",
            timing.table(header, rows),
            "",
            f"Goal: at least {GOAL:.0%} of the bare loop's images a second on the same cores: "
            f"{'**met**' if best >= GOAL else '**NOT met**'}, {best:.0%} at the best number of workers.",
            "",
            "The figures of a picture leave out what the start of a run takes; *s for all* has it in. Images "
            "a second depend on what else the machine does, CPU seconds hardly: repeat them on a quiet "
            "machine if the load at the start is not near 0.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--pictures", type=int, default=300, help="how many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--loop", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop is not None:
        source, out, checkpoint, style = options.loop
        loop(Path(source), Path(out), checkpoint, style, options.precision)
        return
    torch.manual_seed(0)
    facts = timing.machine(torch.device("cpu"))
    contenders = [BARE, *(f"{num} worker{'s' * (num > 1)}" for num in NUM_WORKERS)]
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nst-speed-") as temporary:
        folder = Path(temporary)
        make_pictures(folder / "all", options.pictures)
        (folder / "few").mkdir()
        for path in sorted((folder / "all").iterdir())[:NUM_FEW]:
            shutil.copy(path, folder / "few")
        Image.fromarray(load_sample_images().images[1]).save(folder / "style.jpg")
        make_checkpoint(folder / "model", options.preset)
        for number in range(options.rounds):
            order = contenders if number % 2 == 0 else contenders[::-1]
            turns = measure(folder, options.pictures, order, options.precision)
            rounds.append({contender: turns[contender] for contender in contenders})
    figures = {"machine": facts, "pictures": options.pictures, "rounds": timing.as_json(rounds)}
    timing.write_results(
        options.out, "stylize_speed", figures, page(facts, options.pictures, options, rounds)
    )


if __name__ == "__main__":
    main()
