"""What becomes of one picture in `nst stylize`: decoded, stylized, encoded."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nst.images import ImageFormat, decode_image, encode_image
from nst.networks.style_code import StyleCode
from nst.stylize import Stylizer
from pipelines.exif import kept_exif

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGE = "storage"  # a report's reason where a picture could not be read or written
CODE_VERSION = 2  # raise it when the same settings give other pictures: reruns then do everything again


@dataclass(frozen=True, kw_only=True)
class StylizeSettings:
    """What an output depends on besides source, style and model. `quality` is the encoder's, 1 to 100."""

    strength: float = 1.0
    colors: str = "style"
    max_side: int | None = None
    format: ImageFormat = "jpg"
    quality: int = 92
    keeps_metadata: bool = False
    precision: str = "fp32"

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr([CODE_VERSION, *sorted(asdict(self).items())]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Of a picture's file, what is kept besides the pixels."""

    exif: bytes
    note: str


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """An encoded picture; width and height in px. `note` is what a person should know of it, or empty."""

    data: bytes
    width: int
    height: int
    note: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one item. `reason` and `error` are empty if it went well."""

    reason: str = ""
    error: str = ""
    note: str = ""
    width: int = 0
    height: int = 0
    seconds: float = 0.0
    sha256: str = ""
    num_bytes: int = 0


def decode(data: bytes, settings: StylizeSettings) -> tuple[NDArray[np.uint8], Kept]:
    """Pixels, uint8 [H, W, 3 or 4]. Raises ImageError for what is wrong with the file."""
    decoded = decode_image(data)
    exif = kept_exif(data) if settings.keeps_metadata else None
    more = "several pages: the first" if decoded.format == "tiff" else "animated: its first frame"
    pixels = decoded.rgb if decoded.alpha is None else np.dstack([decoded.rgb, decoded.alpha])
    return pixels, Kept(exif=exif or b"", note=more if decoded.is_animated else "")


def encode(pixels: NDArray[np.uint8], kept: Kept, settings: StylizeSettings) -> Rendered:
    """Stylized pixels as a file: upright, in sRGB, with their alpha."""
    alpha = pixels[:, :, 3] if pixels.shape[2] == 4 else None
    rgb = np.ascontiguousarray(pixels[:, :, :3])
    data = encode_image(rgb, alpha, settings.format, settings.quality, kept.exif)
    return Rendered(data=data, width=pixels.shape[1], height=pixels.shape[0], note=kept.note)


def stylize(
    pixels: NDArray[np.uint8], stylizer: Stylizer, code: StyleCode, settings: StylizeSettings
) -> NDArray[np.uint8]:
    """-> uint8 of as many channels, in the reduced size."""
    return stylizer(
        pixels, code, strength=settings.strength, colors=settings.colors, max_side=settings.max_side
    )


def render(data: bytes, stylizer: Stylizer, code: StyleCode, settings: StylizeSettings) -> Rendered:
    """The bytes of a file -> those of its stylization. Raises ImageError for what is wrong with them."""
    pixels, kept = decode(data, settings)
    pixels = stylize(pixels, stylizer, code, settings)  # a large picture's own are not held any longer
    return encode(pixels, kept, settings)


def stylizer_of(checkpoint_dir: str, settings: StylizeSettings) -> Stylizer:
    return Stylizer.load(checkpoint_dir, dtype=PRECISIONS[settings.precision])
