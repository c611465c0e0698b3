"""Copies of a picture are known again, different ones are not taken for each other, and the rows that go are
exactly those that going through them one by one would find."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from nst import near_duplicates
from nst.images import ImageError, encode_jpeg
from nst.near_duplicates import MAX_DISTANCE, NO_HASH, find_near_duplicates, near_hash
from tests.bad_images import encoded, turned
from tests.corpora import photographs, pieces


def one_by_one(hashes: np.ndarray, max_distance: int) -> list[int]:
    """What `find_near_duplicates` promises, in the plainest way."""
    kept: list[int] = []
    found = []
    for row, value in enumerate(hashes.tolist()):
        close = [other for other in kept if (value ^ int(hashes[other])).bit_count() <= max_distance]
        found.append(close[0] if close and value != NO_HASH else -1)
        if not close and value != NO_HASH:
            kept.append(row)
    return found


def crowded(random: np.random.Generator, num_rows: int, num_flips: int) -> np.ndarray:
    """Hashes in clusters, each up to `num_flips` bits from the middle of its own; some rows without one."""
    middles = random.integers(1, 2**63, max(1, num_rows // 8), dtype=np.uint64)
    hashes = middles[random.integers(0, len(middles), num_rows)]
    for _ in range(num_flips):
        flips = np.uint64(1) << random.integers(0, 64, num_rows).astype(np.uint64)
        hashes ^= np.where(random.random(num_rows) < 0.5, flips, np.uint64(0))
    hashes[random.random(num_rows) < 0.02] = NO_HASH
    return hashes


@pytest.mark.parametrize("num_pairs_kept", [0, 1 << 20])
@pytest.mark.parametrize("seed", range(12))
def test_the_rows_that_go_are_those_of_the_definition(
    seed: int, num_pairs_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "NUM_PAIRS_KEPT", num_pairs_kept)
    random = np.random.default_rng(seed)
    for num_rows in (0, 1, 2, 50, 400):
        max_distance = int(random.integers(0, 9))
        hashes = crowded(random, num_rows, num_flips=int(random.integers(0, 8)))
        found = find_near_duplicates(hashes, max_distance)
        assert found.dtype == np.int64
        assert found.tolist() == one_by_one(hashes, max_distance)


def test_of_a_chain_every_second_link_stays() -> None:
    """Each is close to the next only: what its repeated neighbour repeats does not concern the third."""
    chain = np.array([(1 << number) - 1 for number in range(1, 60, 3)], np.uint64)
    found = find_near_duplicates(chain, 3)
    assert found.tolist() == [-1 if row % 2 == 0 else row - 1 for row in range(len(chain))]


def test_memory_is_bounded_by_the_number_of_rows() -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(1, 2**63, 300_000, dtype=np.uint64)
    hashes[270_000:] = hashes[:30_000] ^ np.uint64(0b101)
    tracemalloc.start()
    try:
        found = find_near_duplicates(hashes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found[270_000:] == np.arange(30_000)).all()
    assert (found[:270_000] == -1).all()
    assert peak < 100 * len(hashes)


@pytest.mark.parametrize("max_distance", [-1, 13])
def test_a_distance_that_makes_no_sense_is_refused(max_distance: int) -> None:
    with pytest.raises(ValueError, match=str(max_distance)):
        find_near_duplicates(np.zeros(3, np.uint64), max_distance)


def hash_of(image: Image.Image, format: str = "JPEG", **options: object) -> int:
    found = near_hash(encoded(image, format, **options))
    assert found is not None
    return found


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("number", [0, 1])
def test_copies_of_a_picture_are_close(number: int) -> None:
    picture = Image.fromarray(photographs()[number])
    original = hash_of(picture, quality=90)
    half = picture.resize((320, 213), Image.Resampling.LANCZOS)
    copies = {
        "half": hash_of(half),
        "twice": hash_of(picture.resize((1280, 854), Image.Resampling.BICUBIC)),
        "compressed": hash_of(picture, quality=30),
        "half and compressed": hash_of(half, quality=50),
        "png": hash_of(picture, "PNG"),
        "brighter": hash_of(ImageEnhance.Brightness(picture).enhance(1.1)),
        "gray": hash_of(picture.convert("L")),
    }
    assert {name: found for name, found in copies.items() if distance(original, found) > MAX_DISTANCE} == {}


def test_a_picture_is_known_however_it_is_turned_in_its_file() -> None:
    hashes = [near_hash(turned(orientation)) for orientation in range(1, 9)]
    assert all(found is not None for found in hashes)
    assert max(distance(hashes[0] or 0, found or 0) for found in hashes) <= MAX_DISTANCE


def test_different_pictures_are_far_apart() -> None:
    every = [near_hash(encode_jpeg(piece)) for cut in pieces(96).values() for piece in cut]
    hashes = [found for found in every if found is not None]
    assert len(hashes) > len(every) / 2  # the others are squares of sky
    closest = min(distance(one, other) for place, one in enumerate(hashes) for other in hashes[:place])
    assert closest > MAX_DISTANCE


def test_flat_pictures_have_no_hash() -> None:
    random = np.random.default_rng(0)
    rows = np.linspace(60, 200, 256)[:, None, None]
    sky = np.broadcast_to(rows, (256, 256, 3))
    for pixels in (
        np.full((256, 256, 3), 128),
        sky,
        np.full((256, 256, 3), 200) + random.normal(0, 3, (256, 256, 3)),
        sky.transpose(1, 0, 2) + random.normal(0, 3, (256, 256, 3)),
    ):
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        assert near_hash(encoded(image, "JPEG", quality=90)) is None
        assert near_hash(encoded(image, "PNG")) is None


def test_what_is_no_picture_is_an_image_error() -> None:
    with pytest.raises(ImageError):
        near_hash(b"no picture")
