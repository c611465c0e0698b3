"""Of a picture's metadata the output keeps who, when and with what, if it is told to, and never where."""

from __future__ import annotations

import io
import struct
from typing import get_args

import pytest
from PIL import ExifTags, Image

from nst.images import ImageFormat, decode_image, encode_image
from pipelines.exif import kept_exif
from tests.bad_images import encoded, picture

XMP = b'<x:xmpmeta><rdf:Description exif:GPSLatitude="48,8.0N" photoshop:City="Nowhere"/></x:xmpmeta>'
PLACE = (b"GPS", b"48,8", b"Nowhere", b"SECRET", b"http://ns.adobe.com", b"Photoshop", b"8BIM")


def photograph() -> bytes:
    """A JPEG that says in four ways where it was taken: EXIF, a maker's note, XMP, IPTC."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Artist] = "A. Photographer"
    exif[ExifTags.Base.XPComment] = "SECRET".encode("utf-16-le")
    photo = exif.get_ifd(ExifTags.IFD.Exif)
    photo[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    photo[ExifTags.Base.MakerNote] = b"SECRET"
    photo[ExifTags.Base.UserComment] = b"ASCII\0\0\0SECRET"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    data = encoded(picture(), "JPEG", exif=exif, xmp=XMP, comment=b"SECRET")
    city = b"\x1c\x02\x5a" + struct.pack(">H", 7) + b"Nowhere"
    record = b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0" + struct.pack(">I", len(city)) + city
    return data[:2] + b"\xff\xed" + struct.pack(">H", len(record) + 2) + record + data[2:]


@pytest.mark.parametrize("format", get_args(ImageFormat))
def test_where_it_was_is_never_kept(format: ImageFormat) -> None:
    source = photograph()
    assert [word for word in PLACE if word not in source] == []
    kept = kept_exif(source)
    assert kept is not None
    rgb = decode_image(source).rgb
    output = encode_image(rgb, None, format, exif=kept)
    assert [word for word in PLACE if word in output] == []
    with Image.open(io.BytesIO(output)) as image:
        found = image.getexif()
        assert dict(found) == {
            ExifTags.Base.Artist: "A. Photographer",
            ExifTags.Base.ExifOffset: found[ExifTags.Base.ExifOffset],
        }
        assert found.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.DateTimeOriginal: "2024:05:06 07:08:09"}
    assert decode_image(output).rgb.shape == rgb.shape  # turned once
    stripped = encode_image(rgb, None, format)
    assert [word for word in (*PLACE, b"Exif", b"EXIF", b"Photographer") if word in stripped] == []


def test_what_is_damaged_or_too_large_is_not_kept() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    assert kept_exif(encoded(picture(), "PNG", exif=exif.tobytes())) is None
    assert kept_exif(encoded(picture(), "JPEG")) is None
    assert kept_exif(encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")) is None
    assert kept_exif(b"no picture") is None
