"""Grids and thumbnails: where pictures end up, and what is refused."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from nst.grids import BACKGROUND, GAP, data_uri, picture_grid, thumbnail


def plain(color: tuple[int, int, int], height: int = 40, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def test_pictures_stand_in_their_cells() -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    grid = picture_grid([[plain(red), plain(green, 90, 30)], [None, plain(blue, 5, 5)]], cell=32)
    assert grid.shape == (GAP + 2 * (32 + GAP), GAP + 2 * (32 + GAP), 3)
    centres = [GAP + 16, GAP + 16 + 32 + GAP]
    found = [tuple(grid[y, x].tolist()) for y in centres for x in centres]
    assert found == [red, green, BACKGROUND, blue]


def test_labels_are_written_and_cut_to_their_width() -> None:
    without = picture_grid([[plain((0, 0, 0))] * 2], cell=64)
    with_labels = picture_grid(
        [[plain((0, 0, 0))] * 2],
        cell=64,
        column_labels=["content", "a very long name " * 5],
        row_labels=["r"],
    )
    assert with_labels.shape[1] == without.shape[1]
    assert with_labels.shape[0] > without.shape[0]
    line = with_labels[: 3 * GAP]
    assert (line != np.array(BACKGROUND)).any(axis=2).sum() > 30
    assert (with_labels[:, -GAP:] == np.array(BACKGROUND)).all()


@pytest.mark.parametrize(
    ("rows", "labels", "words"),
    [
        ([], [], "rows of"),
        ([[None], [None, None]], [], r"\[1, 2\]"),
        ([[None]], ["a", "b"], "2 column labels"),
    ],
)
def test_what_does_not_fit_is_refused(rows, labels, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        picture_grid(rows, column_labels=labels)


def test_thumbnails_keep_proportions_and_never_grow() -> None:
    assert thumbnail(plain((1, 2, 3), 400, 300), 100).shape == (100, 75, 3)
    assert thumbnail(plain((1, 2, 3), 40, 60), 100).shape == (40, 60, 3)


def test_data_uri_holds_the_picture() -> None:
    uri = data_uri(plain((10, 120, 240)))
    head, _, body = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert image.size == (60, 40)
    assert np.abs(np.array(image).astype(int) - (10, 120, 240)).max() <= 4
