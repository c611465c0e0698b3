"""What loader workers hand over, and how it becomes pixels on the device that trains: crops that a worker
decoded, or JPEGs that are still encoded."""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from nst.config import BatchConfig
from nst.corpus import Corpus, CorpusError
from nst.crops import cut_at_random, to_range


class Crops(NamedTuple):
    """The pictures of one domain of a batch. (A tuple of tensors: the loader knows how to pin and send it.)

    Attributes:
        pixels: uint8 [N, 3, size, size], channels last in memory; anything where a picture is still encoded.
        encoded: uint8 [bytes], JPEGs one behind the other.
        ends: int64 [N], where each ends in `encoded`; one that has no bytes there is in `pixels`.
        keys: int64 [N], the bits of what decides the crops.
    """

    pixels: Tensor
    encoded: Tensor
    ends: Tensor
    keys: Tensor


def load_crops(
    corpus: Corpus, rows: np.ndarray, config: BatchConfig, keys: list[int], size: int, *, keep_encoded: bool
) -> Crops:
    """What a worker hands over for these rows.

    Args:
        keys: decide the crops, one a row.
        size: side of the crops.
        keep_encoded: leave decoding to `decode_crops`, for what its decoder reads as `corpus.decode` does.
    """
    pixels = torch.empty((len(rows), size, size, 3), dtype=torch.uint8)
    encoded, ends = [np.zeros(0, np.uint8)], np.zeros(len(rows), np.int64)
    for place, (row, key) in enumerate(zip(rows.tolist(), keys, strict=True)):
        if keep_encoded and not corpus.manifest.is_adopted:  # those may be PNG, turned, or in other colours
            encoded.append(np.frombuffer(corpus.read(row), np.uint8))
            ends[place] = len(encoded[-1])
        else:
            pixels[place] = cut_at_random(corpus.decode_tensor(row), config, key, size).permute(1, 2, 0)
    return Crops(
        pixels=pixels.permute(0, 3, 1, 2),
        encoded=torch.from_numpy(np.concatenate(encoded)),
        ends=torch.from_numpy(np.cumsum(ends)),
        keys=torch.from_numpy(np.array(keys, np.uint64).view(np.int64)),
    )


def decode_crops(crops: Crops, config: BatchConfig, device: torch.device, where: str) -> Tensor:
    """The pictures [N, 3, size, size] in [-1, 1] on `device`, which decodes what is still encoded.

    Args:
        where: names the corpus in an error.

    Raises:
        CorpusError: what a shard holds is no JPEG.
    """
    pixels = crops.pixels.to(device, non_blocking=True)
    ends = crops.ends.tolist()
    spans = zip([0, *ends[:-1]], ends, strict=True)
    places = {place: crops.encoded[start:end] for place, (start, end) in enumerate(spans) if end > start}
    if places:
        try:
            images = cast(
                list[Tensor], decode_jpeg(list(places.values()), mode=ImageReadMode.RGB, device=device)
            )
        except RuntimeError as error:
            raise CorpusError(f"{where}: {error}") from error
        size, keys = pixels.shape[-1], crops.keys.numpy().view(np.uint64).tolist()
        for place, image in zip(places, images, strict=True):
            pixels[place] = cut_at_random(image, config, keys[place], size)
    return to_range(pixels)


def decodes_on_device(setting: str, device: torch.device) -> bool:
    """Whether JPEGs are decoded on `device` and not by loader workers, as `decode` says.

    Raises:
        ValueError: the GPU is to decode, but there is none, or its decoder is missing.
    """
    if setting in ("cpu", "resident") or (setting == "auto" and device.type != "cuda"):
        return False
    try:
        if device.type == "cuda":
            black = encode_jpeg(torch.zeros((3, 16, 16), dtype=torch.uint8))
            decode_jpeg([cast(Tensor, black)], device=device)
            return True
        reason = f"training runs on {device.type}"
    except RuntimeError as error:
        if setting == "auto":
            return False
        reason = str(error).splitlines()[0]
    raise ValueError(
        f"decode=gpu needs a CUDA device and torchvision's decoder for it ({reason}): set decode=cpu"
    )
