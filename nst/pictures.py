"""Pictures as people hold them (PIL, uint8 arrays, float tensors) and as networks take them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from nst.images import to_float, to_uint8

MIN_SIDE = 16  # px; what the generator takes


def as_float(planes: Tensor) -> Tensor:
    """[..., 3, h, w], uint8 or float -> float in [-1, 1]."""
    if planes.dtype != torch.uint8:
        return planes.float()
    return to_float(planes.movedim(-3, -1).numpy())


def as_bytes(planes: Tensor) -> Tensor:
    """float [..., 3, h, w] in [-1, 1] -> uint8 of the same shape."""
    return torch.from_numpy(to_uint8(planes)).movedim(-1, -3)


def array_of(picture: Image.Image) -> np.ndarray:
    """A PIL picture, turned upright -> uint8 [H, W, 3], or [H, W, 4] if it has transparency."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") or upright.mode == "F":
        raise ValueError(f"a picture of mode {upright.mode}; convert it to 8 bits a channel (RGB) first")
    return check_array(
        np.array(upright.convert("RGBA" if upright.has_transparency_data else "RGB")), "picture"
    )


def check_array(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (3, 4):
        raise ValueError(f"{name} is {kind_of(pixels)}; give uint8 [H, W, 3] or [H, W, 4]")
    check_size(pixels.shape[1], pixels.shape[0], name)
    return pixels


def check_tensor(pictures: Tensor, name: str) -> Tensor:
    """-> fp32 [N, 3, H, W] on the CPU."""
    if pictures.ndim not in (3, 4) or pictures.shape[-3] != 3 or not pictures.is_floating_point():
        found = f"{pictures.dtype} {list(pictures.shape)}"
        raise ValueError(f"{name} is {found}; give floats [3, H, W] or [N, 3, H, W] in [-1, 1]")
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


def kind_of(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
