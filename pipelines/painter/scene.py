"""A scene: what stands where, how light it is and which way a brush would follow it. It has no colours yet;
each manner brings its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# What a place of the picture can be. A palette names a ramp of colours for each.
ROLES = (
    "sky",
    "cloud",
    "light",  # the sun, the moon, lit windows and their reflections
    "far",  # distant hills, distant towers
    "green",  # grass, foliage
    "water",
    "earth",  # paths, trunks, table tops, sand
    "wall",
    "roof",
    "fruit",
    "cloth",  # vases, cloth, hulls
    "flower",
)
ROLE_INDEX = {name: index for index, name in enumerate(ROLES)}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """role: uint8 [H, W], index into ROLES. tone: float32 [H, W], 0 dark to 1 light. angle: float32 [H, W],
    radians, the direction of the brush (x to the right, y down). region: int32 [H, W], one number a shape."""

    role: np.ndarray
    tone: np.ndarray
    angle: np.ndarray
    region: np.ndarray


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], cells: float, *, octaves: int = 3, stretch: float = 1.0
) -> np.ndarray:
    """Cloudy noise, float32 [H, W], mean 0 and standard deviation 1. `cells` waves down the height;
    `stretch` > 1 draws it out sideways."""
    height, width = shape
    # Waves shorter than four pixels cannot be told apart: the sum is made small and enlarged once.
    finest = int(max(cells, 2) * 2 ** (octaves - 1))
    scale = max(min(height // (4 * finest), 8), 1)
    size = (width // scale, height // scale)
    total = np.zeros(size[::-1], np.float32)
    for octave in range(octaves):
        rows = max(int(cells * 2**octave), 2)
        columns = max(int(cells * 2**octave * width / height / stretch), 2)
        grid = rng.standard_normal((rows + 1, columns + 1)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)) / 2**octave
    total = (total - total.mean()) / (total.std() + 1e-6)
    if scale == 1:
        return total
    return np.asarray(Image.fromarray(total).resize((width, height), Image.Resampling.BILINEAR))


class Canvas:
    """A scene while it is being drawn, back to front. Lengths are in heights of the picture: v runs from 0
    (top) to 1 (bottom), u from 0 (left) to `aspect` (right)."""

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.shape = (height, width)
        self.aspect = width / height
        v, u = np.mgrid[0:height, 0:width].astype(np.float32) / height
        self.u, self.v = u, v
        self.light_from_left = bool(rng.random() < 0.5)
        self.role = np.zeros(self.shape, np.uint8)
        self.tone = np.full(self.shape, 0.5, np.float32)
        self.angle = np.zeros(self.shape, np.float32)
        self.region = np.zeros(self.shape, np.int32)
        self._num_regions = 0

    def noise(self, cells: float, *, octaves: int = 3, stretch: float = 1.0) -> np.ndarray:
        return smooth_noise(self.rng, self.shape, cells, octaves=octaves, stretch=stretch)

    def scene(self) -> Scene:
        return Scene(role=self.role, tone=np.clip(self.tone, 0.0, 1.0), angle=self.angle, region=self.region)

    def next_region(self) -> int:
        self._num_regions += 1
        return self._num_regions

    def fill(
        self,
        mask: np.ndarray,
        role: str,
        tone: np.ndarray | float,
        angle: np.ndarray | float,
        *,
        window: tuple[slice, slice] = (slice(None), slice(None)),
        region: int | None = None,
    ) -> None:
        """Paints one shape: `mask`, and `tone` and `angle` where they are arrays, are of the window's size.
        Without `region` it becomes a region of its own."""
        np.copyto(self.role[window], ROLE_INDEX[role], where=mask)
        np.copyto(self.tone[window], tone, where=mask)
        np.copyto(self.angle[window], angle, where=mask)
        np.copyto(self.region[window], self.next_region() if region is None else region, where=mask)

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice] | None:
        """The pixels of a box, or None where it lies outside of the picture."""
        height, width = self.shape
        x0, x1 = max(int(left * height) - 1, 0), min(int(right * height) + 2, width)
        y0, y1 = max(int(top * height) - 1, 0), min(int(bottom * height) + 2, height)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def ellipse(
        self,
        centre: tuple[float, float],
        radii: tuple[float, float],
        role: str,
        tone: tuple[float, float] = (0.2, 0.9),
        *,
        region: int | None = None,
        ragged: float = 0.0,
    ) -> None:
        """A ball lit from the side, the brush running round it. `ragged` frays the outline, 0 to 0.4."""
        (cu, cv), (ru, rv) = centre, radii
        reach = 1.0 + ragged
        window = self.window(cu - ru * reach, cv - rv * reach, cu + ru * reach, cv + rv * reach)
        if window is None:
            return
        x, y = (self.u[window] - cu) / ru, (self.v[window] - cv) / rv
        edge = 1.0
        if ragged:
            phases = self.rng.uniform(0, 2 * np.pi, 3)
            bearing = np.arctan2(y, x)
            for part, lobes, phase in zip((0.45, 0.22, 0.15), (5, 9, 14), phases, strict=True):
                edge = edge + ragged * part * np.sin(lobes * bearing + phase)
            edge = edge**2
        distance = x * x + y * y
        side = -1.0 if self.light_from_left else 1.0
        light = np.clip(0.55 + 0.42 * (side * x * 0.75 - y * 0.85) - 0.12 * distance, 0.0, 1.0)
        self.fill(
            distance < edge,
            role,
            tone[0] + (tone[1] - tone[0]) * light,
            np.arctan2(y * ru, x * rv) + np.pi / 2,
            window=window,
            region=region,
        )

    def polygon(
        self,
        points: Sequence[tuple[float, float]],
        role: str,
        tone: tuple[float, float] | float,
        angle: float,
        *,
        region: int | None = None,
    ) -> None:
        """A flat shape; with two tones it runs from the first (left) to the second (right)."""
        us, vs = zip(*points, strict=True)
        window = self.window(min(us), min(vs), max(us), max(vs))
        if window is None:
            return
        height, x0, y0 = self.shape[0], window[1].start, window[0].start
        size = (window[1].stop - x0, window[0].stop - y0)
        stencil = Image.new("L", size)
        ImageDraw.Draw(stencil).polygon([(u * height - x0, v * height - y0) for u, v in points], fill=255)
        if isinstance(tone, tuple):
            across = (self.u[window] - min(us)) / max(max(us) - min(us), 1e-6)
            shade: np.ndarray | float = tone[0] + (tone[1] - tone[0]) * np.clip(across, 0.0, 1.0)
        else:
            shade = tone
        self.fill(np.asarray(stencil) > 127, role, shade, angle, window=window, region=region)

    def ridge(self, base: float, roughness: float, *, waves: float = 2.0) -> np.ndarray:
        """The outline of a hill: v for each column, float32 [W]."""
        u = self.u[0]
        line = np.full(u.shape, base)
        for octave in range(5):
            frequency = waves * 2**octave * self.rng.uniform(1.6, 2.6)
            line += roughness / 1.9**octave * np.sin(u * frequency + self.rng.uniform(0, 2 * np.pi))
        return line.astype(np.float32)

    def lit_side(self, light: float, dark: float) -> tuple[float, float]:
        """Tones from left to right for a wall, a trunk or a vase."""
        return (light, dark) if self.light_from_left else (dark, light)
