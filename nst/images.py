"""Image files as they are found in the wild -> upright sRGB pixels, and back to files and tensors.

Bytes are untrusted: only the formats below are ever parsed, sizes are checked before pixels are made, and
whatever is wrong with a file becomes an `ImageError` with a code that can be counted.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from nst import jpeg

if TYPE_CHECKING:
    import torch

ImageFormat = Literal["jpg", "png", "webp"]
Pixels = NDArray[np.uint8]

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

# Pillow warns of damaged metadata in pictures that are fine, and of sizes that our limits allow. (Not with
# catch_warnings around a call: that is not safe in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

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
# A JPEG may have its decoder go over the whole picture as often as it likes: a megabyte can keep it busy for
# an hour. Cameras and editors write one scan, or about ten.
MAX_SCANS = 100


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


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """An upright sRGB picture: `rgb` has Pillow mode RGB, `alpha` mode L or is None where all is opaque.

    `original_width` and `original_height` are those stored in the file: before its EXIF orientation turned
    the picture and before the decoder shrank it. `format` is Pillow's name in lower case. Of an animation,
    the first frame. `is_as_stored`: the file holds this picture and no other, upright, opaque and in sRGB.
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
    data: bytes, *, limits: ImageLimits = ImageLimits(), shorter_side: int | None = None
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
        rgb=np.array(opened.rgb),
        alpha=None if opened.alpha is None else np.array(opened.alpha),
        original_width=opened.original_width,
        original_height=opened.original_height,
        format=opened.format,
        is_animated=opened.is_animated,
    )


def open_image(
    data: bytes, *, limits: ImageLimits = ImageLimits(), shorter_side: int | None = None
) -> OpenedImage:
    """`decode_image`, kept as Pillow images: saves two copies where they are resized and encoded next."""
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data):,} bytes; at most {limits.max_bytes:,} are read")
    with _translated_errors(data):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        _check_size(width, height, limits)
        if image.format in JPEG_FORMATS:
            _check_scans(data)
        if shorter_side is not None and image.format in JPEG_FORMATS:
            shrink = shorter_side / min(width, height)
            if shrink < 1:
                image.draft(None, (-int(-width * shrink // 1), -int(-height * shrink // 1)))
        is_animated = image.format not in JPEG_FORMATS and bool(getattr(image, "is_animated", False))
        image.load()
        orientation = _orientation(image)
        turn = TURNS.get(orientation)
        is_as_stored = turn is None and not is_animated and image.format != "MPO" and _is_in_srgb(image)
        rgb, alpha = _to_srgb(image)
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


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    size = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise ImageError("too_many_pixels", f"{size}; at most {limits.max_pixels:,} pixels are taken")
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{size}; each side needs {limits.min_side} pixels or more")


def _check_scans(data: bytes) -> None:
    if (num_scans := jpeg.count_scans(data)) > MAX_SCANS:
        raise ImageError("too_many_scans", f"{num_scans:,} scans; at most {MAX_SCANS} are decoded")


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


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF is common in good pictures: viewers show them unturned
        return 1


def _to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Any mode -> (mode RGB in sRGB, mode L alpha or None where all is opaque)."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I"):
        image = _gray_of_16_bits(image)
    elif "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        alpha = None if alpha.getextrema() == (255, 255) else alpha
        image = image.convert("L") if image.mode in ("L", "LA", "La") else with_alpha.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "YCbCr"):
        image = image.convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK"):
        raise ImageError("unsupported", f"pixels of mode {image.mode}; convert it to an 8-bit PNG or JPEG")
    transform = _transform_to_srgb(profile, image.mode) if profile else None
    if transform is not None:
        rgb = transform.apply(image)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}  # Pillow would copy a comment and more from here into the next file
    return rgb, alpha


def _gray_of_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", "32-bit gray pixels; convert it to an 8-bit PNG or JPEG")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


@functools.lru_cache(maxsize=32)
def _transform_to_srgb(profile_data: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing is to be done: the profile is sRGB, is for another kind of pixels, or is damaged
    (viewers ignore such profiles too)."""
    try:
        profile: Any = ImageCms.getOpenProfile(io.BytesIO(profile_data))
        space = profile.profile.xcolor_space.strip()
        if _is_srgb(profile_data) or {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != mode:
            return None
        return ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _is_in_srgb(image: Image.Image) -> bool:
    profile = image.info.get("icc_profile")
    return image.mode in ("RGB", "L") and (not profile or _is_srgb(profile))


@functools.lru_cache(maxsize=32)
def _is_srgb(profile_data: bytes) -> bool:
    try:
        profile: Any = ImageCms.getOpenProfile(io.BytesIO(profile_data))
        is_rgb = profile.profile.xcolor_space.strip() == "RGB"
        return is_rgb and ImageCms.getProfileDescription(profile).startswith("sRGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return False


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


def encode_jpeg(rgb: Pixels | Image.Image, quality: int = 92) -> bytes:
    """uint8 [H, W, 3] (or a Pillow RGB image) -> JPEG bytes without metadata.

    Colours are kept at full resolution (4:4:4): brush strokes differ in colour more than in brightness. Costs
    a sixth more bytes than 4:2:0.
    """
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def encode_image(rgb: Pixels, alpha: Pixels | None, format: ImageFormat, quality: int = 92) -> bytes:
    """uint8 [H, W, 3] and uint8 [H, W] or None -> the bytes of a file without metadata.

    JPEG holds no alpha: the picture is laid on white. `quality` (1 to 100) does not concern PNG.
    """
    image = Image.fromarray(rgb)
    mask = None if alpha is None else Image.fromarray(alpha)
    if format == "jpg":
        return encode_jpeg(over_white(image, mask), quality)
    if mask is not None:
        image.putalpha(mask)
    buffer = io.BytesIO()
    if format == "png":
        image.save(buffer, "PNG")
    else:
        image.save(buffer, "WEBP", quality=quality)
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
