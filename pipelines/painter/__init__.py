"""A small painter: pictures in eight manners, each with its own palette, stroke and texture, so that the demo
has paintings to learn from on a machine that has none. A picture is a function of (manner, seed, size)."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.painter.brushed import fauvism, impasto, nocturne, pointillism
from pipelines.painter.drawn import charcoal, cubism, watercolour, woodblock
from pipelines.painter.motifs import MOTIFS, draw_scene
from pipelines.painter.palettes import dye
from pipelines.painter.strokes import Subject

_PAINTERS: dict[str, Callable[[Subject], Image.Image]] = {
    "charcoal": charcoal,
    "cubism": cubism,
    "fauvism": fauvism,
    "impasto": impasto,
    "nocturne": nocturne,
    "pointillism": pointillism,
    "watercolour": watercolour,
    "woodblock": woodblock,
}

MANNERS: dict[str, str] = {
    name: " ".join((painter.__doc__ or "").split()) for name, painter in _PAINTERS.items()
}


def paint(manner: str, seed: int, *, size: tuple[int, int] = (384, 320)) -> np.ndarray:
    """One picture, uint8 [height, width, 3] sRGB; `size` is (width, height) in pixels.

    The motif follows from the seed: six seeds in a row show each motif once. Raises ValueError for a manner
    that is not in MANNERS and for a size below 64 x 64.
    """
    if manner not in _PAINTERS:
        raise ValueError(f"no manner {manner!r}; choose one of {', '.join(_PAINTERS)}")
    width, height = size
    if min(size) < 64:
        raise ValueError(f"{width} x {height} pixels are too few for a picture; take 64 x 64 or more")
    rng = np.random.default_rng([zlib.crc32(manner.encode()), seed])
    motif = list(MOTIFS)[seed % len(MOTIFS)]
    # Painted at twice the size and then reduced: PIL's polygons have hard edges.
    scene = draw_scene(rng, motif, 2 * width, 2 * height)
    subject = Subject(scene=scene, colour=dye(scene, manner, rng), rng=rng)
    return np.asarray(_PAINTERS[manner](subject).reduce(2))


def write_paintings(
    folder: str | Path, num_per_manner: int = 10, *, size: tuple[int, int] = (384, 320)
) -> list[Path]:
    """Writes FOLDER/<manner>/<nn>.jpg, `num_per_manner` pictures of each manner; returns their paths."""
    paths = []
    for manner in MANNERS:
        home = Path(folder) / manner
        home.mkdir(parents=True, exist_ok=True)
        for seed in range(num_per_manner):
            path = home / f"{seed:02d}.jpg"
            Image.fromarray(paint(manner, seed, size=size)).save(path, quality=95, subsampling=0)
            paths.append(path)
    return paths
