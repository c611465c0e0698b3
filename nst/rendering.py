"""Pictures of any size through a generator, within the memory that there is: in batches, or in tiles."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nst.inference import Inference, first_line, is_out_of_memory
from nst.networks.blocks import Statistics, replay_statistics
from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator
from nst.picture_statistics import picture_statistics
from nst.pictures import as_bytes, as_float
from nst.tiling import render_in_tiles

log = logging.getLogger(__name__)

TILE_SIDE, OVERLAP = 640, 128  # px
ONE_PASS = 1.8  # tile sides; a square of it fits too, where no large picture lies beside it


class Renderer:
    """Renders pictures of any size.

    Those of more pixels than a square of 1.8 `tile_side` are rendered in overlapping tiles, normalised by
    the statistics of the whole picture (`nst.picture_statistics`; the idea is URST's, Chen et al. 2022), so
    that neither seams show nor memory grows with the picture's area. Where memory runs out even so, batches
    are divided, then tiles halved.

    Args:
        generator: in eval mode.
        dtype, compile: see `nst.inference.Inference`.
        tile_side: px, a multiple of the generator's stride.
        overlap: px shared by neighbouring tiles.

    Raises:
        ValueError: tiles that do not fit together.
    """

    def __init__(
        self,
        generator: StyleGenerator,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        tile_side: int = TILE_SIDE,
        overlap: int = OVERLAP,
    ) -> None:
        if tile_side % generator.stride or not 0 < overlap <= tile_side // 2:
            raise ValueError(
                f"tile_side {tile_side} with overlap {overlap}: give a multiple of {generator.stride} and at "
                "most half of it as overlap"
            )
        self.generator = generator
        self.inference = Inference(generator, dtype, compile)
        self.tile_side, self.overlap = tile_side, overlap

    @property
    def max_pixels(self) -> int:
        """That are rendered in one pass."""
        return _max_pixels(self.tile_side)

    def render(self, planes: Tensor, code: StyleCode) -> Tensor:
        """[N, 3, H, W], uint8 or float in [-1, 1] -> their full stylizations, of the same type. A batch is
        divided until it has at most `max_pixels`, and again where memory does not suffice for that.

        Args:
            code: of 1 style, or of N.

        Raises:
            MemoryError: even small tiles need more memory than there is.
        """
        num = len(planes)
        if num == 1:
            return self._render_one(planes[0], code)[None]
        if planes[:, 0].numel() <= self.max_pixels:
            try:
                return _as_type(planes, self.inference.draw(as_float(planes), code))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        halves = [slice(num // 2), slice(num // 2, num)]
        return torch.cat(
            [self.render(planes[half], code[half] if len(code) > 1 else code) for half in halves]
        )

    def _render_one(self, planes: Tensor, code: StyleCode) -> Tensor:
        """[3, H, W] -> its full stylization, of the same type. Begins with large tiles whatever the picture
        before needed: the result then depends on the memory that is free now, and on nothing else."""
        stride = self.generator.stride
        tile_side, smallest, reason = self.tile_side, -(-2 * self.overlap // stride) * stride, ""
        while True:
            try:
                return self.render_in_tiles(planes, code, tile_side)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            # not above: until there, the error holds on to what was allocated
            torch.cuda.empty_cache()
            if tile_side == smallest:
                raise MemoryError(
                    f"{planes.shape[2]}x{planes.shape[1]} px do not fit on {self.inference.device}, even in "
                    f"tiles of {smallest} px ({reason}); end what else uses its memory, or take another one"
                )
            smaller = max(smallest, tile_side // 2 // stride * stride)
            log.warning("not enough memory for tiles of %d px; trying %d px", tile_side, smaller)
            tile_side = smaller

    def render_in_tiles(
        self,
        planes: Tensor,
        code: StyleCode,
        tile_side: int,
        statistics: dict[str, Statistics] | None = None,
    ) -> Tensor:
        """[3, H, W] -> its full stylization, of the same type; in one piece if it is not large for such
        tiles. `statistics` of it, if they are known."""
        if planes[0].numel() <= _max_pixels(tile_side):
            return _as_type(planes, self.inference.draw(as_float(planes[None]), code)[0])
        known = statistics or self.statistics(planes, code, tile_side)

        def render(tile: Tensor) -> Tensor:
            with replay_statistics(self.generator, known):
                return self.inference.draw(as_float(tile[None]), code, may_compile=False)[0]

        return render_in_tiles(
            planes,
            render,
            lambda strip: _as_type(planes, strip),
            tile_side,
            self.overlap,
            self.generator.stride,
        )

    def statistics(self, planes: Tensor, code: StyleCode, tile_side: int) -> dict[str, Statistics]:
        """What the generator's norms see in the whole of [3, H, W]; `tile_side`² px of it at once."""
        return picture_statistics(
            self.generator,
            planes,
            lambda batch: self.inference.draw(batch, code, may_compile=False),
            tile_side,
            self.generator.stride,
        )


def _max_pixels(tile_side: int) -> int:
    return int((ONE_PASS * tile_side) ** 2)


def _as_type(planes: Tensor, drawn: Tensor) -> Tensor:
    return as_bytes(drawn) if planes.dtype == torch.uint8 else drawn
