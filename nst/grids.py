"""Pictures side by side: labelled grids for reports, and thumbnails for pages."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nst.images import encode_jpeg

Pixels = NDArray[np.uint8]
BACKGROUND, INK = (250, 249, 247), (84, 82, 78)
GAP = 6  # px
TEXT_SIZE = 13  # px


def picture_grid(
    rows: Sequence[Sequence[Pixels | None]],
    *,
    cell: int = 192,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> Pixels:
    """Pictures in rows and columns, each cut to its middle square of `cell` px.

    Args:
        rows: uint8 [H, W, 3] of any sizes, all rows of one length; None leaves a cell empty.
        cell: px, the side of a cell.
        column_labels: above the columns, as many as there are; none: no line for them.
        row_labels: above each row's first picture; as many as rows, or none.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: no pictures, rows of different lengths, or labels that do not fit.
    """
    num_rows, num_columns = len(rows), len(rows[0]) if rows else 0
    if not num_columns or any(len(row) != num_columns for row in rows):
        raise ValueError(f"rows of {[len(row) for row in rows]} pictures; give rows of one length, 1 or more")
    for labels, num, name in ((column_labels, num_columns, "column"), (row_labels, num_rows, "row")):
        if labels and len(labels) != num:
            raise ValueError(f"{len(labels)} {name} labels for {num} {name}s; give one each, or none")
    line = TEXT_SIZE + 2 * GAP
    head, row_head = (line if column_labels else GAP), (line if row_labels else 0)
    width = GAP + num_columns * (cell + GAP)
    height = head + num_rows * (row_head + cell + GAP)
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    for column, label in enumerate(column_labels):
        _write(sheet, (GAP + column * (cell + GAP), GAP), label, cell)
    for index, row in enumerate(rows):
        top = head + index * (row_head + cell + GAP)
        if row_labels:
            _write(sheet, (GAP, top + GAP), row_labels[index], width - 2 * GAP)
        for column, picture in enumerate(row):
            if picture is not None:
                sheet.paste(square(picture, cell), (GAP + column * (cell + GAP), top + row_head))
    return np.array(sheet)


def _write(sheet: Image.Image, place: tuple[int, int], text: str, width: int) -> None:
    """One line, cut with an ellipsis where it is wider than `width` px."""
    font = ImageFont.load_default(TEXT_SIZE)
    draw = ImageDraw.Draw(sheet)
    if draw.textlength(text, font=font) > width:
        while text and draw.textlength(text + "…", font=font) > width:
            text = text[:-1]
        text += "…"
    draw.text(place, text, fill=INK, font=font)


def square(picture: Pixels, side: int) -> Image.Image:
    """The middle square of uint8 [H, W, 3], resized to `side` px."""
    height, width = picture.shape[:2]
    edge = min(height, width)
    left, top = (width - edge) // 2, (height - edge) // 2
    box = (left, top, left + edge, top + edge)
    return Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)


def thumbnail(picture: Pixels, max_side: int) -> Pixels:
    """uint8 [H, W, 3] reduced so that the longer side is `max_side` px at most; smaller ones as they are."""
    image = Image.fromarray(picture)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return np.array(image)


def data_uri(picture: Pixels, quality: int = 82) -> str:
    """uint8 [H, W, 3] as a JPEG in a `data:` URI, for pages that need no other file."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(picture, quality)).decode("ascii")
