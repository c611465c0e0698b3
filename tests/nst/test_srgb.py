"""Pixels of every kind that files hold come out as the sRGB colours and the alpha that they mean."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from nst.images import ImageError, decode_image, open_image
from tests.bad_images import encoded, picture

RGB = np.asarray(picture())  # [48, 64, 3]
GRAY = np.asarray(picture().convert("L"))
LEFT_HALF = np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(48, 0)  # of alpha


def png(bits: int, kind: int, values: np.ndarray, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG as Pillow does not write them. `kind`: 0 gray, 2 RGB, 4 gray and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    packed = np.packbits(values > 0, axis=1) if bits == 1 else values.astype(">u2" if bits == 16 else ">u1")
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    if transparent:
        chunks += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint16) * 257


def with_alpha(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.concatenate([values.reshape(48, 64, -1), alpha[..., None]], axis=2)


def difference(data: bytes, expected: np.ndarray) -> float:
    """Mean absolute difference of the decoded colours, of 255."""
    decoded = decode_image(data).rgb.astype(int)
    expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
    assert decoded.shape == expected.shape
    return float(np.abs(decoded - expected).mean())


@pytest.mark.parametrize(
    ("data", "expected", "alpha"),
    [
        (png(16, 2, deep(RGB)), RGB, None),
        (png(16, 6, with_alpha(deep(RGB), deep(LEFT_HALF))), RGB, LEFT_HALF),
        (png(16, 4, with_alpha(deep(GRAY), deep(LEFT_HALF))), GRAY, LEFT_HALF),
        (png(16, 0, deep(GRAY), (int(GRAY[0, 0]) * 257,)), GRAY, (GRAY[0, 0] != GRAY) * 255),
        (png(8, 0, GRAY, (int(GRAY[0, 0]),)), GRAY, (GRAY[0, 0] != GRAY) * 255),
        (png(8, 2, RGB, (255, 0, 0)), RGB, (RGB != (255, 0, 0)).any(2) * 255),
        (png(1, 0, LEFT_HALF), LEFT_HALF, None),
        (png(1, 0, LEFT_HALF, (0,)), LEFT_HALF, LEFT_HALF),
        (b"P5 64 48 65535\n" + deep(GRAY).astype(">u2").tobytes(), GRAY, None),
        (encoded(Image.fromarray(deep(GRAY)), "TIFF"), GRAY, None),
        (encoded(picture(), "TIFF", compression="tiff_lzw"), RGB, None),
        (encoded(Image.fromarray(with_alpha(RGB, LEFT_HALF)), "TIFF"), RGB, LEFT_HALF),
        (encoded(Image.fromarray(LEFT_HALF).convert("1"), "TIFF", compression="group4"), LEFT_HALF, None),
        (encoded(picture().convert("CMYK"), "TIFF"), RGB, None),
    ],
    ids=[
        *("16-bit RGB", "16-bit RGBA", "16-bit gray and alpha", "16-bit gray, one of them transparent"),
        *("gray, one transparent", "RGB, one transparent", "1 bit", "1 bit, black transparent"),
        *("16-bit PGM", "16-bit TIFF", "TIFF, LZW", "TIFF with alpha", "fax", "CMYK TIFF"),
    ],
)
def test_pixels_mean_what_they_say(data: bytes, expected: np.ndarray, alpha: np.ndarray | None) -> None:
    assert difference(data, expected) == 0
    found = decode_image(data).alpha
    if alpha is None:
        assert found is None
    else:
        assert found is not None
        assert np.array_equal(found, alpha)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF"])
def test_lossy_and_other_formats_are_close(format: str) -> None:
    source = picture().convert("P", palette=Image.Palette.ADAPTIVE) if format == "GIF" else picture()
    more = {"save_all": True, "append_images": [picture(seed=1)]} if format == "MPO" else {}
    decoded = decode_image(encoded(source, format, **more))
    assert np.abs(decoded.rgb.astype(int) - RGB).mean() < 4
    assert not decoded.is_animated  # the second picture of a phone's is no animation


def test_a_palette_has_transparent_colours() -> None:
    source = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    corner = source.getpixel((0, 0))
    assert isinstance(corner, int)
    levels = bytearray(b"\xff" * 256)
    levels[corner] = 128
    for data, level in (
        (encoded(source, "PNG", transparency=bytes(levels)), 128),
        (encoded(source, "GIF", transparency=corner), 0),
    ):
        alpha = decode_image(data).alpha
        assert alpha is not None
        assert set(np.unique(alpha)) == {level, 255}
        assert (alpha[:16, :21] == level).all()


def test_of_several_pages_or_frames_the_first_is_taken_and_it_is_known() -> None:
    for format in ("TIFF", "PNG", "GIF", "WEBP"):
        frames = {"save_all": True, "append_images": [picture(seed=1), picture(seed=2)]}
        decoded = decode_image(encoded(picture(), format, **frames))
        assert decoded.is_animated
        assert np.abs(decoded.rgb.astype(int) - RGB).mean() < 4


@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "AVIF", "TIFF", "TIFF, LZW"])
def test_orientation_counts_in_every_format(format: str, orientation: int) -> None:
    turns = {
        3: Image.Transpose.ROTATE_180,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(turns[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    if format.startswith("TIFF"):
        compression = "tiff_lzw" if "LZW" in format else None
        data = encoded(stored, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    else:
        data = encoded(stored, format, exif=exif.tobytes())
    opened = open_image(data)
    assert opened.full_size == opened.rgb.size == (64, 48)
    assert difference(data, RGB) < 4


# Profiles


def linear_profile() -> bytes:
    """Its description begins with sRGB, but its curve is a straight line, as some editors' are."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para")
    profile[curve + 8 : curve + 10] = b"\0\0"  # gamma alone
    profile[curve + 12 : curve + 16] = b"\0\1\0\0"  # of 1
    assert b"sRGB" in bytes(profile) or "sRGB".encode("utf-16-be") in bytes(profile)
    return bytes(profile)


def ink_profile() -> bytes:
    """A CMYK profile whose inks are another printer's: cyan and magenta change places. Tables of two points a
    channel to L*a*b*, as the ICC specification's lut8Type has them."""
    inks = np.stack(np.meshgrid(*4 * [[0.0, 1.0]], indexing="ij"), -1).reshape(16, 4)  # black varies fastest
    colours = (1 - inks[:, [1, 0, 2]]) * (1 - inks[:, 3:])
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    lab = np.asarray(to_lab.apply(Image.fromarray((colours * 255).astype(np.uint8)[None])))[0] ^ (0, 128, 128)
    identity = np.arange(256, dtype=np.uint8).tobytes()
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix
    table += 4 * identity + lab.astype(np.uint8).tobytes() + 3 * identity
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"A2B0": table, b"wtpt": white}
    place, directory, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        directory += name + struct.pack(">II", place + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = bytearray(128)
    header[:4] = struct.pack(">I", 128 + len(directory) + len(body))
    header[8:12] = b"\x02\x40\0\0"
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    return bytes(header) + directory + body


def test_cmyk_follows_its_profile_and_adobes_polarity() -> None:
    ink = picture().convert("CMYK")
    assert difference(encoded(ink, "JPEG", quality=100), RGB) < 2  # stored inverted, as Adobe does
    profiled = decode_image(encoded(ink, "JPEG", quality=100, icc_profile=ink_profile())).rgb.astype(int)
    # Red is yellow and magenta; with this printer's inks yellow and cyan, which is green.
    assert np.abs(profiled[4, 4] - (0, 255, 0)).max() <= 16
    as_tiff = decode_image(encoded(ink, "TIFF", icc_profile=ink_profile())).rgb.astype(int)
    assert np.abs(as_tiff - profiled).mean() < 4


def test_a_profile_is_what_it_does_and_not_what_it_is_called() -> None:
    linear = encoded(picture(), "PNG", icc_profile=linear_profile())
    as_srgb = 255 * np.where(
        RGB <= 0.0031308 * 255, RGB / 255 * 12.92, 1.055 * (RGB / 255) ** (1 / 2.4) - 0.055
    )
    assert difference(linear, as_srgb.round().astype(int)) < 1.5
    assert not open_image(linear).is_as_stored


def test_a_gray_picture_follows_its_gray_profile() -> None:
    gamma = bytearray(linear_profile())
    gamma[16:20] = b"GRAY"
    place = bytes(gamma).index(b"rTRC", 128)
    gamma[place : place + 4] = b"kTRC"
    data = encoded(Image.fromarray(GRAY), "PNG", icc_profile=bytes(gamma))
    assert decode_image(data).rgb.mean() > GRAY.mean() + 30


def test_a_tile_that_is_much_larger_than_its_picture_is_not_made() -> None:
    """A megabyte of zeros could stand for gigabytes of a tile."""
    pixels = zlib.compress(bytes(1000))
    pixels += b"\0" * (len(pixels) % 2)
    fields = [(256, 64), (257, 48), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40_000), (323, 40_000)]
    fields += [(324, 8), (325, len(pixels))]
    directory = struct.pack("<H", len(fields)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, n) for tag, n in fields
    )
    tiff = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4)
    with pytest.raises(ImageError, match="tiles of 40000 x 40000") as caught:
        decode_image(tiff)
    assert caught.value.reason == "too_many_pixels"
