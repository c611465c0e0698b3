"""Pictures as people have them become upright sRGB pixels, or an error that says what is wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from nst.images import (
    ImageError,
    ImageLimits,
    decode_image,
    difference_hash,
    encode_image,
    encode_jpeg,
    open_image,
    resize_shorter_side,
    shrink_shorter_side,
    to_float,
    to_uint8,
)
from tests.bad_images import bad_files, encoded, good_files, many_scans, picture, turned
from tests.corpora import photographs

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def corner(data: bytes) -> np.ndarray:
    return decode_image(data).rgb[4, 4]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("path", good_files())
def test_every_good_picture_is_taken_upright(path: str) -> None:
    data, size = good_files()[path]
    image = decode_image(data)
    assert image.rgb.dtype == np.uint8
    assert image.rgb.shape == (size[1], size[0], 3)
    assert image.rgb.flags.c_contiguous
    if "gray" not in path and "black" not in path and "swapped" not in path:
        assert np.abs(image.rgb[4, 4].astype(int) - RED).max() <= 3


@pytest.mark.parametrize("path", bad_files())
def test_every_bad_file_is_refused_for_its_reason(path: str) -> None:
    data, reason = bad_files()[path]
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = decode_image(turned(orientation))
    assert psnr(image.rgb, np.asarray(picture())) > 25  # what is left is the loss of JPEG
    as_stored = (64, 48) if orientation < 5 else (48, 64)
    assert (image.original_width, image.original_height) == as_stored


def test_colours_are_brought_to_srgb() -> None:
    files = good_files()
    assert np.abs(corner(files["colours/swapped_profile.jpg"][0]).astype(int) - GREEN).max() <= 3
    assert np.abs(corner(files["colours/cmyk.jpg"][0]).astype(int) - RED).max() <= 3
    # 16 bits: scaled down, not cut off or saturated
    gray = np.asarray(picture().convert("L"))
    assert np.array_equal(decode_image(files["colours/gray_16_bit.png"][0]).rgb[..., 0], gray)


def test_alpha_is_kept_where_something_shows_through() -> None:
    files = good_files()
    for path in ("alpha/rgba.png", "alpha/gray.png", "alpha/webp.webp"):
        alpha = decode_image(files[path][0]).alpha
        assert alpha is not None
        assert alpha.shape == (48, 64)
        assert (alpha[:, :32] == 255).all()
        assert (alpha[:, 32:] == 0).all()
    assert decode_image(files["alpha/palette.png"][0]).alpha is not None
    assert decode_image(files["alpha/opaque.png"][0]).alpha is None


def test_of_an_animation_the_first_frame_is_taken() -> None:
    for path in ("animated/gif.gif", "animated/webp.webp"):
        image = decode_image(good_files()[path][0])
        assert image.is_animated
        assert psnr(image.rgb, np.asarray(picture(seed=0))) > 25
    assert not decode_image(good_files()["plain/photo.jpg"][0]).is_animated


def test_limits_are_the_callers() -> None:
    data = encoded(picture(64, 48), "PNG")
    for limits, reason in (
        (ImageLimits(max_bytes=100), "too_many_bytes"),
        (ImageLimits(max_pixels=1000), "too_many_pixels"),
        (ImageLimits(min_side=50), "too_small"),
    ):
        with pytest.raises(ImageError) as caught:
            decode_image(data, limits=limits)
        assert caught.value.reason == reason


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_raise_nothing_but_image_errors(seed: int) -> None:
    random = np.random.default_rng(seed)
    for data, _ in good_files().values():
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 8):
            damaged[place] = random.integers(256)
        cut = bytes(damaged[: random.integers(1, len(data) + 1)])
        with contextlib.suppress(ImageError):
            assert decode_image(cut).rgb.ndim == 3


def test_decoding_small_is_close_to_decoding_and_shrinking() -> None:
    photo = np.tile(photographs()[0], (3, 3, 1))
    data = encode_jpeg(photo, quality=95)
    small, large = open_image(data, shorter_side=600), open_image(data)
    assert 600 <= min(small.rgb.size) < 1200
    assert (small.original_width, small.original_height) == small.full_size == large.rgb.size
    fast = shrink_shorter_side(small.rgb, 300, full_size=small.full_size)
    slow = shrink_shorter_side(large.rgb, 300)
    assert psnr(np.asarray(fast), np.asarray(slow)) > 35
    assert 300 <= min(decode_image(data, shorter_side=300).rgb.shape[:2]) < 600
    assert decode_image(data, shorter_side=5000).rgb.shape == photo.shape  # never enlarged


def test_resizing_keeps_proportions_and_enlarges_only_when_told() -> None:
    photo = photographs()[0]
    assert resize_shorter_side(photo, 100).shape == (100, 150, 3)
    assert resize_shorter_side(photo.transpose(1, 0, 2), 100).shape == (150, 100, 3)
    assert resize_shorter_side(photo, 2000) is photo
    assert resize_shorter_side(photo, 854, enlarge=True).shape == (854, 1280, 3)


def test_files_that_hold_the_picture_as_it_is_are_known() -> None:
    good = {path: open_image(data).is_as_stored for path, (data, _) in good_files().items()}
    assert not any(good[path] for path in good if path.startswith(("alpha/", "animated/")))
    assert [path for path in good if path.startswith("turned/") and good[path]] == ["turned/1.jpg"]
    as_stored = {"colours/gray.jpg", "colours/gray.png", "plain/photo.jpg", "plain/progressive.jpeg"}
    changed = {"colours/cmyk.jpg", "colours/swapped_profile.jpg", "colours/broken_profile.jpg"}
    assert {path: good[path] for path in as_stored | changed} == {
        **dict.fromkeys(as_stored, True),
        **dict.fromkeys(changed, False),
    }
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_image(encoded(picture(), "JPEG", icc_profile=srgb)).is_as_stored
    two = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert not open_image(two).is_as_stored


def test_a_jpeg_of_many_scans_costs_nothing_and_one_of_a_few_is_taken() -> None:
    assert decode_image(many_scans(20)).rgb.shape == (48, 64, 3)
    hostile = many_scans(0).replace(b"\x00\x30\x00\x40", b"\x23\x28\x23\x28", 1)  # 9,000 x 9,000 pixels
    last = hostile[hostile.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="too_many_scans"):
        decode_image(hostile[:-2] + 1_000_000 * last)


def test_files_are_written_back_faithfully() -> None:
    photo = photographs()[1]
    alpha = np.zeros(photo.shape[:2], np.uint8)
    alpha[:200] = 255
    png = decode_image(encode_image(photo, alpha, "png"))
    assert np.array_equal(png.rgb, photo)
    assert png.alpha is not None
    assert np.array_equal(png.alpha, alpha)
    assert decode_image(encode_image(photo, alpha, "webp")).alpha is not None
    jpeg = decode_image(encode_image(photo, alpha, "jpg"))
    assert psnr(jpeg.rgb[:180], photo[:180]) > 35
    assert (jpeg.rgb[220:] > 250).all()  # what was transparent lies on white


def test_a_jpeg_of_ours_carries_no_metadata_of_its_source() -> None:
    source = encoded(picture(), "JPEG", comment=b"made by somebody", dpi=(300, 300))
    image = Image.fromarray(decode_image(source).rgb)
    assert b"somebody" not in encode_jpeg(np.asarray(image))


def test_difference_hash_tells_pictures_apart_and_knows_them_again() -> None:
    def distance(one: np.ndarray, other: np.ndarray) -> int:
        return (int(difference_hash(one), 16) ^ int(difference_hash(other), 16)).bit_count()

    china, flower = photographs()
    assert len(difference_hash(china)) == 16
    assert distance(china, resize_shorter_side(china, 120)) <= 4
    assert distance(china, decode_image(encode_jpeg(china, quality=40)).rgb) <= 4
    assert distance(china, flower) > 16


def test_pixels_and_tensors_are_one_to_one() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = to_float(every)
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(images), every)
    assert to_uint8(torch.tensor([[[-3.0]], [[0.0]], [[7.0]]])).tolist() == [[[0, 128, 255]]]


def test_sharding_starts_without_torch() -> None:
    program = "import nst.shards, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
