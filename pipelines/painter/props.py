"""What the motifs are made of: sky, sun, clouds, trees, houses, boats, flowers, fruit."""

from __future__ import annotations

import numpy as np

from pipelines.painter.scene import Canvas

Point = tuple[float, float]  # (u, v) in heights of the picture


def placed(origin: Point, size: float, *points: Point) -> list[Point]:
    """Points of a thing, given in its sizes from its origin, as places in the picture."""
    return [(origin[0] + size * u, origin[1] + size * v) for u, v in points]


def sky(canvas: Canvas, horizon: float, glow: Point) -> None:
    """Dark above, light towards the horizon and round the sun; the brush swirls."""
    window = canvas.window(0, 0, canvas.aspect, horizon + 0.2)
    assert window is not None, "the sky lies within the picture"
    du, dv = canvas.u[window] - glow[0], canvas.v[window] - glow[1]
    away = du * du + dv * dv
    wind = 1.3 * canvas.noise(1.6, octaves=2, stretch=1.6)[window]
    tone = 0.22 + 0.5 * canvas.v[window] / horizon + 0.4 * np.exp(away / -0.04)
    tone += 0.08 * canvas.noise(3, stretch=2.5)[window]
    round_sun = 2 * np.arctan2(dv, du) + np.pi
    # Blend directions as doubled angles: a brush stroke has no head and no tail.
    near = np.exp(away / -0.07)
    x = near * np.cos(round_sun) + (1 - near) * np.cos(wind)
    y = near * np.sin(round_sun) + (1 - near) * np.sin(wind)
    canvas.fill(np.ones_like(tone, bool), "sky", tone, np.arctan2(y, x) / 2, window=window)
    for _ in range(int(canvas.rng.integers(1, 3))):
        spot = (canvas.rng.uniform(0.1, 0.9) * canvas.aspect, canvas.rng.uniform(0.1, 0.7) * horizon)
        whirl(canvas, spot, horizon)


def whirl(canvas: Canvas, centre: Point, horizon: float) -> None:
    """Bends the sky's brush direction round a point."""
    reach = 0.36
    bottom = min(centre[1] + reach, horizon + 0.2)
    window = canvas.window(centre[0] - reach, centre[1] - reach, centre[0] + reach, bottom)
    if window is None:
        return
    du, dv, angle = canvas.u[window] - centre[0], canvas.v[window] - centre[1], canvas.angle[window]
    away = np.hypot(du, dv)
    near = np.exp(-((away / 0.16) ** 2))
    around = np.arctan2(dv, du)
    x = near * np.cos(2 * (around + np.pi / 2 + away)) + (1 - near) * np.cos(2 * angle)
    y = near * np.sin(2 * (around + np.pi / 2 + away)) + (1 - near) * np.sin(2 * angle)
    canvas.angle[window] = np.arctan2(y, x) / 2
    canvas.tone[window] += 0.1 * near * np.cos(away * 70 - around)


def sun(canvas: Canvas, centre: Point, radius: float) -> None:
    canvas.ellipse(centre, (radius, radius), "light", (0.75, 1.0))


def clouds(canvas: Canvas, lowest: float, *, amount: float) -> None:
    """Long clouds over `amount` of the sky."""
    billow = canvas.noise(5, octaves=3, stretch=3.4) - 2.2 * np.clip(canvas.v / lowest - 0.75, 0, None)
    sky_part = billow[canvas.v < lowest]
    level = np.quantile(sky_part, 1 - amount)
    mask = (billow > level) & (canvas.v < lowest) & (canvas.role == 0)
    canvas.fill(mask, "cloud", 0.55 + 0.3 * (billow - level), canvas.angle * 0.5)


def house(canvas: Canvas, foot: Point, size: float) -> None:
    """A gabled house: front, side, roof, windows."""
    light, dark = canvas.lit_side(0.95, 0.5)
    tall, wide = canvas.rng.uniform(0.55, 0.75), canvas.rng.uniform(1.0, 1.5)
    gable, far = 0.55, 0.55 + wide
    apex = tall + 0.5
    front = placed(foot, size, (0, 0), (0, -tall), (gable / 2, -apex), (gable, -tall), (gable, 0))
    canvas.polygon(front, "wall", light, np.pi / 2)
    canvas.polygon(placed(foot, size, (gable, 0), (gable, -tall), (far, -tall), (far, 0)), "wall", dark, 0.0)
    eaves = placed(
        foot, size, (gable / 2, -apex), (far - gable / 2, -apex), (far + 0.05, -tall), (gable, -tall)
    )
    canvas.polygon(eaves, "roof", 0.3 + 0.4 * dark, 0.15)
    for left in (0.22, gable + 0.25 * wide, gable + 0.65 * wide):
        top = 0.13 - tall
        pane = placed(
            foot, size, (left, top), (left + 0.13, top), (left + 0.13, top + 0.2), (left, top + 0.2)
        )
        canvas.polygon(pane, "roof", 0.05, np.pi / 2)


def tower(
    canvas: Canvas, left: float, foot: float, width: float, height: float, role: str, *, windows: bool
) -> None:
    """A house front or high-rise with rows of windows, some of them lit."""
    rng, top = canvas.rng, foot - height
    tones, region = canvas.lit_side(0.55, 0.2), canvas.next_region()
    front = [(left, foot), (left, top), (left + width, top), (left + width, foot)]
    canvas.polygon(front, role, tones, np.pi / 2, region=region)
    if rng.random() < 0.4:
        gable = placed((left, top), width, (0.0, 0.0), (0.5, -0.5), (1.0, 0.0))
        canvas.polygon(gable, "roof", 0.4, 0.6)
    if not windows:
        return
    step, pane = 0.032, 0.013
    for at in np.arange(left + 0.014, left + width - pane, step):
        for level in np.arange(top + 0.022, foot - 0.03, step * 1.15):
            if rng.random() < 0.55:
                corners = placed((at, level), pane, (0, 0), (1, 0), (1, 1.5), (0, 1.5))
                canvas.polygon(corners, "light", rng.uniform(0.45, 1.0), np.pi / 2, region=region)


def round_tree(canvas: Canvas, foot: Point, size: float) -> None:
    trunk = placed(foot, size, (-0.06, 0), (0.06, 0), (0.04, -0.6), (-0.04, -0.6))
    canvas.polygon(trunk, "earth", 0.15, np.pi / 2)
    region = canvas.next_region()
    for du, dv, radius in ((-0.3, -0.75, 0.36), (0.3, -0.77, 0.36), (0.0, -0.97, 0.42), (0.05, -0.67, 0.34)):
        centre, radii = placed(foot, size, (du, dv))[0], (radius * size, 0.85 * radius * size)
        canvas.ellipse(centre, radii, "green", (0.0, 0.7), region=region, ragged=0.3)


def cypress(canvas: Canvas, foot: Point, height: float) -> None:
    """A dark flame of a tree."""
    steps = np.linspace(0, 1, 18)
    half = height * 0.13 * np.sin(np.pi * np.clip(1.05 - steps, 0, 1)) ** 0.7 * (1 - 0.55 * steps)
    sway = foot[0] + 0.02 * np.sin(steps * 7 + canvas.rng.uniform(0, 6))
    ragged = 1 + 0.22 * canvas.rng.standard_normal((2, steps.size))
    up = foot[1] - height * steps
    left = np.stack([sway - half * ragged[0], up], axis=1)
    right = np.stack([sway + half * ragged[1], up], axis=1)
    outline = [(u, v) for u, v in np.concatenate([left, right[::-1]]).tolist()]
    canvas.polygon(outline, "green", canvas.lit_side(0.45, 0.0), np.pi / 2 + 0.12)


def pine(canvas: Canvas, foot: Point, height: float) -> None:
    """A conifer in ragged tiers."""
    u, v = foot
    width = height * 0.02
    canvas.polygon([(u - width, v), (u + width, v), (u, v - height)], "earth", 0.15, np.pi / 2)
    region = canvas.next_region()
    for tier in range(8):
        t = tier / 8
        top = v - height * (1 - t * 0.82)
        droop = height * (0.09 + 0.05 * t)
        tones = canvas.lit_side(0.55 - 0.2 * t, 0.08)
        for side, tone in zip((-1, 1), tones, strict=True):
            reach = side * height * (0.05 + 0.2 * t) * canvas.rng.uniform(0.75, 1.2)
            branch = [(u, top - droop * 0.7), (u + reach, top + droop), (u + reach * 0.38, top + droop * 0.6)]
            canvas.polygon([*branch, (u, top + droop * 1.1)], "green", tone, side * 0.75, region=region)


def sailing_boat(canvas: Canvas, foot: Point, size: float) -> None:
    lean = canvas.rng.uniform(-0.08, 0.08)
    mirrored = placed(foot, size, (-0.4, 0.06), (0.36, 0.06), (lean, 0.45))
    canvas.polygon(mirrored, "water", 0.12, 0.0)
    hull = placed(foot, size, (-0.5, -0.1), (0.5, -0.1), (0.32, 0.06), (-0.36, 0.06))
    canvas.polygon(hull, "cloth", 0.3, 0.0)
    jib = placed(foot, size, (lean, -1.05), (0.42, -0.2), (0.03, -0.16))
    canvas.polygon(jib, "cloud", 0.95, 1.1)
    sail = placed(foot, size, (lean, -1.05), (-0.04, -0.15), (-0.36, -0.2))
    canvas.polygon(sail, "roof" if canvas.rng.random() < 0.4 else "cloud", 0.6, -1.1)


def bouquet(canvas: Canvas, centre: Point, size: float) -> None:
    """Leaves, then blossoms with a bright heart."""
    rng = canvas.rng
    for _ in range(16):
        bearing, away = rng.uniform(0, 2 * np.pi), size * rng.uniform(0.3, 1.05)
        tip = (centre[0] + away * np.cos(bearing), centre[1] - size * 0.45 + away * np.sin(bearing) * 0.85)
        normal = (-np.sin(bearing) * size * 0.1, np.cos(bearing) * size * 0.1)
        middle = ((centre[0] + tip[0]) / 2, (centre[1] - size * 0.2 + tip[1]) / 2)
        leaf = [(centre[0], centre[1] - size * 0.1), (middle[0] + normal[0], middle[1] + normal[1]), tip]
        leaf.append((middle[0] - normal[0], middle[1] - normal[1]))
        canvas.polygon(leaf, "green", rng.uniform(0.1, 0.7), bearing)
    mixed, golden = ("flower", "flower", "cloud", "fruit"), ("flower", "light", "flower", "flower")
    roles = mixed if rng.random() < 0.5 else golden
    for _ in range(int(rng.integers(9, 14))):
        bearing, away = rng.uniform(0, 2 * np.pi), size * rng.random() ** 0.6
        at = (centre[0] + away * np.cos(bearing), centre[1] - size * 0.5 + away * np.sin(bearing) * 0.8)
        radius, role = size * rng.uniform(0.15, 0.26), roles[int(rng.integers(4))]
        region = canvas.next_region()
        canvas.ellipse(at, (radius, radius * 0.9), role, (0.15, 0.95), region=region, ragged=0.35)
        canvas.ellipse(at, (radius * 0.3, radius * 0.27), "earth" if role == "light" else "light", (0.3, 0.9))


def fruit_pile(canvas: Canvas, foot: Point, num: int) -> None:
    side = 1.0 if canvas.light_from_left else -1.0
    offsets = canvas.rng.uniform((-0.15, -0.03), (0.15, 0.05), (num, 2))
    for du, dv in offsets[np.argsort(offsets[:, 1])].tolist():
        radius = canvas.rng.uniform(0.052, 0.07)
        spot = (foot[0] + du, foot[1] + dv)
        shadow = placed(spot, radius, (side * 0.8, 0.75))[0]
        canvas.ellipse(shadow, (radius * 1.3, radius * 0.35), "earth", (0.0, 0.15))
        role = "fruit" if canvas.rng.random() < 0.7 else "light"
        canvas.ellipse(spot, (radius, radius * 0.95), role, (0.0, 1.0))
        stem = placed(spot, radius, (-0.05, -0.8), (0.07, -0.8), (0.2 * side, -1.3))
        canvas.polygon(stem, "earth", 0.05, np.pi / 2)
