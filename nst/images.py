"""Image files as they are found in the wild -> upright sRGB pixels, and back to files and tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nst import srgb
from nst.image_headers import (
    DEFAULT_LIMITS,
    FORMATS,
    JPEG_FORMATS,
    SUFFIXES,
    ImageError,
    ImageLimits,
    check_num_bytes,
    opened,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "DecodedImage",
    "ImageError",
    "ImageFormat",
    "ImageLimits",
    "OpenedImage",
    "Pixels",
    "check_num_bytes",
    "decode_image",
    "difference_hash",
    "encode_image",
    "encode_jpeg",
    "open_image",
    "over_white",
    "resize_shorter_side",
    "shrink_shorter_side",
    "to_float",
    "to_uint8",
]

ImageFormat = Literal["jpg", "png", "webp"]
Pixels = NDArray[np.uint8]

ORIENTATION_TAG = 0x0112
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
ROWS_AT_ONCE = 256  # of a picture that leaves Pillow


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """An upright sRGB picture: `rgb` has Pillow mode RGB, `alpha` mode L or is None where all is opaque.

    `original_width` and `original_height` are those stored in the file: before its EXIF orientation turned
    the picture and before the decoder shrank it. `format` is Pillow's name in lower case. Of an animation,
    the first frame; of a TIFF of several pages, which counts as one, the first page. `is_as_stored`: the file
    holds this picture and no other, upright, opaque and in sRGB.
    """

    rgb: Image.Image
    alpha: Image.Image | None
    original_width: int
    original_height: int
    full_size: tuple[int, int]
    is_as_stored: bool
    format: str
    is_animated: bool


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """`OpenedImage` as arrays: `rgb` uint8 [H, W, 3] in sRGB, `alpha` uint8 [H, W] or None where all is
    opaque. The colours under a transparent pixel are those of the file."""

    rgb: Pixels
    alpha: Pixels | None
    original_width: int
    original_height: int
    format: str
    is_animated: bool


def decode_image(
    data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, shorter_side: int | None = None
) -> DecodedImage:
    """The bytes of an image file -> upright sRGB pixels.

    Args:
        shorter_side: lets the JPEG decoder shrink while it decodes, which is several times faster for large
            photographs. The result's shorter side is never below this, but may well be above.

    Raises:
        ImageError: for everything that is wrong with the file.
    """
    opened = open_image(data, limits=limits, shorter_side=shorter_side)
    return DecodedImage(
        rgb=_pixels_of(opened.rgb),
        alpha=None if opened.alpha is None else _pixels_of(opened.alpha),
        original_width=opened.original_width,
        original_height=opened.original_height,
        format=opened.format,
        is_animated=opened.is_animated,
    )


def _pixels_of(image: Image.Image) -> Pixels:
    """uint8 [H, W] or [H, W, 3]. By rows: a whole picture that leaves Pillow is in memory three times."""
    pixels = np.empty((image.height, image.width, *(3,) * (image.mode == "RGB")), np.uint8)
    for top in range(0, image.height, ROWS_AT_ONCE):
        bottom = min(top + ROWS_AT_ONCE, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def open_image(
    data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, shorter_side: int | None = None
) -> OpenedImage:
    """`decode_image`, kept as Pillow images: saves two copies where they are resized and encoded next."""
    with opened(data, limits) as image:
        width, height = image.size
        if shorter_side is not None and image.format in JPEG_FORMATS:
            shrink = shorter_side / min(width, height)
            if shrink < 1:
                image.draft(None, (-int(-width * shrink // 1), -int(-height * shrink // 1)))
        is_animated = image.format not in JPEG_FORMATS and bool(getattr(image, "is_animated", False))
        image.load()
        orientation = _orientation(image)
        turn = TURNS.get(orientation)
        is_as_stored = turn is None and not is_animated and image.format != "MPO" and srgb.is_in_srgb(image)
        rgb, alpha = srgb.to_srgb(image)
        if turn is not None:
            rgb = rgb.transpose(turn)
            alpha = None if alpha is None else alpha.transpose(turn)
    return OpenedImage(
        rgb=rgb,
        alpha=alpha,
        original_width=width,
        original_height=height,
        full_size=(height, width) if orientation in SIDEWAYS else (width, height),
        is_as_stored=is_as_stored and alpha is None,
        format="jpeg" if image.format in JPEG_FORMATS else str(image.format).lower(),
        is_animated=is_animated,
    )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF is common in good pictures: viewers show them unturned
        return 1


def over_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """The picture as it looks on paper. Mode RGB and mode L (or None) -> mode RGB."""
    if alpha is None:
        return rgb
    return Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)


def shrink_shorter_side(
    image: Image.Image, size: int, *, full_size: tuple[int, int] | None = None
) -> Image.Image:
    """A Pillow image whose shorter side is `size` pixels; never enlarges. Its proportions are those of
    `full_size`, which a decoder that shrank it has rounded (None: those of the image)."""
    if min(image.size) <= size:
        return image
    target = _with_shorter_side(full_size or image.size, size)
    return image.resize(target, Image.Resampling.LANCZOS, reducing_gap=2.0)


def resize_shorter_side(rgb: Pixels, size: int, *, enlarge: bool = False) -> Pixels:
    """uint8 [H, W, 3] -> uint8 [H', W', 3] with min(H', W') = size, in the same proportions (Lanczos).

    A smaller picture is returned as it is unless `enlarge`.
    """
    shorter = min(rgb.shape[:2])
    if shorter == size or (shorter < size and not enlarge):
        return rgb
    image = Image.fromarray(rgb)
    target = _with_shorter_side(image.size, size)
    return np.array(image.resize(target, Image.Resampling.LANCZOS, reducing_gap=2.0))


def _with_shorter_side(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    scale = shorter / min(size)
    width, height = (max(shorter, round(side * scale)) for side in size)
    return width, height


def encode_jpeg(rgb: Pixels | Image.Image, quality: int = 92, exif: bytes = b"") -> bytes:
    """uint8 [H, W, 3] (or a Pillow RGB image) -> JPEG bytes without metadata, but for `exif`.

    Colours are kept at full resolution (4:4:4): brush strokes differ in colour more than in brightness. Costs
    a sixth more bytes than 4:2:0.
    """
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4", exif=exif)
    return buffer.getvalue()


def encode_image(
    rgb: Pixels, alpha: Pixels | None, format: ImageFormat, quality: int = 92, exif: bytes = b""
) -> bytes:
    """uint8 [H, W, 3] and uint8 [H, W] or None -> the bytes of a file without metadata, but for `exif` (a
    block that begins with `Exif`).

    JPEG holds no alpha: the picture is laid on white. `quality` (1 to 100) does not concern PNG.
    """
    image = Image.fromarray(rgb)
    mask = None if alpha is None else Image.fromarray(alpha)
    if format == "jpg":
        return encode_jpeg(over_white(image, mask), quality, exif)
    if mask is not None:
        image.putalpha(mask)
    buffer = io.BytesIO()
    if format == "png":
        image.save(buffer, "PNG", exif=exif)
    else:
        image.save(buffer, "WEBP", quality=quality, exif=exif)
    return buffer.getvalue()


def difference_hash(rgb: Pixels | Image.Image) -> str:
    """The 64-bit difference hash of a picture as 16 hex digits: pictures that look alike differ in few bits.

    Brightness on a grid of 8 rows and 9 columns; a bit says whether a cell is brighter than the one on its
    left.
    """
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    gray = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR, reducing_gap=2.0)
    cells = np.asarray(gray)  # [8, 9]
    return np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes().hex()


def to_float(rgb: Pixels) -> torch.Tensor:
    """uint8 [..., H, W, 3] in 0 .. 255 -> float32 [..., 3, H, W] in [-1, 1]."""
    import torch  # here: a process that shards images starts seconds sooner without it

    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).movedim(-1, -3)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> Pixels:
    """Floats [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3]; what lies outside is cut off."""
    import torch

    scaled = images.detach().to("cpu", torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8).movedim(-3, -1).contiguous().numpy()
