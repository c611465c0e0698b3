"""Training speed: images a second of every preset beside pix2pix and CycleGAN, in one run.

    python -m benchmarks.training_speed --rounds 5

A whole step of each is timed, without the loading of data: forward and backward of both sides, optimisers
and, for ours, the averaged weights. See README.md here for what is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import peers, timing
from benchmarks.timing import LAYOUTS, Contender, Seconds, Spread
from nst.batch import Batch
from nst.config import BatchConfig, TrainConfig
from nst.objectives.build import build_objective
from nst.presets import preset

WORKS_PER_CLASS = 2
PEERS = {"pix2pix": peers.Pix2PixStep, "cyclegan": peers.CycleGanStep}
GOALS = {"main": 3.0, "micro": 8.0}  # times CycleGAN's images a second


@dataclass(frozen=True)
class Runner:
    """A contender, and how the seconds of its parts make one average step.

    Attributes:
        shares: part -> its share of the steps.
        layout: memory format of weights and pictures.
    """

    contender: Contender
    shares: dict[str, float]
    layout: str

    def step_seconds(self, turns: Sequence[timing.Turn]) -> list[Seconds]:
        """Of an average step, one a round."""
        return [
            sum((turn[part] * share for part, share in self.shares.items()), Seconds(0, 0)) for turn in turns
        ]


# --- the contenders ----------------------------------------------------------------------------------


def preset_runner(
    name: str, config: TrainConfig, *, size: int, num_images: int, precision: str, device: torch.device
) -> Runner:
    """A preset at `size` px with `num_images` photos and as many artworks, two of each artist.

    The lazy gradient penalty makes every `r1_every`-th step longer: both kinds are timed and weighed.
    """
    batches = BatchConfig(
        num_classes=num_images // WORKS_PER_CLASS, works_per_class=WORKS_PER_CLASS, size=size
    )
    config = replace(config, batch=batches, precision=precision)  # type: ignore[arg-type]
    objective = build_objective(config, device)
    batch = Batch(
        content=timing.pictures(num_images, size),
        style=timing.pictures(num_images, size),
        labels=torch.arange(num_images) // WORKS_PER_CLASS,
        works_per_class=WORKS_PER_CLASS,
        step=1,
    ).to(device)

    def step_of(number: int) -> Callable[[], None]:
        numbered = replace(batch, step=number)

        def step() -> None:
            objective.step(numbered, progress=0.5)
            objective.update_ema(num_images, config.num_images // 2)

        return step

    every = config.loss.r1_every if config.loss.r1 > 0 else 1
    parts, shares = {"step": step_of(1)}, {"step": 1.0}
    if every > 1:
        parts["step with penalty"] = step_of(0)
        shares = {"step": 1 - 1 / every, "step with penalty": 1 / every}
    elif config.loss.r1 > 0:
        parts["step"] = step_of(0)
    contender = Contender(name, parts, {"precision": precision}, num_images)
    return Runner(contender, shares, "channels_last")


def peer_runner(name: str, *, size: int, num_images: int, precision: str, device: torch.device) -> Runner:
    """pix2pix or CycleGAN in the memory format that is the faster one for it, as one short trial says."""
    trials = {
        layout: _peer_step(name, layout, size=size, num_images=num_images, precision=precision, device=device)
        for layout in LAYOUTS
    }
    seconds = {}
    for layout, step in trials.items():
        step()
        seconds[layout] = timing.time_calls(step, device, 0.5).wall
    layout = min(seconds, key=lambda one: seconds[one])
    print(f"{name} {precision}: " + ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()), file=sys.stderr)
    contender = Contender(name, {"step": trials[layout]}, {"precision": precision}, num_images)
    return Runner(contender, {"step": 1.0}, layout)


def _peer_step(
    name: str, layout: str, *, size: int, num_images: int, precision: str, device: torch.device
) -> Callable[[], None]:
    step = PEERS[name](device, bf16=precision == "bf16", memory_format=LAYOUTS[layout])
    content, style = (
        timing.pictures(num_images, size).to(device=device, memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    return lambda: step(content, style)


# --- the page ----------------------------------------------------------------------------------------


def compared(runners: Sequence[Runner], turns: Sequence[Sequence[timing.Turn]]) -> list[dict]:
    """One row a contender: rates, and ratios to the peers of the same precision."""
    steps = {
        (runner.contender.name, runner.contender.setting["precision"]): runner.step_seconds(its)
        for runner, its in zip(runners, turns, strict=True)
    }
    rows = []
    for runner in runners:
        name, precision = runner.contender.name, runner.contender.setting["precision"]
        mine = steps[name, precision]
        per_second, per_core_second = timing.rates(mine, runner.contender.num_images)
        ratios = {f"times {peer}": timing.speedup(mine, steps[peer, precision]) for peer in PEERS}
        core_ratios = {
            f"times {peer} per core-second": timing.speedup(mine, steps[peer, precision], clock="cpu")
            for peer in PEERS
        }
        rows.append(
            {
                "name": name,
                "precision": precision,
                "layout": runner.layout,
                "images a second": per_second,
                "images a core-second": per_core_second,
                "seconds a step": Spread.of([one.wall for one in mine]),
                **ratios,
                **core_ratios,
            }
        )
    return rows


def verdicts(rows: Sequence[dict]) -> list[str]:
    """The project's goals, met or not, at each precision that was measured."""
    lines = []
    for name, goal in GOALS.items():
        for row in rows:
            if row["name"] == name:
                ratio: Spread = row["times cyclegan"]
                word = "met" if ratio.median >= goal else "NOT met"
                lines.append(
                    f"- `{name}` trains {goal:g} times as many images a second as CycleGAN, "
                    f"{row['precision']}: **{word}**, {ratio} times"
                )
    return lines


def page(facts: dict, options: dict, rows: Sequence[dict], left_out: dict[str, str]) -> str:
    header = ["", "precision", "layout", "s a step", "images/s", "× CycleGAN", "× pix2pix", "images/core-s"]
    header += ["× CycleGAN by core-s"]
    body = [
        [
            row["name"],
            row["precision"],
            row["layout"],
            row["seconds a step"],
            row["images a second"],
            row["times cyclegan"],
            row["times pix2pix"],
            row["images a core-second"],
            row["times cyclegan per core-second"],
        ]
        for row in rows
    ]
    lines = [
        "# Training speed",
        "",
        f"{options['size']}x{options['size']} px, batches of {options['batch']} content images, "
        f"{options['rounds']} interleaved rounds; median (lowest–highest). Ratios are to the same precision, "
        "round by round.",
        "",
        timing.table(header, body),
        "",
        "Goals:",
        "",
        *(verdicts(rows) or ["- no preset that a goal is set for was measured"]),
        "",
        "An image is a content image. A step of ours takes as many artworks beside; CycleGAN's as many "
        "pictures of its other domain; pix2pix's as many targets. Lazy R1 is in at its share of the steps. "
        "CycleGAN and pix2pix run in their faster memory format.",
        "",
    ]
    if left_out:
        lines += ["Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items()), ""]
    return "\n".join([*lines, timing.describe(facts), ""])


# --- the program -------------------------------------------------------------------------------------


def main() -> None:
    timing.keep_freed_memory()
    parser = timing.arguments(__doc__)
    parser.add_argument("--size", type=int, default=256, help="px")
    parser.add_argument("--batch", type=int, default=4, help="content images; an even number from 4 up")
    options = parser.parse_args()
    if options.batch < 4 or options.batch % WORKS_PER_CLASS:
        parser.error(
            f"--batch {options.batch}: give an even number from 4 up (two artists, two works of each)"
        )
    if options.size % 256:
        parser.error(f"--size {options.size}: give a multiple of 256, which pix2pix's U-Net needs")
    timing.seed_and_threads(options.threads)
    device = torch.device(options.device)
    facts = timing.machine(device)

    runners: list[Runner] = []
    left_out: dict[str, str] = {}
    for precision in options.precision.split(","):
        at = {"size": options.size, "num_images": options.batch, "precision": precision, "device": device}
        runners += [peer_runner(name, **at) for name in PEERS]
        for name in timing.chosen_presets(options.presets):
            try:
                runners.append(preset_runner(name, preset(name), **at))
            except (NotImplementedError, FileNotFoundError) as error:
                left_out[name] = f"{type(error).__name__}: {error}"
    turns = timing.run_rounds(
        [runner.contender for runner in runners], options.rounds, device, min_seconds=options.min_seconds
    )
    rows = compared(runners, turns)
    asked = {"size": options.size, "batch": options.batch, "rounds": options.rounds}
    figures = {
        "machine": facts,
        "options": asked,
        "rows": timing.as_json(rows),
        "rounds": {
            runner.contender.label: timing.as_json(its) for runner, its in zip(runners, turns, strict=True)
        },
        "left_out": left_out,
    }
    timing.write_results(options.out, "training_speed", figures, page(facts, asked, rows, left_out))


if __name__ == "__main__":
    main()
