"""Pictures as people hold them (PIL, uint8 arrays, float tensors) and as networks take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from nst.images import ImageError, to_float, to_uint8
from nst.srgb import to_srgb

MIN_SIDE = 16  # px; what the generator takes

Content = TypeVar("Content", Image.Image, np.ndarray, Tensor)
Mask = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Canvas(Generic[Content]):
    """Contents as a network takes them, and the way back.

    Attributes:
        planes: [N, 3, H, W], uint8 or fp32 in [-1, 1], on the CPU.
        full_size: (width, height) in px, before the contents were reduced.
        restore: [N, 3, H, W] of the planes' type -> the kind of picture that was given, with its alpha.
    """

    planes: Tensor
    full_size: tuple[int, int]
    restore: Callable[[Tensor], Content]


def canvas_of(content: Content, max_side: int | None = None) -> Canvas[Content]:
    """A PIL picture, uint8 [H, W, 3 or 4], or float [3, H, W] or [N, 3, H, W] in [-1, 1], reduced to
    `max_side` px on its longer side if it is larger.

    Raises:
        ValueError: a wrong kind, size or range.
    """
    if isinstance(content, Tensor):
        return _tensor_canvas(content, max_side)
    pixels = array_of(content) if isinstance(content, Image.Image) else check_array(content, "content")
    full_size = pixels.shape[1], pixels.shape[0]
    size = reduced_size(*full_size, max_side)
    if size != full_size:
        resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        pixels = np.array(resized)
    alpha = pixels[:, :, 3:]
    planes = torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3])).permute(2, 0, 1)[None]

    def restore(done: Tensor) -> Content:
        found = done[0].permute(1, 2, 0).contiguous().numpy()
        found = np.concatenate([found, alpha], axis=2) if alpha.shape[2] else found
        return Image.fromarray(found) if isinstance(content, Image.Image) else found  # type: ignore[return-value]

    return Canvas(planes, full_size, restore)


def _tensor_canvas(content: Tensor, max_side: int | None) -> Canvas[Tensor]:
    batch = check_tensor(content, "content")
    full_size = batch.shape[3], batch.shape[2]
    size = reduced_size(*full_size, max_side)
    if size != full_size:
        batch = F.interpolate(batch, size=size[::-1], mode="bilinear", antialias=True)

    def restore(done: Tensor) -> Tensor:
        return done.to(content).reshape(*content.shape[:-2], *done.shape[-2:])

    return Canvas(batch, full_size, restore)


def mask_planes(mask: Mask, full_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A mask as [H, W] on the CPU, uint8 in 0..255 or float in 0..1, in the (width, height) `size`.

    Args:
        mask: a PIL picture (its brightness, turned upright as its EXIF says), or an array or tensor [H, W] or
            [1, H, W] of booleans, uint8 in 0..255 or floats in 0..1. Of `full_size`.

    Raises:
        ValueError: a wrong kind, size or range.
    """
    if isinstance(mask, Image.Image):
        if mask.mode.startswith("I") or mask.mode == "F":
            raise ValueError(f"a mask of mode {mask.mode}; convert it to 8 bits (L) first")
        values = torch.from_numpy(np.array(ImageOps.exif_transpose(mask).convert("L")))
    else:
        values = torch.as_tensor(mask).detach().cpu()
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    width, height = full_size
    if values.shape != (height, width):
        raise ValueError(
            f"the mask is {kind_of(values)} and the content {width}x{height} px; give [{height}, {width}]"
        )
    if values.dtype == torch.bool:
        values = values.to(torch.uint8) * 255
    elif values.dtype == torch.uint8:
        if int(values.max()) == 1:
            raise ValueError("the mask holds 0 and 1 as uint8; give booleans, or 0 to 255")
    elif not values.is_floating_point():
        raise ValueError(f"the mask is {kind_of(values)}; give booleans, uint8 or floats in 0..1")
    elif not (float(values.min()) >= 0 and float(values.max()) <= 1):
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"the mask holds values from {low:.3g} to {high:.3g}; scale it to 0..1")
    if size == full_size:
        return values if values.dtype == torch.uint8 else values.float()
    values = values / 255 if values.dtype == torch.uint8 else values.float()
    small = F.interpolate(values[None, None], size=size[::-1], mode="bilinear", antialias=True)
    return small[0, 0].clamp(0, 1)


def as_float(planes: Tensor) -> Tensor:
    """[..., 3, h, w], uint8 or float -> float in [-1, 1]."""
    if planes.dtype != torch.uint8:
        return planes.float()
    return to_float(planes.movedim(-3, -1).numpy())


def as_bytes(planes: Tensor) -> Tensor:
    """float [..., 3, h, w] in [-1, 1] -> uint8 of the same shape."""
    return torch.from_numpy(to_uint8(planes)).movedim(-1, -3)


def array_of(picture: Image.Image) -> np.ndarray:
    """A PIL picture of any mode, turned upright, in sRGB -> uint8 [H, W, 3], or [H, W, 4] if it has
    transparency."""
    try:
        rgb, alpha = to_srgb(ImageOps.exif_transpose(picture))
    except ImageError as error:
        raise ValueError(f"a picture of mode {picture.mode}: {error.detail}") from None
    if alpha is None and picture.has_transparency_data:
        alpha = Image.new("L", rgb.size, 255)
    pixels = np.array(rgb) if alpha is None else np.dstack([np.array(rgb), np.array(alpha)])
    return check_array(pixels, "picture")


def check_array(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"{name} is {kind_of(pixels)}; give uint8 [H, W, 3] or [H, W, 4]")
    check_size(pixels.shape[1], pixels.shape[0], name)
    return pixels


def check_tensor(pictures: Tensor, name: str) -> Tensor:
    """-> fp32 [N, 3, H, W] on the CPU."""
    if pictures.ndim not in (3, 4) or pictures.shape[-3] != 3 or not pictures.is_floating_point():
        raise ValueError(f"{name} is {kind_of(pictures)}; give floats [3, H, W] or [N, 3, H, W] in [-1, 1]")
    check_size(pictures.shape[-1], pictures.shape[-2], name)
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"{name} holds values from {low:.3g} to {high:.3g}; scale it to [-1, 1]")
    return pictures.detach().float().cpu().reshape(-1, *pictures.shape[-3:])


def check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{name} is {width}x{height} px; {MIN_SIDE} px or more a side are needed")


def reduced_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """(width, height) with the longer side at most `max_side` and none below 16 px."""
    shrink = min(1.0, max_side / max(width, height)) if max_side else 1.0
    return max(MIN_SIDE, round(width * shrink)), max(MIN_SIDE, round(height * shrink))


def style_planes(style: Image.Image | np.ndarray | Tensor, max_shorter_side: int) -> Tensor:
    """A style picture as [3, h, w] on the CPU, reduced to `max_shorter_side` px if it is larger."""
    if isinstance(style, Tensor):
        batch = check_tensor(style, "style")
        if len(batch) != 1:
            raise ValueError(
                f"a style of {list(style.shape)} is {len(batch)} pictures; give a list of styles"
            )
        shrink = max_shorter_side / min(batch.shape[2:])
        if shrink < 1:
            size = [round(side * shrink) for side in batch.shape[2:]]
            batch = F.interpolate(batch, size=size, mode="bilinear", antialias=True)
        return batch[0].cpu()
    pixels = array_of(style) if isinstance(style, Image.Image) else check_array(style, "style")
    pixels, shrink = pixels[:, :, :3], max_shorter_side / min(pixels.shape[:2])
    if shrink < 1:
        size = (round(pixels.shape[1] * shrink), round(pixels.shape[0] * shrink))
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def kind_of(array: np.ndarray | Tensor) -> str:
    return f"{array.dtype} {list(array.shape)}"
