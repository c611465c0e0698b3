"""EXIF that may be kept: who, with what and when. Never where (GPS), nor what makers hide in it."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import ExifTags, Image

from nst.images import FORMATS

BASE = ExifTags.Base
# The picture is upright already: its orientation must not turn it again. The thumbnail shows the old picture.
KEPT = (BASE.ImageDescription, BASE.Make, BASE.Model, BASE.DateTime, BASE.Artist, BASE.Copyright)
KEPT_OF_THE_PHOTO = (
    *(BASE.ExposureTime, BASE.FNumber, BASE.ExposureProgram, BASE.ISOSpeedRatings, BASE.DateTimeOriginal),
    *(BASE.DateTimeDigitized, BASE.OffsetTimeOriginal, BASE.ExposureBiasValue, BASE.Flash, BASE.FocalLength),
    *(BASE.FocalLengthIn35mmFilm, BASE.LensMake, BASE.LensModel),
)
FORMATS_THAT_KEEP = ("jpg", "png")
MAX_SEGMENT = 65_533


def kept_exif(data: bytes) -> bytes | None:
    """The EXIF block of an image file, reduced to what may be kept; None if that is nothing."""
    kept = Image.Exif()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            found = image.getexif()
            photo = found.get_ifd(ExifTags.IFD.Exif)
        for tags, source, target in (
            (KEPT, found, kept),
            (KEPT_OF_THE_PHOTO, photo, kept.get_ifd(ExifTags.IFD.Exif)),
        ):
            target.update({tag: source[tag] for tag in tags if tag in source})
        block = kept.tobytes()
    except Exception:  # noqa: BLE001 - damaged EXIF is common in good pictures, and Pillow raises anything on it
        return None
    has_any = len(kept) > 0 or len(kept.get_ifd(ExifTags.IFD.Exif)) > 0
    return block if has_any and len(block) <= MAX_SEGMENT else None


def with_exif(encoded: bytes, exif: bytes, format: str) -> bytes:
    """A JPEG or PNG file with an EXIF block (`Exif\\0\\0` and TIFF) put into it."""
    if format == "jpg":
        return encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + encoded[2:]
    assert format == "png", format
    body = b"eXIf" + exif.removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    after_header = 8 + 25  # signature, IHDR
    return encoded[:after_header] + chunk + encoded[after_header:]
