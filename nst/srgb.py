"""Pixels of any kind -> sRGB and alpha: modes of Pillow, ICC profiles, CMYK, 16 bits, palettes."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from nst.image_headers import ImageError

MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# 6 x 6 x 6 colours, which tell whether a profile changes any: its name may say sRGB and it may not be.
PROBE = np.stack(np.meshgrid(*3 * [range(0, 256, 51)], indexing="ij"), -1).reshape(18, 12, 3).astype(np.uint8)
LARGEST_ROUNDING = 2  # of 255: what makers' ways to write sRGB's curve differ in


def to_srgb(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A loaded image of any mode -> (mode RGB in sRGB, mode L alpha or None where all is opaque).

    Raises ImageError for pixels that have no meaning in 8 bits.
    """
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I"):
        image, alpha = _gray_of_16_bits(image)
    elif "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        alpha = with_alpha.getchannel("A")
        image = image.convert("L") if image.mode in ("L", "LA", "La") else with_alpha.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "YCbCr"):
        image = image.convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK"):
        raise ImageError("unsupported", f"pixels of mode {image.mode}; convert it to an 8-bit PNG or JPEG")
    transform = _transform(profile, image.mode) if profile and not _is_srgb(profile) else None
    if transform is not None:
        rgb = transform.apply(image)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    rgb.info = {}  # Pillow would copy a comment and more from here into the next file
    is_opaque = alpha is None or alpha.getextrema() == (255, 255)
    return rgb, None if is_opaque else alpha


def is_in_srgb(image: Image.Image) -> bool:
    """Whether the pixels as stored are sRGB (or gray) already."""
    profile = image.info.get("icc_profile")
    return image.mode in ("RGB", "L") and (not profile or _is_srgb(profile))


def _gray_of_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported", "32-bit gray pixels; convert it to an 8-bit PNG or JPEG")
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return gray, None
    return gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


@functools.lru_cache(maxsize=32)
def _transform(profile_data: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where the profile is for another kind of pixels, or is damaged (viewers ignore such profiles)."""
    try:
        profile: Any = ImageCms.getOpenProfile(io.BytesIO(profile_data))
        if MODE_OF_SPACE.get(profile.profile.xcolor_space.strip()) != mode:
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


@functools.lru_cache(maxsize=32)
def _is_srgb(profile_data: bytes) -> bool:
    if (transform := _transform(profile_data, "RGB")) is None:
        return False
    changed = np.asarray(transform.apply(Image.fromarray(PROBE)))
    return bool(np.abs(changed.astype(int) - PROBE).max() <= LARGEST_ROUNDING)
