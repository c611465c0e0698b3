"""A folder of difficult images, as people have them. Says of each whether it must be taken, or why not."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, kw_only=True)
class DifficultImages:
    """`taken`: path below the folder -> (width, height) in pixels as a person sees it, upright.
    `refused`: path -> the reason's code. `hidden`: paths that nobody means."""

    taken: dict[str, tuple[int, int]]
    refused: dict[str, str]
    hidden: list[str]


def picture(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    """Smooth colours with a red corner at the top left, so that a turned picture shows."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(40, 200, (4, 4, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((255, 0, 0), (0, 0, width // 3, height // 3))
    return image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def turned(orientation: int, seed: int = 0) -> bytes:
    """A JPEG that shows `picture()` upright once its EXIF orientation is applied."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = picture(seed=seed)
    image = image if stored is None else image.transpose(stored)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return encoded(image, "JPEG", quality=95, exif=exif)


def swapped_profile() -> bytes:
    """An RGB profile whose red and green primaries change places: what the pixels call red is green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    num_tags = struct.unpack(">I", profile[128:132])[0]
    places = {bytes(profile[place : place + 4]): place for place in range(132, 132 + 12 * num_tags, 12)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    description = bytes(profile).find("sRGB".encode("utf-16-be"))
    if description >= 0:
        profile[description : description + 8] = "swap".encode("utf-16-be")
    return bytes(profile)


def png_with_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is `width` x `height` pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animation(format: str) -> bytes:
    frames = [picture(seed=seed) for seed in (0, 1, 2)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)


def many_scans(num_more: int) -> bytes:
    """A progressive JPEG that says its last scan `num_more` times over."""
    jpeg = encoded(picture(), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + num_more * last + jpeg[-2:]


def good_files() -> dict[str, tuple[bytes, tuple[int, int]]]:
    """path -> (bytes, (width, height) as seen)."""
    image, size = picture(), (64, 48)
    alpha = Image.new("L", size, 255)
    alpha.paste(0, (32, 0, 64, 48))
    with_alpha = image.copy()
    with_alpha.putalpha(alpha)
    gray = image.convert("L")
    gray_with_alpha = gray.copy()
    gray_with_alpha.putalpha(alpha)
    deep = np.asarray(gray).astype(np.uint16) * 257
    good = {
        "plain/photo.jpg": encoded(image, "JPEG"),
        "plain/UPPER.JPG": encoded(picture(seed=1), "JPEG"),
        "plain/progressive.jpeg": encoded(picture(seed=2), "JPEG", progressive=True),
        "plain/no_suffix": encoded(picture(seed=3), "JPEG"),
        "plain/really_a_png.jpg": encoded(picture(seed=4), "PNG"),
        "plain/with.many.dots.jpg": encoded(picture(seed=5), "JPEG"),
        "plain/with space.jpg": encoded(picture(seed=6), "JPEG"),
        "plain/Überraschung 画.jpg": encoded(picture(seed=7), "JPEG"),
        "colours/cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "colours/gray.jpg": encoded(gray, "JPEG"),
        "colours/gray.png": encoded(gray, "PNG"),
        "colours/gray_16_bit.png": encoded(Image.fromarray(deep), "PNG"),
        "colours/black_and_white.png": encoded(gray.convert("1"), "PNG"),
        "colours/palette.png": encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "colours/swapped_profile.jpg": encoded(image, "JPEG", icc_profile=swapped_profile()),
        "colours/broken_profile.jpg": encoded(picture(seed=8), "JPEG", icc_profile=b"no profile at all"),
        "alpha/rgba.png": encoded(with_alpha, "PNG"),
        "alpha/gray.png": encoded(gray_with_alpha, "PNG"),
        "alpha/palette.png": encoded(
            image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=0
        ),
        "alpha/webp.webp": encoded(with_alpha, "WEBP", lossless=True),
        "alpha/opaque.png": encoded(picture(seed=9).convert("RGBA"), "PNG"),
        "animated/gif.gif": animation("GIF"),
        "animated/webp.webp": animation("WEBP"),
        "formats/bmp.bmp": encoded(image, "BMP"),
        "formats/tiff.tif": encoded(image, "TIFF"),
        "formats/webp.webp": encoded(image, "WEBP"),
    }
    return {path: (data, size) for path, data in good.items()} | {
        f"turned/{orientation}.jpg": (turned(orientation), size) for orientation in range(1, 9)
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """path -> (bytes, reason)."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    jpeg, png = encoded(Image.fromarray(noise), "JPEG"), encoded(Image.fromarray(noise), "PNG")
    webp = encoded(Image.fromarray(noise), "WEBP")
    damaged = bytearray(png)
    damaged[len(png) // 2] ^= 0xFF
    return {
        "broken/empty.jpg": (b"", "empty"),
        "broken/text.jpg": (b"this is a letter, not a picture\n" * 20, "not_an_image"),
        "broken/zeros.png": (b"\0" * 4096, "not_an_image"),
        "broken/cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "broken/cut.png": (png[: len(png) // 2], "truncated"),
        "broken/cut.webp": (webp[: len(webp) // 2], "truncated"),
        "broken/damaged.png": (bytes(damaged), "corrupt"),
        "broken/only_a_header.jpg": (jpeg[:20], "corrupt"),
        "broken/bomb.png": (png_with_header(60_000, 60_000), "too_many_pixels"),
        "broken/scans.jpg": (many_scans(100), "too_many_scans"),
        "broken/tiny.png": (encoded(picture(1, 1), "PNG"), "too_small"),
        "broken/thin.png": (encoded(picture(400, 4), "PNG"), "too_small"),
        "broken/floats.tif": (encoded(Image.fromarray(np.ones((32, 32), np.float32)), "TIFF"), "unsupported"),
        "broken/phone.jpg": (b"\0\0\0\x18ftypheic" + b"\0" * 64, "unsupported"),
        "notes/README.md": (b"# about these pictures\n", "not_an_image"),
        "notes/table.csv": (b"path,label\n", "not_an_image"),
    }


def make_difficult_images(folder: str | Path) -> DifficultImages:
    """Writes all of them."""
    good, bad = good_files(), bad_files()
    hidden = {".DS_Store": b"\0", "plain/.hidden.jpg": b"\0"}
    for path, data in [*((path, data) for path, (data, _) in (good | bad).items()), *hidden.items()]:
        target = Path(folder, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return DifficultImages(
        taken={path: size for path, (_, size) in good.items()},
        refused={path: reason for path, (_, reason) in bad.items()},
        hidden=sorted(hidden),
    )
