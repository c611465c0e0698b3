"""What the speed benchmarks share: one allocator setting for all, interleaved rounds, medians and spreads,
what the machine is, and the tables."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nst import allocator
from nst.presets import PRESETS

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RESULTS = Path(__file__).parent / "results"


def keep_freed_memory() -> None:
    """Starts this program once more with freed memory kept, unless it is, for all contenders and threads."""
    if any(os.environ.get(name) != value for name, value in allocator.ENVIRONMENT.items()):
        wanted = {**os.environ, **allocator.ENVIRONMENT}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


# --- measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """Something that is timed.

    Attributes:
        name: of the network or preset.
        parts: name -> what is timed for itself.
        setting: what else tells it apart, such as its precision.
        num_images: content images that one call works on.
    """

    name: str
    parts: Mapping[str, Callable[[], object]]
    setting: Mapping[str, str] = field(default_factory=dict)
    num_images: int = 1

    @property
    def label(self) -> str:
        return " ".join([self.name, *self.setting.values()])


@dataclass(frozen=True)
class Seconds:
    """Mean seconds of a call: by the clock, and of CPU time summed over this process' threads."""

    wall: float
    cpu: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, share: float) -> Seconds:
        return Seconds(self.wall * share, self.cpu * share)


Turn = dict[str, Seconds]  # part -> its seconds in one round


def pictures(num: int, size: int) -> Tensor:
    """[num, 3, size, size] in [-1, 1]; smooth with some grain, as photographs are."""
    coarse = torch.rand(num, 3, size // 16, size // 16) * 2 - 1
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic")
    return (smooth + 0.1 * torch.randn(num, 3, size, size)).clamp(-1, 1)


def time_calls(call: Callable[[], object], device: torch.device, min_seconds: float) -> Seconds:
    """Calls until `min_seconds` have passed. The first call is left out, because the contender before it has
    emptied the caches, unless it took that long alone."""
    first = _time_once(call, device)
    if first.wall >= min_seconds:
        return first
    total, num_calls = Seconds(0, 0), 0
    while total.wall < min_seconds:
        total, num_calls = total + _time_once(call, device), num_calls + 1
    return total * (1 / num_calls)


def _time_once(call: Callable[[], object], device: torch.device) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def run_rounds(
    contenders: Sequence[Contender],
    num_rounds: int,
    device: torch.device,
    *,
    min_seconds: float = 1.0,
    num_warmups: int = 2,
) -> list[list[Turn]]:
    """Every contender once a round, in turn, every second round backwards: what else the machine does and how
    warm it is then falls on all alike.

    Returns:
        For each contender a turn a round.
    """
    for contender in contenders:
        _say(f"warm-up: {contender.label}")
        for call in contender.parts.values():
            for _ in range(num_warmups):
                _time_once(call, device)
    turns: list[list[Turn]] = [[] for _ in contenders]
    for number in range(num_rounds):
        places = range(len(contenders))
        for place in reversed(places) if number % 2 else places:
            parts = contenders[place].parts.items()
            turns[place].append({name: time_calls(call, device, min_seconds) for name, call in parts})
        _say(f"round {number + 1} of {num_rounds} done")
    return turns


@dataclass(frozen=True)
class Spread:
    """Median of the rounds with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def rates(seconds: Sequence[Seconds], num_images: int) -> tuple[Spread, Spread]:
    """Images a second, and a CPU second, over the rounds."""
    return (
        Spread.of([num_images / one.wall for one in seconds]),
        Spread.of([num_images / one.cpu for one in seconds]),
    )


def speedup(mine: Sequence[Seconds], theirs: Sequence[Seconds], *, clock: str = "wall") -> Spread:
    """How many times as fast as `theirs` for the same number of images, round by round."""
    return Spread.of(
        [getattr(them, clock) / getattr(me, clock) for me, them in zip(mine, theirs, strict=True)]
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --- the machine, and the tables ---------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpu = _cpu_info()
    described = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": sorted(
            flag for flag in cpu.get("flags", "").split() if flag.startswith(("amx", "avx512", "avx2"))
        ),
        "cores": _num_cores(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": {name: os.environ.get(name, "") for name in allocator.ENVIRONMENT},
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def _cpu_info() -> dict[str, str]:
    """Of the first core, as Linux tells it; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(facts: Mapping[str, Any]) -> str:
    """The machine as a list in Markdown."""
    allocator = " ".join(f"{name}={value}" for name, value in facts["allocator"].items())
    lines = [
        f"- {facts['date']}: `{facts['command']}`",
        f"- {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads used, load at the start "
        f"{facts['load_at_start']}",
        f"- of its instructions: {' '.join(facts['cpu_flags']) or 'none of interest'}",
        f"- torch {facts['torch']}, Python {facts['python']}, allocator `{allocator}`",
    ]
    if "gpu" in facts:
        lines.insert(2, f"- {facts['gpu']}")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; the first column stands left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_json(value: Any) -> Any:
    """Lists and dictionaries with this module's dataclasses in them, as JSON holds them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, list | tuple) else value


def write_results(folder: Path, name: str, figures: Mapping[str, Any], page: str) -> None:
    """`name`.json and `name`.md; the page is shown too."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    (folder / f"{name}.md").write_text(page)
    print(page)


# --- the command line --------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--presets", default="", help="comma-separated; all there are, but for smoke, if left out"
    )
    parser.add_argument("--precision", default="fp32,bf16", help="fp32, bf16, or both separated by a comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_num_cores(), help="the same for every contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="of a contender's turn in a round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser


def chosen_presets(text: str) -> list[str]:
    """Names from a comma-separated list; all presets but smoke, which is for tests, if it is empty."""
    return text.split(",") if text else [name for name in PRESETS if name != "smoke"]


def seed_and_threads(num_threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(num_threads)
