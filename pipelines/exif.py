"""EXIF that may be kept: who, with what and when. Never where (GPS), nor what makers hide in it."""

from __future__ import annotations

import io

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
