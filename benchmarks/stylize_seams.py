"""Tiled against untiled: the mean difference and what shows where tiles begin and end, on photographs of
three sizes in tiles of three sizes, and a picture of the worst case.

    python -m benchmarks.stylize_seams CHECKPOINT [CHECKPOINT ...]"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from benchmarks import timing
from nst.images import to_float, to_uint8
from nst.networks.blocks import record_statistics
from nst.rendering import OVERLAP
from nst.stylize import Stylizer
from nst.tiling import spans

TILE_SIDES = (384, 512, 640)
UNTILED = 2048  # px, a tile that holds any of the pictures
PICTURE_HEIGHT = 300  # px, of the worst case's four
MAGNIFIED = 16  # times, its difference


def photographs() -> dict[str, NDArray[np.uint8]]:
    """uint8 [H, W, 3] of three sizes."""
    resized = {
        "retina": (data.retina(), (1411, 1411)),
        "coffee": (data.coffee(), (1680, 1120)),
        "hubble": (data.hubble_deep_field(), (1300, 1134)),
    }
    return {
        name: np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
        for name, (pixels, size) in resized.items()
    }


def steepness(difference: NDArray[Any], tile_side: int, stride: int) -> float:
    """Of tiled minus untiled [H, W, 3]: how much steeper it is where tiles begin and end than in the median
    row or column; levels a px."""
    found = 0.0
    for pixels in (difference, difference.swapaxes(0, 1)):
        slopes = np.abs(np.diff(pixels, axis=0)).mean(axis=(1, 2))
        borders = {edge for span in spans(len(pixels), tile_side, OVERLAP, stride) for edge in span}
        at_borders = [slopes[edge - 1] for edge in borders if 0 < edge < len(pixels)]
        found = max([found, *(float(slope - np.median(slopes)) for slope in at_borders)])
    return found


def compare(stylizer: Stylizer, photo: NDArray[np.uint8], tile_side: int) -> dict[str, Any]:
    """Levels of 255; `thumbnail`: the mean difference if its statistics were taken for the picture's."""
    renderer, code = stylizer.renderer, stylizer.encode_style(load_sample_images().images[1])
    planes = to_float(photo)
    whole = renderer.render_in_tiles(planes, code, UNTILED)
    tiled = renderer.render_in_tiles(planes, code, tile_side)
    shrink = tile_side / np.sqrt(photo.shape[0] * photo.shape[1])
    size = round(photo.shape[1] * shrink), round(photo.shape[0] * shrink)
    small = np.array(Image.fromarray(photo).resize(size, Image.Resampling.BILINEAR))
    with record_statistics(stylizer.generator) as known:
        renderer.inference.draw(to_float(small)[None], code)
    simple = renderer.render_in_tiles(planes, code, tile_side, known)
    difference = (tiled - whole).permute(1, 2, 0).numpy() * 127.5
    return {
        "mean": float(np.abs(difference).mean()),
        "largest": float(np.abs(difference).max()),
        "steepness": steepness(difference, tile_side, stylizer.generator.stride),
        "thumbnail": float((simple - whole).abs().mean()) * 127.5,
        "pictures": [photo, to_uint8(whole), to_uint8(tiled)],
    }


def side_by_side(photo: Any, whole: Any, tiled: Any) -> Image.Image:
    """The content, its stylization untiled and tiled, and their difference magnified."""
    difference = np.abs(tiled.astype(int) - whole) * MAGNIFIED
    row = Image.fromarray(np.hstack([photo, whole, tiled, difference.clip(0, 255).astype(np.uint8)]))
    return row.resize((row.width * PICTURE_HEIGHT // row.height, PICTURE_HEIGHT), Image.Resampling.LANCZOS)


def page(facts: dict[str, Any], rows: list[dict[str, Any]], worst: dict[str, Any]) -> str:
    header = ["model", "photograph", "tile px", "mean difference", "largest", "steeper at borders by"]
    body = [
        [
            row["model"],
            f"{row['name']} {row['width']} x {row['height']}",
            str(row["tile_side"]),
            *(f"{row[key]:.2f}" for key in ("mean", "largest", "steepness")),
            f"{row['thumbnail']:.2f}",
        ]
        for row in rows
    ]
    verdict = "met" if worst["mean"] < 1 else "missed"
    lines = [
        "# Seams: tiled against untiled",
        "",
        f"Levels of 255; overlaps of {OVERLAP} px. *Steeper at borders by*: how much more the difference "
        "changes from one row or column to the next where a tile begins or ends than elsewhere, in levels a "
        "px. *Thumbnail alone*: the mean difference if tiles were normalised by a thumbnail's statistics.",
        "",
        timing.table([*header, "thumbnail alone"], body),
        "",
        f"Goal, less than 1 level on average: {verdict} ({worst['mean']:.2f} at worst). That case, "
        f"{worst['name']} in tiles of {worst['tile_side']} px: the content, untiled, tiled, and their "
        f"difference {MAGNIFIED} times magnified:",
        "",
        "![the worst case](stylize_seams.jpg)",
        "",
        timing.describe(facts),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoint folders")
    parser.add_argument("--out", type=Path, default=timing.RESULTS, help="folder for the results")
    options = parser.parse_args()
    rows = []
    pictures: dict[int, list[Any]] = {}
    for index, checkpoint in enumerate(options.checkpoints):
        stylizer = Stylizer.load(checkpoint, device="cpu")
        millions = sum(one.numel() for one in stylizer.generator.parameters()) / 1e6
        model = f"{index + 1}, {millions:.2f} M parameters"
        for (name, photo), tile_side in itertools.product(photographs().items(), TILE_SIDES):
            found = compare(stylizer, photo, tile_side)
            pictures[len(rows)] = found.pop("pictures")
            size = {"width": photo.shape[1], "height": photo.shape[0]}
            rows.append({"model": model, "name": name, **size, "tile_side": tile_side, **found})
            print(rows[-1], flush=True)
    worst = max(range(len(rows)), key=lambda index: rows[index]["mean"])
    facts = timing.machine(torch.device("cpu"))
    timing.write_results(
        options.out, "stylize_seams", {"machine": facts, "rows": rows}, page(facts, rows, rows[worst])
    )
    side_by_side(*pictures[worst]).save(options.out / "stylize_seams.jpg", quality=85)


if __name__ == "__main__":
    main()
