"""The built-in model's gallery: eight photographs in eight paintings, as one picture.

    python -m benchmarks.builtin_gallery PAINTING... --out docs/gallery.jpg [--colors content]

The photographs are scikit-image's and scikit-learn's, free to be shown."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage import data
from sklearn.datasets import load_sample_images

from nst.builtin import builtin_checkpoint
from nst.stylize import Stylizer

DRAWN, SHOWN = 384, 112  # px: the side that is stylized, and that of a cell
GAP = 4


def photographs() -> list[Image.Image]:
    china, flower = load_sample_images().images
    found = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), china, flower]
    found += [data.stereo_motorcycle()[0], data.hubble_deep_field()]
    return [square(Image.fromarray(np.asarray(one))) for one in found]


def square(picture: Image.Image) -> Image.Image:
    return ImageOps.fit(picture.convert("RGB"), (DRAWN, DRAWN), Image.Resampling.LANCZOS)


def draw(stylizer: Stylizer, styles: list[Image.Image], colors: str) -> Image.Image:
    """Styles along the top, photographs down the left."""
    contents, step = photographs(), SHOWN + GAP
    sheet = Image.new("RGB", ((len(styles) + 1) * step - GAP, (len(contents) + 1) * step - GAP), "white")

    def put(picture: Image.Image, column: int, row: int) -> None:
        sheet.paste(picture.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS), (column * step, row * step))

    for column, style in enumerate(styles, 1):
        put(style, column, 0)
    for row, content in enumerate(contents, 1):
        put(content, 0, row)
        for column, style in enumerate(styles, 1):
            put(stylizer(content, style, colors=colors), column, row)
    return sheet


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paintings", nargs="+", type=Path)
    parser.add_argument("--model", default=builtin_checkpoint())
    parser.add_argument("--colors", choices=("style", "content"), default="style")
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    styles = [square(Image.open(path)) for path in options.paintings]
    sheet = draw(Stylizer.load(options.model, device="cpu"), styles, options.colors)
    sheet.save(options.out, quality=84, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
