"""The motifs: hills, sea, still life, mountain lake, grove, city at night. Each draws itself on a canvas,
back to front."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipelines.painter.props import (
    bouquet,
    clouds,
    cypress,
    fruit_pile,
    house,
    pine,
    placed,
    round_tree,
    sailing_boat,
    sky,
    sun,
    tower,
)
from pipelines.painter.scene import ROLE_INDEX, Canvas, Scene


def hills(canvas: Canvas) -> None:
    """Rolling fields under a wide sky: a path, a few houses, trees."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    horizon = rng.uniform(0.38, 0.5)
    centre = (rng.uniform(0.2, 0.8) * canvas.aspect, horizon - rng.uniform(0.12, 0.28))
    sky(canvas, horizon, centre)
    sun(canvas, centre, rng.uniform(0.05, 0.085))
    clouds(canvas, horizon * 0.8, amount=rng.uniform(0.05, 0.22))
    layers = 4
    for layer in range(layers):
        near = layer / (layers - 1)
        base = horizon + 0.02 + (0.82 - horizon) * near**1.25
        line = canvas.ridge(base, 0.022 + 0.022 * near, waves=1.6 - 0.5 * near)
        below = v - line[None, :]
        slope = np.gradient(line) * canvas.shape[0]
        role = "far" if layer == 0 else ("green", "earth", "green")[(layer + int(rng.random() < 0.3)) % 3]
        furrows = np.sin((u * rng.uniform(-1, 1) + below * (2.2 - near)) * (58 - 30 * near))
        tone = 0.72 - 0.9 * below + 0.1 * furrows * near + 0.12 * np.sign(slope)[None, :] * 0.5
        tilt = np.arctan(slope)[None, :] + below * rng.uniform(-1.5, 1.5)
        canvas.fill(below > 0, role, tone, tilt)
        if layer == 1:
            for spot in rng.uniform(0.1, 0.9, rng.integers(2, 5)) * canvas.aspect:
                foot = line[int(np.clip(spot * canvas.shape[0], 0, line.size - 1))] + 0.03
                house(canvas, (spot, foot), rng.uniform(0.06, 0.1))
        if layer in (1, 2):
            for spot in rng.uniform(0.0, 1.0, rng.integers(3, 6)) * canvas.aspect:
                foot = line[int(np.clip(spot * canvas.shape[0], 0, line.size - 1))] + 0.04
                round_tree(canvas, (spot, foot), rng.uniform(0.07, 0.1) * (1 + near))
    winding_path(canvas, horizon + 0.16, rng.uniform(0.25, 0.75) * canvas.aspect)
    side = 0.1 if centre[0] > canvas.aspect / 2 else canvas.aspect - 0.12
    for step in range(int(rng.integers(1, 4))):
        offset = step * rng.uniform(0.1, 0.17) * (1 if side < 0.5 else -1)
        cypress(canvas, (side + offset, 1.02 - 0.05 * step), rng.uniform(0.5, 0.8) * (1 - 0.18 * step))


def winding_path(canvas: Canvas, top: float, end: float) -> None:
    steps = np.linspace(0, 1, 24)
    start = canvas.rng.uniform(0.3, 0.7) * canvas.aspect
    middle = end + (start - end) * steps + 0.1 * np.sin(steps * canvas.rng.uniform(4, 7)) * (0.3 + steps)
    half = 0.004 + 0.09 * steps**1.8
    down = top + (1.03 - top) * steps**1.2
    edge = list(zip(middle - half, down, strict=True)) + list(zip(middle + half, down, strict=True))[::-1]
    canvas.polygon([(float(a), float(b)) for a, b in edge], "earth", 0.86, np.pi / 2.3)


def sea(canvas: Canvas) -> None:
    """Open water with boats, a headland, the sun and its glitter."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    horizon = rng.uniform(0.4, 0.52)
    centre = (rng.uniform(0.25, 0.75) * canvas.aspect, horizon - rng.uniform(0.06, 0.2))
    sky(canvas, horizon, centre)
    sun(canvas, centre, rng.uniform(0.05, 0.085))
    clouds(canvas, horizon * 0.85, amount=rng.uniform(0.15, 0.35))
    left = centre[0] > canvas.aspect / 2
    for layer in range(2):
        reach = canvas.ridge(horizon - 0.05 - 0.03 * layer, 0.02, waves=3)
        slope = (u[0] if left else canvas.aspect - u[0]) * (0.22 + 0.2 * layer)
        land = (v > (reach + slope)[None, :]) & (v < horizon)
        canvas.fill(land, "far", 0.65 - 0.25 * layer, 0.2 if left else -0.2)
    depth = np.clip((v - horizon) / (1 - horizon), 0, 1)
    swell = np.sin(np.clip(v - horizon, 0, 1) ** 0.7 * 75 + canvas.noise(3, stretch=3) * 1.6)
    tone = 0.62 - 0.3 * depth + 0.16 * swell * (0.4 + depth) + 0.05 * canvas.noise(16, octaves=1, stretch=5)
    canvas.fill(v >= horizon, "water", tone, 0.12 * canvas.noise(4, octaves=2, stretch=3))
    spread = (0.03 + 0.16 * depth) * (0.6 + 0.5 * canvas.noise(22, octaves=1, stretch=6))
    glitter = (np.abs(u - centre[0]) < spread) & (swell > -0.1)
    canvas.fill(glitter & (v > horizon + 0.01), "light", 0.85 - 0.3 * depth, 0.0)
    for _ in range(int(rng.integers(2, 5))):
        near = rng.uniform(0.05, 0.65)
        spot = (rng.uniform(0.1, 0.9) * canvas.aspect, horizon + 0.02 + near * (0.8 - horizon))
        sailing_boat(canvas, spot, 0.09 + 0.26 * near)
    shore(canvas, left=not left)


def shore(canvas: Canvas, *, left: bool) -> None:
    """A spit of sand or rock in the near corner."""
    u = canvas.u[0] if left else canvas.aspect - canvas.u[0]
    line = 0.86 + 0.3 * u + canvas.ridge(0.0, 0.012, waves=5)
    below = canvas.v - line[None, :]
    canvas.fill((below > -0.025) & (below <= 0), "cloud", 0.9, 0.3 if left else -0.3)
    canvas.fill(below > 0, "earth", 0.75 - 1.2 * below + 0.08 * canvas.noise(12), 0.3 if left else -0.3)


def still_life(canvas: Canvas) -> None:
    """A table by a wall: a vase of flowers, fruit, a folded cloth."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    edge = rng.uniform(0.6, 0.68)
    side = 1.0 if canvas.light_from_left else -1.0
    glow = 0.72 - 0.35 * side * (u / canvas.aspect - 0.5) * 2 - 0.25 * v + 0.07 * canvas.noise(3)
    canvas.fill(v < 2, "wall", glow, 0.9 + 0.5 * canvas.noise(2, octaves=1))
    split = rng.uniform(0.62, 0.8) * canvas.aspect if side > 0 else rng.uniform(0.2, 0.38) * canvas.aspect
    drape = (u - split) * side + 0.02 * np.sin(v * 9)
    folds = np.sin((u + 0.05 * np.sin(v * 5)) * 45)
    canvas.fill(drape > 0, "cloth", 0.42 + 0.22 * folds, np.pi / 2 + 0.1 * folds)
    tilt = rng.uniform(-0.05, 0.05)
    table = v - edge - tilt * (u - canvas.aspect / 2)
    canvas.fill(table > 0, "earth", 0.7 - 0.5 * table + 0.05 * np.sin(v * 90 + canvas.noise(3) * 2), tilt)
    middle = rng.uniform(0.4, 0.6) * canvas.aspect
    cloth_left = middle - side * 0.2
    drop = edge + 0.12 + 0.07 * np.sin(u * 7 + rng.uniform(0, 6)) + 0.8 * np.abs(u - cloth_left) ** 2
    cloth = (v > drop) & (np.abs(u - cloth_left) < 0.42 + 0.1 * np.sin(v * 13))
    creases = np.sin(u * 21 + v * 14 * side + canvas.noise(2) * 1.2)
    canvas.fill(cloth, "cloud", 0.72 + 0.26 * creases, np.pi / 2 - 0.5 * side)
    vase_height = rng.uniform(0.3, 0.38)
    foot = edge + rng.uniform(0.1, 0.16)
    canvas.ellipse((middle + side * 0.16, foot), (0.2, 0.035), "earth", (0.05, 0.2))
    bouquet(canvas, (middle, foot - vase_height), rng.uniform(0.2, 0.27))
    vase(canvas, (middle, foot), vase_height)
    fruit_pile(canvas, (middle - side * rng.uniform(0.3, 0.4), edge + 0.2), int(rng.integers(3, 6)))
    fruit_pile(canvas, (middle + side * rng.uniform(0.3, 0.42), edge + 0.24), int(rng.integers(1, 4)))


def vase(canvas: Canvas, foot: tuple[float, float], height: float) -> None:
    steps = np.linspace(0, 1, 26)
    belly = canvas.rng.uniform(0.09, 0.13)
    half = belly * (0.5 + 0.62 * np.sin(np.pi * (0.12 + 0.8 * steps)) ** 2) - 0.035 * (steps > 0.86)
    left = [(float(foot[0] - h), float(foot[1] - height * s)) for h, s in zip(half, steps, strict=True)]
    right = [(float(foot[0] + h), float(foot[1] - height * s)) for h, s in zip(half, steps, strict=True)]
    canvas.polygon(left + right[::-1], "cloth", canvas.lit_side(0.95, 0.1), np.pi / 2)
    band = 0.45 + 0.1 * canvas.rng.random()
    inside = [i for i, s in enumerate(steps) if band < s < band + 0.16]
    canvas.polygon(
        [left[i] for i in inside] + [right[i] for i in inside[::-1]], "roof", canvas.lit_side(0.9, 0.2), 0.0
    )


def city(canvas: Canvas) -> None:
    """Towers by a river at night: lit windows, a bridge, reflections."""
    rng, v = canvas.rng, canvas.v
    quay = rng.uniform(0.56, 0.64)
    moon = (rng.uniform(0.15, 0.85) * canvas.aspect, rng.uniform(0.1, 0.22))
    sky(canvas, quay, moon)
    sun(canvas, moon, rng.uniform(0.045, 0.07))
    clouds(canvas, quay * 0.6, amount=rng.uniform(0.05, 0.18))
    for layer, (low, high) in enumerate(((0.22, 0.46), (0.1, 0.32))):
        left = -0.05
        while left < canvas.aspect:
            width = rng.uniform(0.07, 0.15)
            role = "far" if layer == 0 else ("wall", "roof", "wall")[int(rng.integers(3))]
            tower(canvas, left, quay, width, rng.uniform(low, high), role, windows=layer == 1)
            left += width * rng.uniform(0.85, 1.3)
    reflect(canvas, quay, blur=0.012)
    if rng.random() < 0.6:
        bridge(canvas, quay)
    canvas.fill(np.abs(v - quay) < 0.012, "earth", 0.35, 0.0)


def reflect(canvas: Canvas, line: float, *, blur: float) -> None:
    """Turns what lies below `line` into water that mirrors what stands above it."""
    height = canvas.shape[0]
    first = int(line * height)
    ripple = canvas.noise(26, octaves=2, stretch=7)[first:] * blur * height
    rows, columns = np.mgrid[first:height, 0 : canvas.shape[1]]
    source = np.clip(2 * first - rows - 1 + ripple * 1.5, 0, first - 1).astype(np.intp)
    columns = np.clip(columns + ripple, 0, canvas.shape[1] - 1).astype(np.intp)
    role, tone = canvas.role[source, columns], canvas.tone[source, columns]
    bright = role == ROLE_INDEX["light"]
    below = np.arange(first, height, dtype=np.float32)[:, None] / height - line
    window = (slice(first, height), slice(0, canvas.shape[1]))
    swell = 0.06 * canvas.noise(20, octaves=1, stretch=6)[first:]
    region, mirrored = canvas.next_region(), 0.7 * tone + 0.1 - 0.15 * below + swell
    canvas.fill(np.ones_like(bright), "water", mirrored, 0.0, window=window, region=region)
    canvas.fill(bright, "light", 0.75, 0.0, window=window, region=region)


def bridge(canvas: Canvas, line: float) -> None:
    """A slender bridge of round arches over the water."""
    rng = canvas.rng
    deck, span = line + rng.uniform(0.08, 0.13), rng.uniform(0.34, 0.48)
    u = canvas.u + rng.uniform(0, span)
    arch = np.sqrt(np.clip((span * 0.46) ** 2 - ((u % span) - span / 2) ** 2, 0, None)) * 0.55
    foot = deck + 0.15
    canvas.fill((canvas.v > deck) & (canvas.v < foot - arch), "wall", 0.62 - 2 * (canvas.v - deck), 0.0)
    canvas.fill(np.abs(canvas.v - deck) < 0.01, "earth", 0.7, 0.0)
    for lamp in np.arange(rng.uniform(0, 0.1), canvas.aspect, span / 2):
        post = placed((lamp, deck), 1.0, (-0.003, 0.0), (0.003, 0.0), (0.0, -0.07))
        canvas.polygon(post, "roof", 0.1, np.pi / 2)
        canvas.ellipse((lamp, deck - 0.075), (0.014, 0.014), "light", (0.7, 1.0))


def grove(canvas: Canvas) -> None:
    """Tall trees by a path, light falling between them."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    horizon = rng.uniform(0.5, 0.58)
    centre = (rng.uniform(0.35, 0.65) * canvas.aspect, horizon - rng.uniform(0.1, 0.25))
    sky(canvas, horizon, centre)
    sun(canvas, centre, rng.uniform(0.05, 0.08))
    canvas.fill(v > canvas.ridge(horizon - 0.06, 0.02, waves=3)[None, :], "far", 0.6 - (v - horizon), 0.1)
    below = v - canvas.ridge(horizon, 0.012)[None, :]
    stripes = 0.2 * np.sin(u * 17 + below * 30 + canvas.noise(3) * 1.5)
    canvas.fill(below > 0, "green", 0.7 - 0.7 * below + stripes, 0.25 * canvas.noise(3))
    winding_path(canvas, horizon + 0.02, centre[0])
    trees = sorted(rng.uniform(0.0, 1.0, int(rng.integers(9, 13))))
    autumn = rng.random() < 0.5
    for near in trees:
        away = rng.uniform(0.12, 0.75) * (0.35 + near) * rng.choice((-1.0, 1.0))
        spot = centre[0] + away * canvas.aspect
        foot = horizon + 0.02 + 0.42 * near**1.5
        tall = 0.3 + 0.65 * near
        width = 0.008 + 0.03 * near
        lean = rng.uniform(-0.04, 0.04)
        role = "flower" if autumn and rng.random() < 0.6 else "green"
        crown(canvas, (spot + lean, foot - tall), 0.09 + 0.16 * near, role)
        trunk = [(spot - width, foot), (spot + width, foot), (spot + lean + width * 0.45, foot - tall)]
        trunk.append((spot + lean - width * 0.45, foot - tall))
        canvas.polygon(trunk, "earth", canvas.lit_side(0.75, 0.05), np.pi / 2 - lean)
        crown(canvas, (spot + lean, foot - tall * 1.02), 0.05 + 0.1 * near, role)


def crown(canvas: Canvas, centre: tuple[float, float], size: float, role: str) -> None:
    region = canvas.next_region()
    for _ in range(7):
        du, dv = canvas.rng.normal(0, size * 0.5, 2)
        radius = size * canvas.rng.uniform(0.35, 0.65)
        tone = float(np.clip(0.5 - dv / size * 0.3, 0.2, 0.8))
        canvas.ellipse(
            (centre[0] + du, centre[1] + dv * 0.7),
            (radius, radius * 0.75),
            role,
            (tone - 0.3, tone + 0.25),
            region=region,
            ragged=0.3,
        )


def mountain(canvas: Canvas) -> None:
    """A snow-capped mountain over a lake, pines on the near shore."""
    rng, u, v = canvas.rng, canvas.u, canvas.v
    shoreline = rng.uniform(0.58, 0.66)
    peak = (rng.uniform(0.3, 0.7) * canvas.aspect, rng.uniform(0.1, 0.18))
    centre = (canvas.aspect - peak[0] + rng.uniform(-0.1, 0.1), rng.uniform(0.14, 0.28))
    sky(canvas, shoreline, centre)
    sun(canvas, centre, rng.uniform(0.05, 0.08))
    clouds(canvas, shoreline * 0.7, amount=rng.uniform(0.08, 0.25))
    away = np.abs(u - peak[0])
    slope = peak[1] + (shoreline - peak[1]) * (1 - np.exp(-away * 2.4)) * 1.06
    slope += 0.008 * canvas.noise(14, octaves=2)
    lit = (u < peak[0] + 0.05 * np.sin(v * 30)) == canvas.light_from_left
    flank = np.where(u < peak[0], -0.75, 0.75)
    canvas.fill(v > slope, "far", np.where(lit, 0.62, 0.3) + 0.06 * canvas.noise(10), flank)
    teeth = 0.035 * np.abs(((u * 13 + 0.2 * np.sin(u * 40)) % 2) - 1) + 0.012 * canvas.noise(10)
    snow = (v > slope) & (v < peak[1] + 0.13 + teeth * 2.2)
    canvas.fill(snow, "cloud", np.where(lit, 0.98, 0.6), flank)
    forest = canvas.ridge(shoreline - 0.07, 0.018, waves=4) + 0.012 * np.sin(u[0] * 160)
    canvas.fill((v > forest[None, :]) & (v < shoreline), "green", 0.32 + 0.1 * canvas.noise(14), np.pi / 2)
    for spot in rng.uniform(0.05, 0.95, 2) * canvas.aspect:
        house(canvas, (spot, shoreline), rng.uniform(0.05, 0.08))
    reflect(canvas, shoreline, blur=0.01)
    if rng.random() < 0.7:
        spot = (rng.uniform(0.2, 0.8) * canvas.aspect, shoreline + rng.uniform(0.08, 0.18))
        sailing_boat(canvas, spot, 0.16)
    shore(canvas, left=peak[0] > canvas.aspect / 2)
    side = 0.12 if peak[0] > canvas.aspect / 2 else canvas.aspect - 0.12
    for step in range(int(rng.integers(2, 4))):
        offset = step * 0.11 * (1 if side < 0.5 else -1)
        pine(canvas, (side + offset, 1.0 - 0.02 * step), rng.uniform(0.55, 0.85) * (1 - 0.2 * step))


MOTIFS: dict[str, Callable[[Canvas], None]] = {
    "hills": hills,
    "sea": sea,
    "still life": still_life,
    "mountain": mountain,
    "grove": grove,
    "city": city,
}


def draw_scene(rng: np.random.Generator, motif: str, width: int, height: int) -> Scene:
    """The named motif, composed afresh from `rng`, `width` x `height` pixels."""
    canvas = Canvas(rng, width, height)
    MOTIFS[motif](canvas)
    return canvas.scene()
