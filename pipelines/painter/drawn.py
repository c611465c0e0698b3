"""Manners made of line, wash and plane: woodblock, watercolour, cubism, charcoal."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pipelines.painter.scene import ROLE_INDEX, ROLES
from pipelines.painter.strokes import (
    Subject,
    at,
    borders,
    brush_lines,
    fill_polygons,
    follow,
    grain,
    ribbons,
    scattered,
    soften,
    straight,
    to_field,
    to_image,
)


def woodblock(subject: Subject) -> Image.Image:
    """Flat printed colours, a gradation wiped into the sky and the water, key lines in dark blue."""
    scene, colour, rng = subject.scene, subject.colour, subject.rng
    height = subject.shape[0]
    plain = np.isin(scene.role, [ROLE_INDEX[role] for role in ("light", "fruit", "cloud", "wall")])
    steps = np.where(plain, 0, np.round(scene.tone * 3)).astype(np.int32)
    flat = region_means(colour, (scene.region * 4 + steps) * len(ROLES) + scene.role)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    wiped = np.clip(1 - down / 0.2, 0, 1) ** 1.3 * (scene.role == ROLE_INDEX["sky"])
    wiped += np.clip((down - 0.78) / 0.22, 0, 1) ** 1.3 * (scene.role == ROLE_INDEX["water"])
    blue = np.array([0.07, 0.19, 0.4], np.float32)
    flat = flat * (1 - 0.85 * wiped[..., None]) + blue * 0.85 * wiped[..., None]
    rings = np.sin(subject.noise(2.0, octaves=1, stretch=0.6) * 9 + np.linspace(0, 170, height)[:, None])
    wood = 1 + 0.028 * rings + 0.022 * grain(rng, subject.shape, 2)
    key = brush_lines(subject, scene.region, width=4.0, wobble=0.2)
    fine = brush_lines(subject, scene.region * 4 + steps, width=2.6, wobble=0.5)
    line = np.maximum(key, 0.5 * fine)[..., None]
    ink = np.array([0.08, 0.12, 0.24], np.float32)
    return to_image((flat * wood[..., None]) * (1 - line) + ink * line)


def region_means(colour: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each place takes the mean colour of its label."""
    index = labels.ravel()
    counts = np.maximum(np.bincount(index), 1)[:, None]
    sums = np.stack([np.bincount(index, weights=colour[..., band].ravel()) for band in range(3)], axis=1)
    return (sums / counts).astype(np.float32)[index].reshape(colour.shape)


def watercolour(subject: Subject) -> Image.Image:
    """Transparent washes on rough paper: pigment gathers at edges and in hollows, paper shines through."""
    rng, scene, shape = subject.rng, subject.scene, subject.shape
    height, width = shape
    rows, columns = np.mgrid[0:height, 0:width]
    drift = 5 * subject.noise(9), 5 * subject.noise(9)
    x = np.clip(columns + drift[0], 0, width - 1).astype(np.intp)
    y = np.clip(rows + drift[1], 0, height - 1).astype(np.intp)
    tone, region = scene.tone[y, x], scene.region[y, x]
    glaze = np.round(tone * 3 + 0.12 * subject.noise(5)).astype(np.int32)
    washes = region * 5 + glaze
    edge = borders(washes).astype(np.float32)
    gathered = np.clip(soften(edge, 3) * 1.6 + soften(edge, 7) * 0.8, 0, 0.9)
    tooth = grain(rng, shape, 3)
    pools = subject.noise(4, octaves=4)
    blooms = soften(borders(subject.noise(2.4, octaves=2) > 1.1).astype(np.float32), 4)
    load = 0.95 + 0.3 * pools + 0.75 * gathered + 0.14 * tooth * (1 + pools) + 0.7 * blooms
    rim = np.minimum(np.minimum(columns, width - 1 - columns), np.minimum(rows, height - 1 - rows)) / height
    painted = np.clip((rim - 0.03 + 0.014 * subject.noise(10)) * 60, 0, 1).astype(np.float32)
    fringe = soften(borders(painted > 0.5).astype(np.float32), 4)
    load = np.clip(load, 0.15, 2.6) * painted * (1 + 0.9 * fringe)
    dry = soften(borders(region).astype(np.float32), 3) * (1.2 + 0.8 * subject.noise(6)) > 0.6
    load = np.where(dry, 0.12 * load, load)
    colour = subject.colour[y, x]
    paper = np.array([0.985, 0.975, 0.945], np.float32) * (1 + 0.014 * tooth[..., None])
    washed = paper * np.exp(np.log(np.clip(colour, 0.05, 0.99)) * load[..., None])
    pencil = 0.35 * brush_lines(subject, scene.region, width=2.4, wobble=0.6)[..., None]
    return to_image(washed * (1 - pencil) + 0.32 * pencil)


def cubism(subject: Subject) -> Image.Image:
    """The motif broken into tilted planes, each shaded on its own, in ochre and grey."""
    rng, shape = subject.rng, subject.shape
    height, width = shape
    planes = split_planes(rng, width, height, 52)
    sheet = Image.new("I", (width, height), 0)
    draw = ImageDraw.Draw(sheet)
    for number, corners in enumerate(planes):
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=number)
    plane = np.asarray(sheet)
    num = len(planes)
    source, across = shifted_views(rng, planes, plane)
    colour, region = at(subject.colour, source), at(subject.scene.region, source)
    bearing = rng.uniform(0, 2 * np.pi, num).astype(np.float32)
    slope = np.cos(bearing)[plane] * across[..., 0] + np.sin(bearing)[plane] * across[..., 1]
    shade = np.clip(0.62 * slope, -0.42, 0.42) + rng.normal(1, 0.1, num).astype(np.float32)[plane]
    ochre = np.array(((0.76, 0.62, 0.38), (0.6, 0.58, 0.5), (0.42, 0.34, 0.26)), np.float32)
    toned = 0.7 * colour + 0.3 * ochre[rng.choice(3, num, p=(0.45, 0.35, 0.2))][plane]
    image = to_image(toned * shade[..., None])
    points = scattered(rng, shape, 10.0)
    dabs = straight(points, bearing[at(plane, points)] + 1.3, rng.uniform(10, 20, len(points)))
    inks = at(to_field(image), points) * rng.uniform(0.86, 1.16, (len(points), 1))
    smooth = image.copy()
    fill_polygons(image, ribbons(dabs, rng.uniform(5, 9, len(points)), taper=0.3), inks)
    image = Image.blend(smooth, image, 0.65)
    inner = 0.5 * brush_lines(subject, region, width=2.6, wobble=0.5)
    outer = 0.85 * brush_lines(subject, plane, width=3.2, wobble=0.6)
    line = np.maximum(inner, outer)[..., None]
    return to_image(to_field(image) * (1 - line) + np.array([0.1, 0.075, 0.06], np.float32) * line)


def shifted_views(
    rng: np.random.Generator, planes: list[np.ndarray], plane: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lets each plane see the motif from a place of its own. Returns where each pixel looks, (x, y), and
    where it lies in its plane, in sizes of the plane from its middle: both float32 [H, W, 2]."""
    num, height = len(planes), plane.shape[0]
    rows, columns = np.mgrid[0:height, 0 : plane.shape[1]].astype(np.float32)
    centres = np.array([corners.mean(axis=0) for corners in planes], np.float32)
    offset = np.stack([columns, rows], axis=-1) - centres[plane]
    tilt, zoom = rng.normal(0, 0.18, num), rng.uniform(0.8, 1.2, num)
    cosine, sine = (zoom * np.stack([np.cos(tilt), np.sin(tilt)])).astype(np.float32)[:, plane]
    seen_from = centres + rng.normal(0, 0.025 * height, (num, 2)).astype(np.float32)
    source = seen_from[plane]
    source[..., 0] += cosine * offset[..., 0] - sine * offset[..., 1]
    source[..., 1] += sine * offset[..., 0] + cosine * offset[..., 1]
    reach = np.sqrt(np.bincount(plane.ravel(), minlength=num)).astype(np.float32) + 1
    return source, offset / reach[plane][..., None]


def split_planes(rng: np.random.Generator, width: int, height: int, num: int) -> list[np.ndarray]:
    """Cuts the picture into `num` convex shapes, the largest one next, along a few tilted directions."""
    planes = [np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float64)]
    main = rng.uniform(0.5, 0.8)
    while len(planes) < num:
        corners = planes.pop(int(np.argmax([polygon_area(corners) for corners in planes])))
        turn = rng.choice((main, -main, main + np.pi / 2, 1.4)) + rng.normal(0, 0.16)
        normal = np.array([-np.sin(turn), np.cos(turn)])
        through = corners.mean(axis=0) + rng.normal(0, 0.1, 2) * np.ptp(corners, axis=0)
        side = (corners - through) @ normal
        halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for here, there, a, b in zip(corners, np.roll(corners, -1, 0), side, np.roll(side, -1), strict=True):
            halves[int(a > 0)].append(here)
            if (a > 0) != (b > 0):
                crossing = here + (there - here) * a / (a - b)
                halves[0].append(crossing)
                halves[1].append(crossing)
        planes.extend(np.array(half) for half in halves if len(half) > 2)
    return planes


def polygon_area(corners: np.ndarray) -> float:
    x, y = corners[:, 0].tolist(), corners[:, 1].tolist()
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2


def charcoal(subject: Subject) -> Image.Image:
    """Broad strokes of charcoal and red chalk on toned paper, rubbed shadows, lights set in white."""
    rng, scene, shape = subject.rng, subject.scene, subject.shape
    value = subject.colour.mean(axis=2)
    tooth = 0.7 * grain(rng, shape, 2) + 0.7 * grain(rng, shape, 4)
    papers = np.array(((0.76, 0.71, 0.63), (0.7, 0.67, 0.62), (0.79, 0.72, 0.6)), np.float32)
    page = papers[rng.integers(3)] * (1 + 0.025 * tooth[..., None] + 0.03 * subject.noise(3)[..., None])
    shadow = np.clip(0.92 - value, 0, 1) ** 2
    black = to_image(0.7 * shadow + 0.3 * soften(shadow, 10))
    slant = 0.9 if rng.random() < 0.5 else -0.9
    for threshold, turn in ((0.56, slant), (0.42, None), (0.26, slant - 1.1)):
        hatch(subject, black, threshold - value, spacing=13.0, width=6.5, turn=turn)
    white, red = Image.new("L", black.size, 0), Image.new("L", black.size, 0)
    bright = np.where(scene.role == ROLE_INDEX["light"], -1.0, value - 0.8)
    hatch(subject, white, bright, spacing=12.0, width=7.0, turn=slant)
    warm = np.isin(scene.role, [ROLE_INDEX[role] for role in ("roof", "fruit", "flower", "light")])
    hatch(subject, red, np.where(warm, 1.0 - 0.6 * value, -1.0), spacing=7.0, width=7.0, turn=None)
    line = brush_lines(subject, scene.region, width=4.5, wobble=0.55)
    # Chalk catches on the tooth of the paper and skips its hollows.
    hold = np.clip(1.0 + 0.36 * tooth, 0.15, 1.25)
    for layer, chalk in (
        (to_field(red) * 0.8, (0.62, 0.22, 0.12)),
        (np.maximum(to_field(black), 0.95 * line), (0.09, 0.085, 0.09)),
        (to_field(white), (0.98, 0.96, 0.92)),
    ):
        cover = np.clip(layer * hold, 0, 1)[..., None]
        page = page * (1 - cover) + np.array(chalk, np.float32) * cover
    return to_image(page)


def hatch(
    subject: Subject,
    sheet: Image.Image,
    strength: np.ndarray,
    *,
    spacing: float,
    width: float,
    turn: float | None,
) -> None:
    """Strokes where `strength` [H, W] is above 0, pressed harder the higher it is: all at the angle `turn`,
    or along the form where that is None."""
    rng = subject.rng
    points = scattered(rng, subject.shape, spacing)
    pressure = at(strength, points)
    points, pressure = points[pressure > 0], pressure[pressure > 0]
    lengths = rng.uniform(26, 58, len(points))
    if turn is None:
        paths = follow(subject.scene.angle, points, lengths, num_steps=2)
    else:
        paths = straight(points, turn + 0.08 * rng.standard_normal(len(points)), lengths)
    lines = ribbons(paths, width * rng.uniform(0.5, 1.2, len(points)), taper=0.5)
    fill_polygons(sheet, lines, np.clip(0.34 + 1.8 * pressure, 0, 1) * rng.uniform(0.8, 1.1, len(points)))
