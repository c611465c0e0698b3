"""The tools every manner shares: strokes that follow a field, contours, grain, relief. Lengths are pixels of
the working picture, which is twice the size of the finished one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pipelines.painter.scene import Scene, smooth_noise


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a manner gets: the scene, its colours in the manner's palette (float32 [H, W, 3], 0 to 1) and the
    source of every chance."""

    scene: Scene
    colour: np.ndarray
    rng: np.random.Generator

    @property
    def shape(self) -> tuple[int, int]:
        return self.scene.role.shape[0], self.scene.role.shape[1]

    def noise(self, cells: float, *, octaves: int = 3, stretch: float = 1.0) -> np.ndarray:
        """float32 [H, W], mean 0, standard deviation 1."""
        return smooth_noise(self.rng, self.shape, cells, octaves=octaves, stretch=stretch)


def scattered(rng: np.random.Generator, shape: tuple[int, int], spacing: float) -> np.ndarray:
    """Points about `spacing` apart all over the picture in random order, float32 [N, 2] as (x, y)."""
    height, width = shape
    y, x = np.mgrid[0 : height + spacing : spacing, 0 : width + spacing : spacing]
    points = np.stack([x.ravel(), y.ravel()], axis=1)
    points += rng.uniform(-0.6 * spacing, 0.6 * spacing, points.shape)
    points = np.clip(points, 0, (width - 1, height - 1)).astype(np.float32)
    return points[rng.permutation(len(points))]


def at(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The field's values at points [..., 2] (x, y); points outside take the border's value."""
    x = np.clip(points[..., 0], 0, field.shape[1] - 1).astype(np.intp)
    y = np.clip(points[..., 1], 0, field.shape[0] - 1).astype(np.intp)
    return field[y, x]


def follow(angle: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_steps: int = 4) -> np.ndarray:
    """Paths along the direction field through `starts` [N, 2], float32 [N, 2 * num_steps + 1, 2].

    Directions have no sign, so each step keeps to the side where the last one went."""
    step = (lengths / (2 * num_steps))[:, None]
    first = at(angle, starts)
    heading = np.stack([np.cos(first), np.sin(first)], axis=1)
    halves = []
    for sign in (-1.0, 1.0):
        here, direction, path = starts, sign * heading, []
        for _ in range(num_steps):
            here = here + step * direction
            path.append(here)
            local = at(angle, here)
            onward = np.stack([np.cos(local), np.sin(local)], axis=1)
            onward *= np.where((onward * direction).sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
            direction = onward
        halves.append(path)
    return np.stack([*halves[0][::-1], starts, *halves[1]], axis=1).astype(np.float32)


def straight(starts: np.ndarray, angles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Straight paths through `starts`, float32 [N, 2, 2]."""
    half = np.stack([np.cos(angles), np.sin(angles)], axis=1) * lengths[:, None] / 2
    return np.stack([starts - half, starts + half], axis=1).astype(np.float32)


def ribbons(paths: np.ndarray, widths: np.ndarray, *, taper: float = 0.6) -> np.ndarray:
    """Outlines of strokes of the given widths along paths [N, K, 2], float32 [N, 2K, 2]. `taper` 0 leaves the
    ends square, 1 brings them to a point."""
    along = np.gradient(paths, axis=1)
    along /= np.linalg.norm(along, axis=2, keepdims=True) + 1e-6
    normal = np.stack([-along[..., 1], along[..., 0]], axis=2)
    position = np.linspace(-1, 1, paths.shape[1])
    profile = (1 - taper * np.abs(position) ** 3).astype(np.float32)
    offset = normal * (widths[:, None] * profile / 2)[..., None]
    return np.concatenate([paths + offset, (paths - offset)[:, ::-1]], axis=1)


def fill_polygons(image: Image.Image, outlines: np.ndarray, values: np.ndarray) -> None:
    """Fills outlines [N, K, 2] one after another: `values` are float [N, 3] (0 to 1) on an RGB picture,
    [N] (0 to 1) on one of a single band."""
    polygon = ImageDraw.Draw(image).polygon
    corners = outlines.reshape(len(outlines), 2 * outlines.shape[1]).tolist()
    inks = to_bytes(values).tolist()
    for outline, ink in zip(corners, inks, strict=True):
        polygon(outline, fill=tuple(ink) if isinstance(ink, list) else ink)


def to_bytes(values: np.ndarray) -> np.ndarray:
    """0 to 1 -> uint8."""
    return (np.clip(values, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def to_image(values: np.ndarray) -> Image.Image:
    """float [H, W, 3] or [H, W], 0 to 1 -> a picture."""
    return Image.fromarray(to_bytes(values))


def to_field(image: Image.Image) -> np.ndarray:
    """A picture -> float32, 0 to 1."""
    return np.asarray(image, np.float32) / 255


def soften(field: np.ndarray, radius: int) -> np.ndarray:
    """A smooth blur of float32 [H, W], cheap for large radii: reduced by `radius`, enlarged again."""
    height, width = field.shape
    small = (max(width // radius, 2), max(height // radius, 2))
    reduced = Image.fromarray(field.astype(np.float32)).resize(small, Image.Resampling.BOX)
    return np.asarray(reduced.resize((width, height), Image.Resampling.BICUBIC))


def borders(labels: np.ndarray) -> np.ndarray:
    """bool [H, W]: where a label meets another one."""
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    return edge


def brush_lines(subject: Subject, labels: np.ndarray, *, width: float, wobble: float) -> np.ndarray:
    """Contours between labels drawn by hand, about `width` wide: float32 [H, W], 0 to 1. Their pressure comes
    and goes with `wobble`."""
    edge = Image.fromarray(borders(labels).astype(np.uint8) * 255)
    spread = width * 0.45
    ink = to_field(edge.filter(ImageFilter.GaussianBlur(spread))) * spread * 2.5
    pressure = 1 + wobble * subject.noise(7, octaves=2)
    return np.clip((ink * pressure - 0.5) * 2.5 + 0.5, 0.0, 1.0)


def grain(rng: np.random.Generator, shape: tuple[int, int], size: int) -> np.ndarray:
    """The tooth of paper or canvas: float32 [H, W], mean 0, standard deviation 1, specks of about `size`."""
    height, width = shape
    specks = rng.standard_normal((height // size + 1, width // size + 1)).astype(np.float32)
    field = np.asarray(Image.fromarray(specks).resize((width, height), Image.Resampling.BICUBIC))
    return field / field.std()


def relief(height_map: np.ndarray, strength: float) -> np.ndarray:
    """How light from the upper left falls on thick paint: float32 [H, W] about 1."""
    slope = np.zeros_like(height_map)
    slope[1:-1, 1:-1] = (
        height_map[2:, 1:-1] - height_map[:-2, 1:-1] + height_map[1:-1, 2:] - height_map[1:-1, :-2]
    )
    return 1 + np.clip(strength * slope, -0.45, 0.45)
