"""What is said of an image file before its pixels are made: its kind, its size, whether it can be taken.

Bytes are untrusted: only the formats below are ever parsed, sizes are checked before pixels are made, and
whatever is wrong with a file becomes an `ImageError` with a code that can be counted.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image, TiffImagePlugin, features

from nst import jpeg

# Optional parts of Pillow come last: its packages have them, a build from source may not.
FORMATS = (
    *("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM"),
    *(name for name in ("WEBP", "AVIF") if features.check(name.lower())),
)
# What Pillow calls a JPEG with a second picture behind the first, as phones make them.
JPEG_FORMATS = ("JPEG", "MPO")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".tif", ".tiff"),
    *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
SIGNATURES_NOT_READ = {
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heif", b"mif1", b"msf1")
# A JPEG may have its decoder go over the whole picture as often as it likes: a megabyte can keep it busy for
# an hour. Cameras and editors write one scan, or about ten.
MAX_SCANS = 100

# Pillow warns of damaged metadata in pictures that are fine, and of sizes that our limits allow. (Not with
# catch_warnings around a call: that is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(Exception):
    """An image that cannot be taken.

    `reason` is one of empty, too_many_bytes, not_an_image, unsupported, truncated, too_many_pixels,
    too_small, too_many_scans, corrupt, crash; `detail` says more to a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused without decoding it. Pillow itself refuses more than 178,956,970 pixels, whatever
    stands here."""

    max_bytes: int = 256 << 20
    max_pixels: int = 178_956_970
    min_side: int = 16


DEFAULT_LIMITS = ImageLimits()


def check_num_bytes(num_bytes: int, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raises ImageError for a file of no bytes or too many, which need not be read to know that."""
    if not num_bytes:
        raise ImageError("empty", "the file has no bytes")
    if num_bytes > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{num_bytes:,} bytes; at most {limits.max_bytes:,} are read")


@contextmanager
def opened(data: bytes, limits: ImageLimits) -> Iterator[Image.Image]:
    """A Pillow image whose pixels are not made yet. Raises ImageError for what is wrong with the file, also
    where that shows later, within the block."""
    check_num_bytes(len(data), limits)
    with _translated_errors(data):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, limits)
        if image.format in JPEG_FORMATS and (num_scans := jpeg.count_scans(data)) > MAX_SCANS:
            raise ImageError("too_many_scans", f"{num_scans:,} scans; at most {MAX_SCANS} are decoded")
        yield image


def _check_size(image: Any, limits: ImageLimits) -> None:
    width, height = image.size
    size = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{size}; at most {limits.max_pixels:,} pixels are taken")
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{size}; each side needs {limits.min_side} pixels or more")
    if image.format == "TIFF":  # a tile is made as a whole, however little of it the picture needs
        tile = [image.tag_v2.get(tag, 1) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)]
        if tile[0] * tile[1] > limits.max_pixels:
            raise ImageError("too_many_pixels", f"tiles of {tile[0]} x {tile[1]} in a picture of {size}")


@contextmanager
def _translated_errors(data: bytes) -> Iterator[None]:
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise _unidentified(data) from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except Exception as error:  # noqa: BLE001 - on hostile bytes Pillow's parsers raise whatever they run into
        text = f"{type(error).__name__}: {error}"
        is_cut = "truncated" in text.lower() or isinstance(error, EOFError) or _is_cut_riff(data)
        raise ImageError("truncated" if is_cut else "corrupt", text) from None


def _unidentified(data: bytes) -> ImageError:
    if _is_cut_riff(data):
        return ImageError("truncated", "a WebP file that is shorter than its header says")
    for signature, name in SIGNATURES_NOT_READ.items():
        if data.startswith(signature):
            return ImageError("unsupported", f"{name} files are not read; convert it to PNG or JPEG")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        return ImageError("unsupported", "HEIF files are not read; convert it to PNG or JPEG")
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            return ImageError("corrupt", f"begins like a {name}, but its header cannot be read")
    return ImageError("not_an_image", f"begins with {data[:12]!r}, like no image format that is read")


def _is_cut_riff(data: bytes) -> bool:
    is_webp = len(data) >= 12 and data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return is_webp and struct.unpack("<I", data[4:8])[0] + 8 > len(data)
