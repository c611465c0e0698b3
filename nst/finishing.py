"""What becomes of a stylized picture beside its content: how strong it is, where, and in whose colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nst.pictures import as_bytes, as_float

COLORS = ("style", "content")
ROWS_AT_ONCE = 256  # keeps what is held in floats small
MAX_CONTRAST = 4.0  # of a stylized luminance stretched to the content's


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a stylization is laid over its content.

    Attributes:
        strength: 0 leaves the content, 1 the full style; between, pixels are blended linearly.
        colors: "content" keeps the content's colours: only the stylized luminance is used, at the mean and
            contrast of the content's (Gatys et al. 2016).
        mask: [H, W], uint8 or float in 0..1, that the strength is multiplied by; None is 1 everywhere.

    Raises:
        ValueError: strength or colors are out of range.
    """

    strength: float = 1.0
    colors: str = "style"
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength {self.strength} is out of range; give 0 (the content) to 1 (the full style)"
            )
        if self.colors not in COLORS:
            raise ValueError(f"colors {self.colors!r} is unknown; give 'style' or 'content'")

    def apply(self, content: Tensor, stylized: Tensor) -> Tensor:
        """Over two pictures [3, H, W] of one type, some rows at a time. Writes into `stylized`."""
        if self.strength == 1 and self.colors == "style" and self.mask is None:
            return stylized
        mean, contrast, stylized_mean = 0.0, 1.0, 0.0
        if self.colors == "content":
            mean, std = _luminance_statistics(content)
            stylized_mean, stylized_std = _luminance_statistics(stylized)
            contrast = min(std / max(stylized_std, 1 / 255), MAX_CONTRAST)
        for rows in _strips(content):
            before, after = as_float(content[:, rows]), as_float(stylized[:, rows])
            if self.colors == "content":
                # equal steps in R, G and B move luminance alone: Cb and Cr stay the content's
                after = before + (_luminance(after) - stylized_mean) * contrast + mean - _luminance(before)
            blended = torch.lerp(before, after.clamp(-1, 1), self._shares(rows))
            stylized[:, rows] = as_bytes(blended) if stylized.dtype == torch.uint8 else blended
        return stylized

    def _shares(self, rows: slice) -> Tensor:
        """[1, h, W] or a scalar: the share of the stylized picture."""
        if self.mask is None:
            return torch.tensor(self.strength)
        part = self.mask[None, rows]
        return self.strength * (part / 255 if part.dtype == torch.uint8 else part)


def _strips(planes: Tensor) -> list[slice]:
    return [slice(top, top + ROWS_AT_ONCE) for top in range(0, planes.shape[1], ROWS_AT_ONCE)]


def _luminance(planes: Tensor) -> Tensor:
    """BT.601: [3, h, W] -> [1, h, W]."""
    return 0.299 * planes[0:1] + 0.587 * planes[1:2] + 0.114 * planes[2:3]


def _luminance_statistics(planes: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over [3, H, W]."""
    total = squares = 0.0
    for rows in _strips(planes):
        light = _luminance(as_float(planes[:, rows])).double()
        total, squares = total + float(light.sum()), squares + float(light.square().sum())
    num = planes.shape[1] * planes.shape[2]
    return total / num, math.sqrt(max(0.0, squares / num - (total / num) ** 2))
