"""`Stylizer`: a trained generator for pictures as people have them. Any size, kept alpha, strength, colours
of the content or the style, mixes of styles, a mask."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nst.builtin import builtin_checkpoint
from nst.checkpoint import load_generator, model_digest
from nst.finishing import COLORS, Finish
from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator
from nst.pictures import (
    MIN_SIDE,
    Canvas,
    Content,
    Mask,
    as_float,
    canvas_of,
    check_size,
    kind_of,
    mask_planes,
    style_planes,
)
from nst.rendering import OVERLAP, TILE_SIDE, Renderer

__all__ = ["COLORS", "MAX_STYLE_SIDE", "Stylizer", "joined_codes"]

MAX_STYLE_SIDE = 512  # px, a style's shorter side: larger strokes than training showed say nothing
NUM_CACHED_CODES = 256
NUM_AT_ONCE = 64  # pictures that `stylize_many` holds
PIXELS_AT_ONCE = 1 << 24

Style = Image.Image | np.ndarray | Tensor | StyleCode


class Stylizer:
    """Stylizes pictures of any size with one generator.

        stylizer = Stylizer.load()  # the model in the box; or a checkpoint's folder
        painted = stylizer(photo, painting, strength=0.8)

    Pictures of more pixels than 1152² are rendered in overlapping tiles of 640 px that show no seams
    (`nst.rendering.Renderer`). Threads may share one: they draw one after the other, since what the norms
    replay for a picture's tiles lies in the generator.

    Args:
        generator: in eval mode; of this Stylizer alone.
        digest: of the model, for those who keep results (`nst.checkpoint.model_digest`).
        dtype: torch.bfloat16 computes convolutions in it; None and torch.float32 do not.
        compile: see `nst.inference.Inference`.
        tile_side: px, a multiple of the generator's stride.
        overlap: px shared by neighbouring tiles.

    Raises:
        ValueError: tiles that do not fit together.
    """

    def __init__(
        self,
        generator: StyleGenerator,
        *,
        digest: str = "",
        dtype: torch.dtype | None = None,
        compile: bool = False,
        tile_side: int = TILE_SIDE,
        overlap: int = OVERLAP,
    ) -> None:
        self.generator, self.digest = generator, digest
        self.device = next(generator.parameters()).device
        self.renderer = Renderer(
            generator, dtype=dtype, compile=compile, tile_side=tile_side, overlap=overlap
        )
        self._codes: OrderedDict[bytes, StyleCode] = OrderedDict()
        self._drawing = threading.Lock()  # for the generator and the codes

    @classmethod
    def load(
        cls,
        checkpoint_dir: str | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> Stylizer:
        """From a checkpoint folder (model.safetensors, config.json); None: the model in the box. `device`
        None: a GPU if there is one.

        Raises:
            ValueError: not a checkpoint, or a damaged one.
        """
        if checkpoint_dir is None:
            checkpoint_dir = builtin_checkpoint()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        generator = load_generator(checkpoint_dir, device=device)
        return cls(generator, digest=model_digest(checkpoint_dir), dtype=dtype, compile=compile)

    def __call__(
        self,
        content: Content,
        style: Style | Sequence[Style],
        *,
        strength: float = 1.0,
        colors: str = "style",
        weights: Sequence[float] | None = None,
        max_side: int | None = None,
        mask: Mask | None = None,
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
            mask: where to stylize, of the content's size: a PIL picture (white is everywhere), or [H, W] of
                booleans, uint8 or floats in 0..1. Between, pixels are blended as by `strength`.

        Raises:
            ValueError: a wrong kind, size or range.
            MemoryError: even small tiles need more memory than there is.
        """
        finish = Finish(strength=strength, colors=colors)
        _check_max_side(max_side)
        code = self.encode_style(style, weights)
        canvas = canvas_of(content, max_side)
        if mask is not None:
            size = canvas.planes.shape[3], canvas.planes.shape[2]
            finish = dataclasses.replace(finish, mask=mask_planes(mask, canvas.full_size, size))
        return canvas.restore(self._stylize(canvas.planes, code, finish))

    def stylize_many(
        self,
        contents: Iterable[Content],
        style: Style | Sequence[Style],
        *,
        strength: float = 1.0,
        colors: str = "style",
        weights: Sequence[float] | None = None,
        max_side: int | None = None,
    ) -> Iterator[Content]:
        """Pictures of any sizes, in their order; those of equal size go through the generator together.
        Takes a few from `contents` at a time: up to 64, or some 16 million pixels. Arguments and errors are
        those of a single call.
        """
        finish = Finish(strength=strength, colors=colors)
        _check_max_side(max_side)
        code = self.encode_style(style, weights)

        def stylize() -> Iterator[Content]:
            for group in _groups(canvas_of(content, max_side) for content in contents):
                yield from self._stylize_group(group, code, finish)

        return stylize()

    def stylize_batch(
        self, contents: np.ndarray, code: StyleCode, *, strength: float = 1.0, colors: str = "style"
    ) -> np.ndarray:
        """uint8 [N, H, W, 3] of one size, as many in one pass as have 1152² pixels together.

        Args:
            code: of one style, or of N.

        Raises:
            ValueError: a wrong shape, type or range.
        """
        finish = Finish(strength=strength, colors=colors)
        if contents.ndim != 4 or contents.dtype != np.uint8 or contents.shape[3] != 3:
            raise ValueError(f"contents are {kind_of(contents)}; give uint8 [N, H, W, 3]")
        if len(code) not in (1, len(contents)):
            raise ValueError(f"{len(contents)} contents with {len(code)} style codes; give 1 code or as many")
        check_size(contents.shape[2], contents.shape[1], "contents")
        planes = torch.from_numpy(contents).permute(0, 3, 1, 2)
        return self._stylize(planes, code, finish).permute(0, 2, 3, 1).contiguous().numpy()

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
        with self._drawing:
            if (code := self._codes.get(key.digest())) is None:
                code = self._codes[key.digest()] = self.renderer.inference.encode_style(
                    as_float(planes)[None]
                )
                if len(self._codes) > NUM_CACHED_CODES:
                    self._codes.popitem(last=False)
            self._codes.move_to_end(key.digest())
        return code

    def _stylize_group(
        self, canvases: list[Canvas[Content]], code: StyleCode, finish: Finish
    ) -> Iterator[Content]:
        """In their order; pictures of equal size and type go together."""
        alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
        for index, canvas in enumerate(canvases):
            alike.setdefault((canvas.planes.dtype, canvas.planes.shape), []).append(index)
        done: dict[int, Tensor] = {}
        for places in alike.values():
            together = [canvases[place].planes for place in places]
            joined = torch.cat(together) if len(together) > 1 else together[0]
            parts = self._stylize(joined, code, finish).split([len(one) for one in together])
            done |= zip(places, parts, strict=True)
        for index, canvas in enumerate(canvases):
            yield canvas.restore(done.pop(index))

    def _stylize(self, planes: Tensor, code: StyleCode, finish: Finish) -> Tensor:
        """[N, 3, H, W], uint8 or float in [-1, 1] -> the same type."""
        if finish.strength == 0:
            return planes.clone()
        with self._drawing:
            stylized = self.renderer.render(planes, code)
        for before, after in zip(planes, stylized, strict=True):
            finish.apply(before, after)
        return stylized


def joined_codes(codes: Sequence[StyleCode]) -> StyleCode:
    """Codes of M1, M2, ... styles -> one of M1 + M2 + ..."""
    names = [field.name for field in dataclasses.fields(StyleCode)]
    return StyleCode(*(torch.cat([getattr(code, name) for code in codes]) for name in names))


def _groups(canvases: Iterable[Canvas[Content]]) -> Iterator[list[Canvas[Content]]]:
    """Some that follow each other, of a bounded size together."""
    group: list[Canvas[Content]] = []
    num_pixels = 0
    for canvas in canvases:
        group.append(canvas)
        num_pixels += canvas.planes[:, 0].numel()
        if len(group) == NUM_AT_ONCE or num_pixels >= PIXELS_AT_ONCE:
            yield group
            group, num_pixels = [], 0
    if group:
        yield group


def _check_max_side(max_side: int | None) -> None:
    if max_side is not None and max_side < MIN_SIDE:
        raise ValueError(f"max_side {max_side} is too small; give {MIN_SIDE} px or more, or leave it out")
