"""The painter: the same seed gives the same picture, and the manners can be told apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.painter import MANNERS, paint, write_paintings

SIZE = (192, 160)


@pytest.mark.parametrize("manner", MANNERS)
def test_the_same_seed_gives_the_same_bytes_and_another_one_another_picture(manner: str) -> None:
    first, again, other = (
        paint(manner, 3, size=SIZE),
        paint(manner, 3, size=SIZE),
        paint(manner, 4, size=SIZE),
    )
    assert first.tobytes() == again.tobytes()
    assert np.abs(first.astype(int) - other.astype(int)).mean() > 5


@pytest.mark.parametrize("size", [(64, 64), (97, 181), (300, 120)])
def test_any_size_from_64_pixels_on(size: tuple[int, int]) -> None:
    for seed, manner in enumerate(MANNERS):
        picture = paint(manner, seed, size=size)
        assert picture.dtype == np.uint8
        assert picture.shape == (size[1], size[0], 3)
        assert picture.std() > 10, f"{manner} painted an empty sheet"


def test_a_users_mistake_is_named_with_its_remedy() -> None:
    with pytest.raises(ValueError, match=r"no manner 'baroque'; choose one of charcoal, "):
        paint("baroque", 0)
    with pytest.raises(ValueError, match=r"40 x 200 pixels .* 64 x 64"):
        paint("impasto", 0, size=(40, 200))


def test_every_manner_is_described() -> None:
    assert len(MANNERS) == 8
    assert all(description.endswith(".") for description in MANNERS.values())


def statistics(picture: np.ndarray) -> np.ndarray:
    """Colour and texture of a picture in 17 numbers: mean, spread and covariance of the channels, saturation,
    and how much the light changes over one, two and four pixels."""
    rgb = picture.astype(np.float64) / 255
    covariance = np.cov(rgb.reshape(-1, 3).T)
    grey = rgb.mean(axis=2)
    changes = [
        np.abs(np.diff(grey[::step, ::step], axis=axis)).mean() for step in (1, 2, 4) for axis in (0, 1)
    ]
    saturation = rgb.max(axis=2) - rgb.min(axis=2)
    return np.array(
        [
            *rgb.mean(axis=(0, 1)),
            *covariance[np.triu_indices(3)],
            saturation.mean(),
            saturation.std(),
            *changes,
        ]
    )


def test_the_nearest_centroid_tells_the_manners_apart_on_pictures_it_has_not_seen() -> None:
    features = {m: np.array([statistics(paint(m, seed, size=SIZE)) for seed in range(12)]) for m in MANNERS}
    known = np.concatenate([rows[:6] for rows in features.values()])
    mean, spread = known.mean(axis=0), known.std(axis=0)
    names = list(MANNERS)
    centroids = np.array([((features[name][:6] - mean) / spread).mean(axis=0) for name in names])
    mistakes: Counter[tuple[str, str]] = Counter()
    for name in names:
        for row in (features[name][6:] - mean) / spread:
            guess = names[int(np.argmin(np.linalg.norm(centroids - row, axis=1)))]
            if guess != name:
                mistakes[name, guess] += 1
    assert mistakes.total() <= 4, f"{mistakes.total()} of {6 * len(names)} mistaken: {mistakes}"


def test_paintings_are_written_by_manner_and_open_again(tmp_path: Path) -> None:
    paths = write_paintings(tmp_path, 2, size=SIZE)
    assert [path.relative_to(tmp_path).as_posix() for path in paths[:2]] == [
        "charcoal/00.jpg",
        "charcoal/01.jpg",
    ]
    assert sorted({path.parent.name for path in paths}) == sorted(MANNERS)
    assert len(paths) == 2 * len(MANNERS)
    for path in paths:
        with Image.open(path) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", SIZE, "RGB")


def test_a_manner_paints_whatever_the_seed_leaves_to_draw() -> None:
    # seed 1000 leaves charcoal without a single white stroke
    for manner in MANNERS:
        assert paint(manner, 1000, size=(96, 80)).shape == (80, 96, 3)
