"""Peak memory of stylizing one picture, from the bytes of a JPEG to those of the result, against its size: as
`nst stylize` does it, and with the whole picture in one pass.

    python -m benchmarks.stylize_memory

Each figure is of a process of its own, which does nothing else; weights are random."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import timing
from benchmarks.scale import status_bytes
from nst.allocator import keep_freed_memory
from nst.checkpoint import CONFIG_FILE, FORMAT_VERSION, MODEL_FILE
from nst.config import to_dict
from nst.networks.build import build_generator
from nst.presets import preset
from nst.rendering import TILE_SIDE

SIZES = ((512, 512), (1024, 768), (2048, 1536), (4000, 3000), (12_000, 9_000))  # width, height
LARGEST_UNTILED = 2048 * 1536  # px
GOAL = (12_000, 9_000), 2e9  # size, bytes
SECONDS = 3600  # a process' limit


def write_model(folder: Path, name: str) -> None:
    """A checkpoint's inference half, with random weights."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = preset(name)
    save_file(build_generator(config.model).state_dict(), folder / MODEL_FILE)
    text = json.dumps({"format_version": FORMAT_VERSION, "config": to_dict(config)})
    (folder / CONFIG_FILE).write_text(text)


def write_picture(path: Path, size: tuple[int, int]) -> None:
    """Waves and grain: what is in it does not matter for memory."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (size[1] // 64 + 1, size[0] // 64 + 1, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def measure(picture: str, model_dir: str, precision: str, mode: str, threads: int) -> dict[str, Any]:
    """In this process: bytes at the peak, and those before the first picture is read."""
    from pipelines.stylize_worker import StylizeSettings, render, stylizer_of

    keep_freed_memory()  # as a worker does
    torch.set_num_threads(threads)
    stylizer = stylizer_of(model_dir, StylizeSettings(precision=precision))
    if mode == "untiled":
        stylizer.renderer.tile_side = 1 << 20
    small = np.zeros((64, 64, 3), np.uint8)
    code = stylizer.encode_style(small)
    stylizer(small, code)
    before = status_bytes("VmHWM")
    render(Path(picture).read_bytes(), stylizer, code, StylizeSettings(precision=precision))
    return {"bytes_before": before, "peak_bytes": status_bytes("VmHWM")}


def measured_apart(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.stylize_memory", "--one", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def page(facts: dict[str, Any], name: str, precision: str, rows: list[dict[str, Any]]) -> str:
    by_size: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        by_size.setdefault((row["width"], row["height"]), {})[row["mode"]] = row
    header = ["px", "megapixels", "RGB array MB", "tiled MB", "untiled MB", "before MB"]
    body = [
        [
            f"{width} x {height}",
            f"{width * height / 1e6:.1f}",
            f"{width * height * 3 / 1e6:.0f}",
            f"{found['tiled']['peak_bytes'] / 1e6:.0f}",
            f"{found['untiled']['peak_bytes'] / 1e6:.0f}" if "untiled" in found else "-",
            f"{found['tiled']['bytes_before'] / 1e6:.0f}",
        ]
        for (width, height), found in by_size.items()
    ]
    lines = [
        "# Memory of stylizing one picture",
        "",
        f"Preset `{name}` in {precision}, from a JPEG's bytes to those of the result. Peak resident memory "
        "of the whole process; *before*: with libraries and model loaded and a picture of 64 px drawn. "
        "*Tiled* is what `nst stylize` does: up to 1152² px in one pass, larger ones in tiles of "
        f"{TILE_SIDE} px. What grows with the picture is the picture: its array, its result, and one of both "
        "as Pillow holds it, 4 bytes a pixel.",
        "",
        timing.table(header, body),
        "",
    ]
    goal_size, goal_bytes = GOAL
    if goal_size in by_size:
        peak = by_size[goal_size]["tiled"]["peak_bytes"]
        verdict = "met" if peak < goal_bytes else "missed"
        lines += [
            f"Goal, {goal_size[0]} x {goal_size[1]} px in less than {goal_bytes / 1e9:g} GB: {verdict} "
            f"({peak / 1e9:.2f} GB).",
            "",
        ]
    return "\n".join([*lines, timing.describe(facts), ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--sizes", default=",".join(f"{width}x{height}" for width, height in SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for the results")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        picture, model_dir, precision, mode, threads = options.one
        print(json.dumps(measure(picture, model_dir, precision, mode, int(threads))))
        return
    facts = timing.machine(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="nst-memory-") as folder:
        write_model(Path(folder), options.preset)
        for width, height in (map(int, text.split("x")) for text in options.sizes.split(",")):
            size = width, height
            picture = Path(folder, "picture.jpg")
            write_picture(picture, size)
            modes = ["tiled", "untiled"] if size[0] * size[1] <= LARGEST_UNTILED else ["tiled"]
            for mode in modes:
                figures = measured_apart(str(picture), folder, options.precision, mode, str(options.threads))
                rows.append({"width": size[0], "height": size[1], "mode": mode, **figures})
                print(rows[-1], file=sys.stderr, flush=True)
    figures = {"machine": facts, "preset": options.preset, "precision": options.precision, "rows": rows}
    timing.write_results(
        options.out, "stylize_memory", figures, page(facts, options.preset, options.precision, rows)
    )


if __name__ == "__main__":
    main()
