"""Stylizing speed: images a second of every preset beside MicroAST and AdaIN, in one run.

    python -m benchmarks.inference_speed --rounds 5

One picture at a time, the network alone: reading and writing pictures are the same for all. The style is
timed apart from the drawing, which gives both figures: encoded for each picture, and encoded once."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, timing
from benchmarks.timing import LAYOUTS, Contender, Seconds, Spread, Turn
from nst.networks.build import build_generator
from nst.presets import preset

PEERS: dict[str, Callable[[], nn.Module]] = {"microast": peers.MicroAst, "adain": peers.AdaIn}
REFERENCE = "microast"
GOAL = ("micro", "bf16", 512, 1.5)  # preset, precision, px, times MicroAST
PEAK = "convolution peak"
PEAK_SHAPE = (4, 128, 64, 64)  # of the input of the 3x3 convolution that stands for what the machine can do

Setting = dict[str, str]


# --- the contenders ----------------------------------------------------------------------------------


def build(name: str) -> Any:
    """A preset's generator or a peer, with random weights: `encode_style`, and a call to draw."""
    network = PEERS[name]() if name in PEERS else build_generator(preset(name).model)
    return network.eval().requires_grad_(False)


def contender(
    name: str, network: Any, *, size: int, precision: str, layout: str, mode: str, device: torch.device
) -> Contender:
    """`network`, which must be in `layout`, with a part for the style and one for the drawing.

    Args:
        mode: `eager`, or `compiled` by torch.compile for this one size.
    """
    content, style = (
        timing.pictures(1, size).to(device=device, memory_format=LAYOUTS[layout]) for _ in range(2)
    )
    encode, draw = network.encode_style, network.forward
    if mode == "compiled":
        encode, draw = (torch.compile(call, fullgraph=True, dynamic=False) for call in (encode, draw))

    def stylizing(call: Callable[..., Any], *inputs: Any) -> Any:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return call(*inputs)

    code = stylizing(encode, style)
    stylizing(draw, content, code)
    parts = {"style": lambda: stylizing(encode, style), "draw": lambda: stylizing(draw, content, code)}
    setting = {"size": str(size), "precision": precision, "layout": layout, "mode": mode}
    return Contender(name, parts, setting)


def peak_contender(precision: str, device: torch.device) -> Contender:
    """A convolution of 3x3 that suits every processor: `PEAK_SHAPE`, 128 channels out, channels last."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    features = torch.randn(PEAK_SHAPE).to(device, dtype, memory_format=torch.channels_last)
    weight = torch.randn(128, PEAK_SHAPE[1], 3, 3).to(device, dtype, memory_format=torch.channels_last)

    def convolve() -> None:
        with torch.inference_mode():
            F.conv2d(features, weight, padding=1)

    return Contender(PEAK, {"draw": convolve}, {"precision": precision})


def count_gmacs(network: Any, size: int) -> dict[str, float]:
    """Multiply-accumulates of convolutions and matrix products in thousand millions, for each part."""
    picture = torch.zeros(1, 3, size, size, device=next(network.parameters()).device)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as style:
            code = network.encode_style(picture)
        with FlopCounterMode(display=False) as draw:
            network(picture, code)
    return {"style": style.get_total_flops() / 2e9, "draw": draw.get_total_flops() / 2e9}


# --- the page ----------------------------------------------------------------------------------------


class Results:
    """What was measured, and the figures that the page is made of.

    Attributes:
        turns: (name, *setting) of a contender -> its turn in each round.
        gmacs: (name, px) -> of each part.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        turns: Sequence[list[Turn]],
        gmacs: Mapping[tuple[str, int], dict[str, float]],
    ) -> None:
        self.contenders = contenders
        self.turns = {one.label: its for one, its in zip(contenders, turns, strict=True)}
        self.gmacs = gmacs

    def seconds(self, one: Contender, *, once: bool) -> list[Seconds]:
        """A picture's seconds in each round; `once`: the style was encoded before."""
        return [turn["draw"] if once else turn["style"] + turn["draw"] for turn in self.turns[one.label]]

    def of(self, **wanted: str) -> list[Contender]:
        """The contenders with that name or setting."""
        return [
            one
            for one in self.contenders
            if all({"name": one.name, **one.setting}.get(key) == value for key, value in wanted.items())
        ]

    def fastest(self, contenders: Sequence[Contender], *, once: bool) -> Contender:
        return min(
            contenders, key=lambda one: Spread.of([s.wall for s in self.seconds(one, once=once)]).median
        )

    def peak(self, precision: str) -> Spread:
        """GFLOP a second of the convolution that stands for what the machine can do."""
        (one,) = self.of(name=PEAK, precision=precision)
        flop = 2 * 9 * 128 * torch.Size(PEAK_SHAPE).numel()
        return Spread.of([flop / seconds.wall / 1e9 for seconds in self.seconds(one, once=True)])

    def row(self, one: Contender) -> dict[str, Any]:
        size = one.setting["size"]
        as_published = self.of(name=REFERENCE, size=size, precision="fp32", mode="eager")
        anyhow = self.of(name=REFERENCE, size=size)
        row: dict[str, Any] = {"name": one.name, **one.setting}
        for once in (False, True):
            mine = self.seconds(one, once=once)
            when = "style once" if once else "style each time"
            row[f"images a second, {when}"], row[f"images a core-second, {when}"] = timing.rates(mine, 1)
            for title, reference in (("MicroAST fp32", as_published), ("MicroAST at its fastest", anyhow)):
                if reference:
                    theirs = self.seconds(self.fastest(reference, once=once), once=once)
                    for clock, suffix in (("wall", ""), ("cpu", " by core-seconds")):
                        row[f"times {title}, {when}{suffix}"] = timing.speedup(mine, theirs, clock=clock)
        gmacs = sum(self.gmacs[one.name, int(size)].values())
        seconds = Spread.of([part.wall for part in self.seconds(one, once=False)]).median
        row["GMAC"] = gmacs
        row["share of the peak"] = 2 * gmacs / seconds / self.peak(one.setting["precision"]).median
        return row

    def rows(self) -> list[dict[str, Any]]:
        return [self.row(one) for one in self.contenders if one.name != PEAK]


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The project's goal against MicroAST as published and at its fastest, style encoded each time and once,
    for the fastest setting of ours in that precision, without and with torch.compile."""
    name, precision, size, goal = GOAL
    lines = []
    for modes, reference in (
        (("eager",), "MicroAST fp32"),
        (("eager", "compiled"), "MicroAST at its fastest"),
    ):
        for when in ("style each time", "style once"):
            column = f"times {reference}, {when}"
            ours = [
                row
                for row in rows
                if (row["name"], row["precision"], row["size"]) == (name, precision, str(size))
                and row["mode"] in modes
                and column in row
            ]
            if ours:
                best = max(ours, key=lambda row: row[column].median)
                word = "met" if best[column].median >= goal else "NOT met"
                lines.append(
                    f"- `{name}` in {precision} at {size} px is {goal:g} times as fast as {reference}, "
                    f"{when}: **{word}**, {best[column]} times ({best['layout']}, {best['mode']})"
                )
    return lines


def page(
    facts: dict, rounds: int, results: Results, rows: Sequence[dict], left_out: Mapping[str, str]
) -> str:
    precisions = sorted({one.setting["precision"] for one in results.contenders}, reverse=True)
    peaks = "; ".join(f"{precision} {results.peak(precision)}" for precision in precisions)
    lines = [
        "# Stylizing speed",
        "",
        f"One picture at a time, {rounds} interleaved rounds; median (lowest–highest). Ratios are round by "
        "round.",
        "*each*: content and style encoded for every picture; *once*: the style encoded before. Reference: "
        "MicroAST in fp32, not compiled, as published, in its faster memory format; and MicroAST in whatever "
        "setting was fastest. *Peak* is the share of the convolution peak below, *each*.",
    ]
    for size in sorted({row["size"] for row in rows}, key=int):
        header = ["", "precision", "layout", "mode", "GMAC", "images/s each", "images/s once"]
        header += ["× MicroAST fp32 each", "once", "× MicroAST's fastest each", "once", "peak"]
        body = [
            [
                row["name"],
                row["precision"],
                row["layout"],
                row["mode"],
                f"{row['GMAC']:.3g}",
                row["images a second, style each time"],
                row["images a second, style once"],
                *(
                    row.get(f"times {reference}, {when}", "–")
                    for reference in ("MicroAST fp32", "MicroAST at its fastest")
                    for when in ("style each time", "style once")
                ),
                f"{row['share of the peak']:.1%}",
            ]
            for row in rows
            if row["size"] == size
        ]
        lines += ["", f"## {size}x{size} px", "", timing.table(header, body)]
    lines += [
        "",
        "## Goals",
        "",
        *(verdicts(rows) or ["- the goal's preset, precision and size were not measured"]),
        "",
        f"The machine's convolution peak (3x3, 128 to 128 channels, {PEAK_SHAPE[0]} maps of 64x64): {peaks} "
        "GFLOP/s.",
        "",
    ]
    if left_out:
        lines += ["Left out:", "", *(f"- {name}: {why}" for name, why in left_out.items()), ""]
    return "\n".join([*lines, timing.describe(facts), ""])


# --- the program -------------------------------------------------------------------------------------


def main() -> None:
    timing.keep_freed_memory()
    parser = timing.arguments(__doc__)
    parser.set_defaults(min_seconds=0.3)
    parser.add_argument("--sizes", default="256,512", help="px, separated by commas")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes long")
    options = parser.parse_args()
    timing.seed_and_threads(options.threads)
    device = torch.device(options.device)
    facts = timing.machine(device)
    # one code object a class serves many presets, sizes and precisions
    torch._dynamo.config.recompile_limit = 1000  # pyright: ignore[reportPrivateImportUsage]

    precisions = options.precision.split(",")
    contenders = [peak_contender(precision, device) for precision in precisions]
    gmacs: dict[tuple[str, int], dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for name in [*PEERS, *timing.chosen_presets(options.presets)]:
        try:
            networks = {layout: build(name).to(device, memory_format=LAYOUTS[layout]) for layout in LAYOUTS}
        except NotImplementedError as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        for size in map(int, options.sizes.split(",")):
            gmacs[name, size] = count_gmacs(networks["contiguous"], size)
            for precision, layout, mode in itertools.product(precisions, LAYOUTS, ("eager", "compiled")):
                if mode == "compiled" and (options.no_compile or layout != "channels_last"):
                    continue
                try:
                    made = contender(
                        name,
                        networks[layout],
                        size=size,
                        precision=precision,
                        layout=layout,
                        mode=mode,
                        device=device,
                    )
                except Exception as error:
                    if mode != "compiled":
                        raise
                    left_out[f"{name} {size} {precision} compiled"] = str(error).strip().splitlines()[0]
                else:
                    contenders.append(made)
    turns = timing.run_rounds(contenders, options.rounds, device, min_seconds=options.min_seconds)
    results = Results(contenders, turns, gmacs)
    rows = results.rows()
    figures = {
        "machine": facts,
        "options": {"rounds": options.rounds, "peak_shape": PEAK_SHAPE},
        "peak_gflops": {precision: dataclasses.asdict(results.peak(precision)) for precision in precisions},
        "rows": timing.as_json(rows),
        "rounds": timing.as_json(results.turns),
        "left_out": left_out,
    }
    timing.write_results(
        options.out, "inference_speed", figures, page(facts, options.rounds, results, rows, left_out)
    )
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
