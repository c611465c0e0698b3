"""`Stylizer`: a trained generator for pictures as people have them. Any size, kept alpha, strength, colours
of the content or the style, mixes of styles."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nst.builtin import builtin_checkpoint
from nst.checkpoint import load_generator, model_digest
from nst.networks.blocks import Statistics, record_statistics, replay_statistics
from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator
from nst.pictures import (
    MIN_SIDE,
    array_of,
    as_bytes,
    as_float,
    check_array,
    check_size,
    check_tensor,
    kind_of,
    reduced_size,
    style_planes,
)
from nst.tiling import render_in_tiles

MAX_STYLE_SIDE = 512  # px, a style's shorter side: larger strokes than training showed say nothing
NUM_CACHED_CODES = 256
COLORS = ("style", "content")
ROWS_AT_ONCE = 256  # keeps what is held in floats small
MAX_CONTRAST = 4.0  # of a stylized luminance stretched to the content's

Content = TypeVar("Content", Image.Image, np.ndarray, Tensor)
Style = Image.Image | np.ndarray | Tensor | StyleCode


class Stylizer:
    """Stylizes pictures of any size with one generator.

        stylizer = Stylizer.load()  # the model in the box; or a checkpoint's folder
        painted = stylizer(photo, painting, strength=0.8)

    Pictures of more than `tile_side`² pixels are rendered in overlapping tiles, normalised by statistics of
    the whole picture, taken from a thumbnail of at most `tile_side` a side (as in URST, Chen et al. 2022),
    so that neither seams show nor memory grows with the picture's area.

    Args:
        generator: in eval mode.
        digest: of the model, for those who keep results (`nst.checkpoint.model_digest`).
        dtype: torch.bfloat16 computes convolutions in it; None and torch.float32 do not.
        tile_side: px, a multiple of the generator's stride.
        overlap: px shared by neighbouring tiles.
    """

    def __init__(
        self,
        generator: StyleGenerator,
        *,
        digest: str = "",
        dtype: torch.dtype | None = None,
        tile_side: int = 768,
        overlap: int = 128,
    ) -> None:
        if tile_side % generator.stride or overlap > tile_side // 2:
            raise ValueError(
                f"tile_side {tile_side} with overlap {overlap}: give a multiple of {generator.stride} and at "
                "most half of it as overlap"
            )
        self.generator = generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = next(generator.parameters()).device
        self.digest = digest
        self.dtype = dtype
        self.tile_side, self.overlap = tile_side, overlap
        self._codes: OrderedDict[bytes, StyleCode] = OrderedDict()

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Stylizer:
        """From a checkpoint folder (model.safetensors, config.json); None: the model in the box. `device`
        None: a GPU if there is one."""
        if checkpoint_dir is None:
            checkpoint_dir = builtin_checkpoint()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        generator = load_generator(checkpoint_dir, device=device)
        return cls(generator, digest=model_digest(checkpoint_dir), dtype=dtype)

    def __call__(
        self,
        content: Content,
        style: Style | Sequence[Style],
        *,
        strength: float = 1.0,
        colors: str = "style",
        weights: Sequence[float] | None = None,
        max_side: int | None = None,
    ) -> Content:
        """The content in the style: the same kind of picture, in the content's size.

        Args:
            content: a PIL picture (turned upright as its EXIF says; the result is RGB or RGBA), uint8
                [H, W, 3 or 4], or float [3, H, W] or [N, 3, H, W] in [-1, 1]. Alpha is kept.
            style: one style, or several for a mix; pictures of any size, or codes of `encode_style`.
            strength: 0 returns the content itself, 1 the full style; between, pixels are blended linearly.
                (Blending codes instead never arrives at the content: a generator does not reproduce it
                exactly, and the look would jump near 0.)
            colors: "content" keeps the content's colours: only the stylized luminance is used, at the mean
                and contrast of the content's (Gatys et al. 2016).
            weights: of the styles in a mix, 0 or more; equal if left out.
            max_side: px; a larger content is reduced to it first, and so is the result.

        Raises:
            ValueError: a wrong kind, size or range.
        """
        _check_options(strength, colors, max_side)
        code = self.encode_style(style, weights)
        if isinstance(content, Image.Image):
            pixels = self._on_array(array_of(content), code, strength, colors, max_side)
            return Image.fromarray(pixels)
        if isinstance(content, np.ndarray):
            return self._on_array(check_array(content, "content"), code, strength, colors, max_side)
        batch = check_tensor(content, "content")
        size = reduced_size(batch.shape[3], batch.shape[2], max_side)
        if size != (batch.shape[3], batch.shape[2]):
            batch = F.interpolate(batch, size=size[::-1], mode="bilinear", antialias=True)
        done = torch.stack([self._on_planes(planes, code, strength, colors) for planes in batch])
        return done.to(content.dtype).reshape(*content.shape[:-2], *done.shape[-2:])

    def stylize_batch(
        self, contents: np.ndarray, code: StyleCode, *, strength: float = 1.0, colors: str = "style"
    ) -> np.ndarray:
        """uint8 [N, H, W, 3] of one size in one pass (in tiles, one by one, where they are large).

        Args:
            code: of one style, or of N.

        Raises:
            ValueError: a wrong shape, type or range.
        """
        _check_options(strength, colors, None)
        if contents.ndim != 4 or contents.dtype != np.uint8 or contents.shape[3] != 3:
            raise ValueError(f"contents are {kind_of(contents)}; give uint8 [N, H, W, 3]")
        if len(code) not in (1, len(contents)):
            raise ValueError(f"{len(contents)} contents with {len(code)} style codes; give 1 code or as many")
        check_size(contents.shape[2], contents.shape[1], "contents")
        planes = torch.from_numpy(contents).permute(0, 3, 1, 2)
        if self._needs_tiles(planes[0]):
            codes = [code[index] if len(code) > 1 else code for index in range(len(planes))]
            pairs = zip(planes, codes, strict=True)
            done = [self._on_planes(picture, one, strength, colors) for picture, one in pairs]
        else:
            stylized = as_bytes(self._run(as_float(planes), code))
            done = [_finish(*pair, strength, colors) for pair in zip(planes, stylized, strict=True)]
        return torch.stack(done).permute(0, 2, 3, 1).contiguous().numpy()

    def encode_style(
        self, style: Style | Sequence[Style], weights: Sequence[float] | None = None
    ) -> StyleCode:
        """The code of one style, or of a mix of several. Codes of pictures are kept, the last 256 of them.

        A style picture is first reduced to 512 px on its shorter side; it is never enlarged here.

        Raises:
            ValueError: no style, wrong weights, or a picture of a wrong kind.
        """
        styles = [style] if isinstance(style, (Image.Image, np.ndarray, Tensor, StyleCode)) else list(style)
        if not styles:
            raise ValueError("no style given; give one or several style pictures")
        if weights is not None and len(weights) != len(styles):
            raise ValueError(f"{len(weights)} weights for {len(styles)} styles; give one weight a style")
        if weights is not None and not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights {list(weights)} are not all numbers; give numbers of 0 or more")
        codes = [self._code_of(one) for one in styles]
        if len(codes) == 1 and weights is None:
            return codes[0]
        return joined_codes(codes).mix([1.0] * len(codes) if weights is None else weights)

    def _code_of(self, style: Style) -> StyleCode:
        if isinstance(style, StyleCode):
            return style.to(self.device)
        planes = style_planes(style, MAX_STYLE_SIDE)
        key = hashlib.sha256(repr((planes.dtype, planes.shape)).encode())
        key.update(planes.contiguous().numpy().tobytes())
        if (code := self._codes.get(key.digest())) is None:
            with torch.inference_mode(), self._precision():
                code = self.generator.encode_style(as_float(planes)[None].to(self.device))
            self._codes[key.digest()] = code
            if len(self._codes) > NUM_CACHED_CODES:
                self._codes.popitem(last=False)
        self._codes.move_to_end(key.digest())
        return code

    def _on_array(
        self, pixels: np.ndarray, code: StyleCode, strength: float, colors: str, max_side: int | None
    ) -> np.ndarray:
        """uint8 [H, W, 3 or 4] -> the same, in the reduced size."""
        size = reduced_size(pixels.shape[1], pixels.shape[0], max_side)
        if size != (pixels.shape[1], pixels.shape[0]):
            resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            pixels = np.array(resized)
        planes = torch.from_numpy(np.ascontiguousarray(pixels[:, :, :3])).permute(2, 0, 1)
        done = self._on_planes(planes, code, strength, colors).permute(1, 2, 0).contiguous().numpy()
        return np.concatenate([done, pixels[:, :, 3:]], axis=2) if pixels.shape[2] == 4 else done

    def _on_planes(self, planes: Tensor, code: StyleCode, strength: float, colors: str) -> Tensor:
        """[3, H, W], uint8 or float in [-1, 1] -> the same type."""
        if strength == 0:
            return planes.clone()
        stylized = self._render(planes, code)
        return _finish(planes, stylized, strength, colors)

    def _needs_tiles(self, planes: Tensor) -> bool:
        return planes.shape[1] * planes.shape[2] > self.tile_side**2

    def _render(
        self, planes: Tensor, code: StyleCode, statistics: dict[str, Statistics] | None = None
    ) -> Tensor:
        """[3, H, W] -> its full stylization, of the same type; `statistics` of it if they are known."""
        write = as_bytes if planes.dtype == torch.uint8 else torch.Tensor.clone
        if not self._needs_tiles(planes):
            return write(self._run(as_float(planes)[None], code)[0])
        statistics = statistics or self.statistics(planes, code)

        def render(tile: Tensor) -> Tensor:
            with replay_statistics(self.generator, statistics):
                return self._run(as_float(tile)[None], code)[0]

        return render_in_tiles(planes, render, write, self.tile_side, self.overlap, self.generator.stride)

    def statistics(self, planes: Tensor, code: StyleCode) -> dict[str, Statistics]:
        """What the generator's norms see in a thumbnail of [3, H, W], at most `tile_side` a side."""
        shrink = min(1.0, self.tile_side / max(planes.shape[1:]))
        size = [max(MIN_SIDE, round(side * shrink)) for side in planes.shape[1:]]
        thumbnail = planes[None]
        if shrink < 1:
            thumbnail = F.interpolate(thumbnail, size=size, mode="bilinear", antialias=True)
        with record_statistics(self.generator) as statistics:
            self._run(as_float(thumbnail), code)
        return statistics

    def _run(self, batch: Tensor, code: StyleCode) -> Tensor:
        """float [N, 3, H, W] -> float [N, 3, H, W] on the CPU, within [-1, 1]."""
        with torch.inference_mode(), self._precision():
            batch = batch.to(self.device, memory_format=torch.channels_last)
            return self.generator(batch, code.to(self.device)).float().clamp(-1, 1).cpu()

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype == torch.bfloat16):
            yield


def joined_codes(codes: Sequence[StyleCode]) -> StyleCode:
    """Codes of M1, M2, ... styles -> one of M1 + M2 + ..."""
    names = [field.name for field in dataclasses.fields(StyleCode)]
    return StyleCode(*(torch.cat([getattr(code, name) for code in codes]) for name in names))


def _finish(content: Tensor, stylized: Tensor, strength: float, colors: str) -> Tensor:
    """Colours and strength over [3, H, W] pictures of one type, some rows at a time."""
    if strength == 1 and colors == "style":
        return stylized
    mean, contrast, stylized_mean = 0.0, 1.0, 0.0
    if colors == "content":
        mean, std = _luminance_statistics(content)
        stylized_mean, stylized_std = _luminance_statistics(stylized)
        contrast = min(std / max(stylized_std, 1 / 255), MAX_CONTRAST)
    result = torch.empty_like(content)
    for rows in _strips(content):
        before, after = as_float(content[:, rows]), as_float(stylized[:, rows])
        if colors == "content":
            # equal steps in R, G and B move luminance alone: Cb and Cr stay the content's
            after = before + (_luminance(after) - stylized_mean) * contrast + mean - _luminance(before)
        blended = torch.lerp(before, after.clamp(-1, 1), strength)
        result[:, rows] = as_bytes(blended) if result.dtype == torch.uint8 else blended
    return result


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


def _check_options(strength: float, colors: str, max_side: int | None) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is out of range; give 0 (the content) to 1 (the full style)")
    if colors not in COLORS:
        raise ValueError(f"colors {colors!r} is unknown; give 'style' or 'content'")
    if max_side is not None and max_side < MIN_SIDE:
        raise ValueError(f"max_side {max_side} is too small; give {MIN_SIDE} px or more, or leave it out")
