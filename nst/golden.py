"""Golden pairs: pictures, and what a model drew of them when it was new. Whoever loads the model later, with
another PyTorch or on another machine, draws them again and compares.

golden.json            options and checksums of the pairs, and the tolerance
NAME-content.png, NAME-style.png, NAME-stylized.png
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nst.images import ImageError, decode_image, encode_image
from nst.stylize import Stylizer

GOLDEN_FILE = "golden.json"
FORMAT_VERSION = 1
TOLERANCE = 0.25  # levels of 255; see `check_golden`
DRAWS_OTHERWISE = "the model does not draw on this machine what it drew when it was registered"
PARTS = ("content", "style", "stylized")
WAVELENGTHS = (64, 24, 10, 4)  # px

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class GoldenPair:
    """What is drawn. Sizes are (width, height) in px, none a multiple of a generator's stride."""

    name: str
    content_size: tuple[int, int]
    style_size: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)


PAIRS = (
    GoldenPair(name="plain", content_size=(83, 61), style_size=(50, 70)),
    GoldenPair(
        name="blended",
        content_size=(57, 90),
        style_size=(75, 75),
        options={"strength": 0.7, "colors": "content"},
    ),
    GoldenPair(name="reduced", content_size=(121, 77), style_size=(99, 41), options={"max_side": 70}),
)


def write_golden(stylizer: Stylizer, golden_dir: str | Path) -> None:
    """Draws the pairs, in fp32, and writes them into an existing folder."""
    folder, drawing = Path(golden_dir), Stylizer(stylizer.generator)
    pairs, sha256 = [], {}
    for index, pair in enumerate(PAIRS):
        content = textured_picture(2 * index, *pair.content_size)
        style = textured_picture(2 * index + 1, *pair.style_size)
        stylized = drawing(content, style, **pair.options)
        for part, pixels in zip(PARTS, (content, style, stylized), strict=True):
            file, data = f"{pair.name}-{part}.png", encode_image(pixels, None, "png")
            (folder / file).write_bytes(data)
            sha256[file] = hashlib.sha256(data).hexdigest()
        pairs.append({"name": pair.name, "options": pair.options})
    golden = {
        "format_version": FORMAT_VERSION,
        "tolerance": TOLERANCE,
        "pairs": pairs,
        "sha256": sha256,
        "drawn_with": {"torch": torch.__version__, "device": stylizer.device.type},
    }
    (folder / GOLDEN_FILE).write_text(json.dumps(golden, indent=2))


def check_golden(stylizer: Stylizer, golden_dir: str | Path) -> float:
    """Draws the pairs again, in fp32 whatever precision the stylizer has, and compares.

    What is compared is a pair's mean absolute difference, in levels of 255. Measured over trained and
    untrained models of all presets, the worst pair of each:

        CPU: other numbers of threads, memory formats, kernels, compiled     0.0000 to 0.0006
        products rounded to TF32, as GPUs may do (emulated)                  0.03 to 0.12
        the tolerance                                                        0.25
        weights with 1 % of noise                                            0.5 to 4.3
        bf16                                                                 0.24 to 1.3

    bf16 differs as much as a slightly damaged model, which is why fp32 is what is compared.

    Returns:
        The largest difference.

    Raises:
        OSError: a golden file is missing or altered, or a pair differs by more than the tolerance.
    """
    folder, golden, drawing = Path(golden_dir), read_golden(golden_dir), Stylizer(stylizer.generator)
    tolerance, largest = float(golden["tolerance"]), 0.0
    for pair in golden["pairs"]:
        name = pair["name"]
        content, style, expected = (
            _read_pixels(folder / f"{name}-{part}.png", golden["sha256"]) for part in PARTS
        )
        stylized = drawing(content, style, **pair["options"])
        if stylized.shape != expected.shape:
            raise OSError(
                f"{DRAWS_OTHERWISE}: golden pair {name!r} has {_size(stylized)} px, {_size(expected)} px then"
            )
        difference = float(np.abs(stylized.astype(int) - expected).mean())
        if not difference <= tolerance:
            raise OSError(
                f"{DRAWS_OTHERWISE}: golden pair {name!r} differs by {difference:.3g} levels of 255 on "
                f"average; the tolerance is {tolerance:g}"
            )
        largest = max(largest, difference)
    return largest


def read_golden(golden_dir: str | Path) -> dict[str, Any]:
    """What `golden.json` says. Raises OSError if it cannot be read or is of another format."""
    path = Path(golden_dir) / GOLDEN_FILE
    try:
        golden = json.loads(path.read_text())
        version = golden["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is cut or altered ({error})") from None
    if version != FORMAT_VERSION:
        raise OSError(f"{path} has format {version}; this version of nst reads {FORMAT_VERSION}")
    return golden


def golden_digest(golden_dir: str | Path) -> str:
    """sha256 of `golden.json`, which holds those of all its pictures. Raises OSError if there is none."""
    return hashlib.sha256((Path(golden_dir) / GOLDEN_FILE).read_bytes()).hexdigest()


def textured_picture(seed: int, width: int, height: int) -> Pixels:
    """uint8 [H, W, 3]: coloured waves of several lengths in random directions, with grain."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width][..., None]
    pixels = random.normal(0, 0.15, (height, width, 3))
    for wavelength in WAVELENGTHS:
        direction, phases = random.uniform(0, 2 * np.pi), random.uniform(0, 2 * np.pi, 3)
        along = rows * np.sin(direction) + columns * np.cos(direction)
        pixels += random.uniform(0.2, 0.8, 3) * np.sin(2 * np.pi * along / wavelength + phases)
    return (127.5 + 60 * pixels).clip(0, 255).astype(np.uint8)


def _read_pixels(path: Path, sha256: dict[str, str]) -> Pixels:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256.get(path.name):
        raise OSError(f"golden picture {path} was altered")
    try:
        return decode_image(data).rgb
    except ImageError as error:
        raise OSError(f"golden picture {path} cannot be read: {error}") from error


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
