"""Corpora that are decoded once and stay in the memory of the device that trains. It cuts a batch's crops
itself, all of them by two products of matrices: a fast GPU would otherwise wait for decoders and copies."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nst.config import BatchConfig
from nst.corpus import Corpus
from nst.crops import Crop, choose_crop, cut, to_range

MEMORY_SHARE = 0.5  # of what is free, for the pictures: networks and their gradients need room beside them


class Places(NamedTuple):
    """Where the crops of a batch's pictures are. (Tensors: the loader knows how to pin and send them.)

    Attributes:
        rows: int64 [N], of the corpus.
        boxes: int64 [N, 4]: top, left and side in pixels, and 1 where the crop is mirrored.
        size: int64 [], side that the crops come to.
    """

    rows: Tensor
    boxes: Tensor
    size: Tensor


def choose_places(
    sizes: NDArray[np.int64], rows: NDArray[np.int64], config: BatchConfig, keys: list[int], size: int
) -> Places:
    """The crops that `nst.crops.cut_at_random` takes.

    Args:
        sizes: [n, 2], height and width of the corpus's pictures.
        keys: decide the crops, one a row.
    """
    crops = [
        choose_crop(height, width, config, key, size)
        for (height, width), key in zip(sizes[rows].tolist(), keys, strict=True)
    ]
    return Places(torch.from_numpy(rows), torch.tensor(crops, dtype=torch.int64), torch.tensor(size))


class ResidentPictures:
    """The pictures of a corpus, decoded, on a device.

    Args:
        pixels: uint8 [n, 3, H, W] on that device; smaller pictures lie in the upper left corner.
        sizes: [n, 2], their own heights and widths.
    """

    def __init__(self, pixels: Tensor, sizes: NDArray[np.int64]) -> None:
        assert pixels.dtype == torch.uint8, pixels.dtype
        self.pixels, self.sizes = pixels, sizes

    @classmethod
    def decode(cls, corpus: Corpus, device: torch.device) -> ResidentPictures:
        """All pictures of `corpus`, by as many threads as there are processors.

        Raises:
            ValueError: they do not fit.
            CorpusError: one cannot be read.
        """
        height, width = int(corpus.heights.max()), int(corpus.widths.max())
        needed = len(corpus) * 3 * height * width
        if device.type == "cuda" and needed > MEMORY_SHARE * (free := torch.cuda.mem_get_info(device)[0]):
            raise ValueError(
                f"decode=resident: {corpus.uri} has {len(corpus)} pictures of up to {width}x{height} pixels, "
                f"{needed / 1e9:.1f} GB decoded, of {free / 1e9:.1f} GB free on {device}; set decode=gpu or "
                "decode=cpu, or make a corpus of smaller pictures"
            )
        pixels = torch.zeros((len(corpus), 3, height, width), dtype=torch.uint8, device=device)
        sizes = np.empty((len(corpus), 2), np.int64)

        def place(row: int) -> None:
            picture = corpus.decode_tensor(row)
            sizes[row] = picture.shape[1:]
            pixels[row, :, : picture.shape[1], : picture.shape[2]] = picture.to(device)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(place, range(len(corpus))):
                pass
        return cls(pixels, sizes)

    def cut(self, places: Places) -> Tensor:
        """The crops [N, 3, size, size] in [-1, 1], rounded to 8 bits as a file's would be. On a CPU bit for
        bit those of `nst.crops.cut`, on a GPU within one grey level of them."""
        if self.pixels.device.type == "cpu":
            pieces = [
                cut(self.pixels[row], Crop(top, left, side, bool(is_mirrored)), int(places.size))
                for row, (top, left, side, is_mirrored) in zip(
                    places.rows.tolist(), places.boxes.tolist(), strict=True
                )
            ]
            return to_range(torch.stack(pieces))
        device = self.pixels.device
        boxes = places.boxes.to(device, non_blocking=True)
        return cut_by_products(
            self.pixels[places.rows.to(device, non_blocking=True)], boxes, int(places.size)
        )


def cut_by_products(pictures: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of many pictures at once, resized by a triangular filter (what `F.interpolate` calls bilinear,
    antialiased): resizing is linear along each axis, so it is a matrix a picture and axis.

    Args:
        pictures: uint8 [N, 3, H, W].
        boxes: int64 [N, 4] as `Places` has them.

    Returns:
        float32 [N, 3, size, size] in [-1, 1], rounded to 8 bits, channels last.
    """
    top, left, side, is_mirrored = boxes.unbind(1)
    rows = _resizing(top, side, pictures.shape[2], size)
    columns = _resizing(left, side, pictures.shape[3], size)
    columns = torch.where(is_mirrored[:, None, None].bool(), columns.flip(1), columns)
    pixels = rows[:, None] @ pictures.float() @ columns.transpose(1, 2)[:, None]
    resized = pixels.round_().clamp_(0, 255).div_(127.5).sub_(1.0)
    return resized.contiguous(memory_format=torch.channels_last)


def _resizing(start: Tensor, side: Tensor, length: int, size: int) -> Tensor:
    """[N, size, length], what each pixel of a resized crop takes of each pixel of the picture. Rows sum to 1.

    Args:
        start, side: int64 [N], the crop along this axis.
    """
    scale = (side / size)[:, None, None]
    centre = start[:, None, None] + scale * (torch.arange(size, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(length, device=start.device)
    is_inside = (pixel >= start[:, None, None]) & (pixel < (start + side)[:, None, None])
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0) * is_inside
    return weights / weights.sum(dim=2, keepdim=True)
