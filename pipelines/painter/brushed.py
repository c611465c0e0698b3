"""Manners made of brush strokes: pointillism, impasto, fauvism, nocturne."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from pipelines.painter.scene import ROLE_INDEX
from pipelines.painter.strokes import (
    Subject,
    at,
    borders,
    brush_lines,
    fill_polygons,
    follow,
    grain,
    relief,
    ribbons,
    scattered,
    soften,
    straight,
    to_bytes,
    to_field,
    to_image,
)


def pointillism(subject: Subject) -> Image.Image:
    """Round dots of pure colour on a pale ground; every few dots one of the complementary colour."""
    rng, colour = subject.rng, subject.colour
    ground = np.array([0.95, 0.9, 0.84], np.float32)
    image = to_image(0.45 * colour + 0.55 * ground)
    draw = ImageDraw.Draw(image).ellipse
    for spacing, radius, strange in ((9.0, 4.6, 0.14), (8.0, 3.4, 0.26)):
        points = scattered(rng, subject.shape, spacing)
        dots = divided(rng, at(colour, points), strange)
        sizes = radius * rng.uniform(0.75, 1.2, len(points))
        boxes = np.concatenate([points - sizes[:, None], points + sizes[:, None]], axis=1)
        for box, ink in zip(boxes.tolist(), to_bytes(dots).tolist(), strict=True):
            draw(box, fill=tuple(ink))
    return image


def divided(rng: np.random.Generator, colour: np.ndarray, strange: float) -> np.ndarray:
    """Splits mixed colours [N, 3] into the pure ones that the eye would mix again; a share of `strange`
    becomes complementary."""
    grey = colour.mean(axis=1, keepdims=True)
    pure = grey + (colour - grey) * rng.uniform(1.0, 1.9, (len(colour), 1))
    warm = np.array([0.1, 0.02, -0.12]) * rng.standard_normal((len(colour), 1))
    pure = pure + warm + 0.05 * rng.standard_normal((len(colour), 1))
    opposite = grey + 0.08 - 1.25 * (colour - grey)
    violet, gold = np.array([0.46, 0.36, 0.8]), np.array([1.0, 0.78, 0.34])
    opposite = 0.5 * opposite + 0.5 * np.where(grey < 0.6, violet, gold)
    return np.where(rng.random((len(colour), 1)) < strange, opposite, pure)


def impasto(subject: Subject) -> Image.Image:
    """Thick curved strokes that run with the forms, ridges of bristles standing in the light."""
    rng, colour, angle = subject.rng, subject.colour, subject.scene.angle
    image = to_image(colour * 0.6)
    heights = Image.new("L", image.size, 90)
    detail = soften(borders(subject.scene.region).astype(np.float32), 8) > 0.05
    for spacing, length, width in ((20.0, 96.0, 25.0), (16.0, 66.0, 16.0), (9.0, 28.0, 8.0)):
        points = scattered(rng, subject.shape, spacing)
        if spacing < 10:  # the fine brush only where forms meet
            points = points[at(detail, points)]
        num = len(points)
        paths = follow(angle, points, length * rng.uniform(0.6, 1.25, num), num_steps=3)
        widths = width * rng.uniform(0.7, 1.2, num)
        inks = at(colour, points) + 0.05 * rng.standard_normal((num, 3))
        inks += 0.08 * rng.standard_normal((num, 1))
        level = rng.uniform(0.25, 0.6, num)
        outlines = ribbons(paths, widths)
        fill_polygons(image, outlines, inks)
        fill_polygons(heights, outlines, level)
        normals = outlines[:, : paths.shape[1]] - paths
        for place in (-0.55, 0.0, 0.5):
            hairs = ribbons(paths + normals * place, widths * 0.16, taper=0.9)
            fill_polygons(heights, hairs, level + rng.uniform(0.2, 0.45, num))
            if place:
                fill_polygons(image, hairs, inks + rng.choice((-0.12, 0.12), (num, 1)))
    light = relief(to_field(heights), 0.6)
    return to_image(to_field(image) * light[..., None])


def fauvism(subject: Subject) -> Image.Image:
    """Broad flat patches of unmixed colour from the tube, bare canvas between, blue-black contours."""
    rng, scene, shades = subject.rng, subject.scene, subject.colour
    canvas = np.array([0.97, 0.92, 0.8], np.float32)
    image = to_image(canvas - 0.03 * grain(rng, subject.shape, 3)[..., None])
    flat = soften(scene.angle, 24)
    edges = soften(borders(scene.region).astype(np.float32), 6) > 0.05
    for spacing, width, length in ((27.0, 42.0, 96.0), (23.0, 30.0, 60.0), (13.0, 13.0, 26.0)):
        points = scattered(rng, subject.shape, spacing)
        if spacing < 20:
            points = points[at(edges, points)]
        num = len(points)
        inks = at(shades, points)
        grey = inks.mean(axis=1, keepdims=True)
        inks = grey + (inks - grey) * rng.uniform(1.0, 1.25, (num, 1)) + 0.06 * rng.standard_normal((num, 1))
        if spacing > 20:  # here and there a patch of the opposite hue
            inks = np.where(rng.random((num, 1)) < 0.03, np.roll(inks, 1, axis=1), inks)
        paths = follow(flat if spacing > 20 else scene.angle, points, length * rng.uniform(0.7, 1.2, num), 2)
        fill_polygons(image, ribbons(paths, width * rng.uniform(0.7, 1.1, num), taper=0.25), inks)
    lines = brush_lines(subject, scene.region, width=7.0, wobble=0.35)[..., None]
    ink = np.array([0.07, 0.07, 0.34], np.float32)
    return to_image(to_field(image) * (1 - lines) + ink * lines)


def nocturne(subject: Subject) -> Image.Image:
    """Night laid on with the knife: dark slabs, scraped edges, lamps that glow."""
    rng, colour, scene = subject.rng, subject.colour, subject.scene
    image = to_image(colour * 0.55)
    heights = Image.new("L", image.size, 100)
    upright = np.abs(np.sin(scene.angle)) > 0.8
    lamps = scene.role == ROLE_INDEX["light"]
    edges = soften((borders(scene.region) | lamps).astype(np.float32), 8) > 0.06
    for spacing, length, width in ((20.0, 74.0, 26.0), (15.0, 46.0, 15.0), (9.0, 20.0, 8.0)):
        points = scattered(rng, subject.shape, spacing)
        if spacing < 10:
            points = points[at(edges, points)]
        num = len(points)
        turn = np.where(at(upright, points), np.pi / 2, 0.0) + 0.16 * rng.standard_normal(num)
        paths = straight(points, turn, length * rng.uniform(0.5, 1.3, num))
        inks = at(colour, points) * rng.uniform(0.9, 1.62, (num, 1)) + 0.012 * rng.standard_normal((num, 3))
        slabs = ribbons(paths, width * rng.uniform(0.6, 1.2, num), taper=0.12)
        fill_polygons(image, slabs, inks)
        fill_polygons(heights, slabs, rng.uniform(0.2, 0.9, num))
    scraped = 0.07 * np.clip(grain(rng, subject.shape, 4) + subject.noise(5, stretch=4) - 1.2, 0, 1)
    near, far = (soften(lamps.astype(np.float32), reach) for reach in (18, 64))
    glow = near / (near.max() + 0.05) + far / (far.max() + 0.05)
    warmth = np.array([0.42, 0.27, 0.08], np.float32)
    light = relief(to_field(heights), 0.3)[..., None]
    return to_image(to_field(image) * light + scraped[..., None] * [0.5, 0.7, 0.7] + glow[..., None] * warmth)
