"""The pairs of content and style that models are measured on: fixed by what lies there and a seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra import places, storage
from nst.corpus import Corpus
from nst.grids import square
from nst.images import SUFFIXES, ImageError, open_image, over_white
from nst.manifest import MANIFEST_NAME


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Pictures that can be had by number. `digest` stands for all of them."""

    uri: str
    names: list[str]
    digest: str
    load: Callable[[int], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """N pairs. `content` and `style` are [N, 3, size, size] in [0, 1], the middle squares; the names say
    what they are."""

    content: Tensor
    style: Tensor
    content_names: list[str]
    style_names: list[str]
    content_digest: str
    style_digest: str
    seed: int
    size: int

    def __len__(self) -> int:
        return len(self.content)

    def identity(self) -> dict[str, str | int]:
        """What makes figures comparable: all of this must agree."""
        return {
            "content_digest": self.content_digest,
            "style_digest": self.style_digest,
            "num_pairs": len(self),
            "seed": self.seed,
            "size": self.size,
        }


def open_pictures(uri: str) -> PictureSource:
    """A corpus, or a folder or prefix with pictures. Raises ValueError if it is neither."""
    uri = places.absolute(uri)
    if storage.exists(places.join(uri, MANIFEST_NAME)):
        corpus = Corpus.open(uri, storage=storage.ObjectStorage() if places.is_remote(uri) else None)
        names = [f"{corpus.label_names[label]} {row}" for row, label in enumerate(corpus.labels)]
        return PictureSource(uri=uri, names=names, digest=corpus.manifest.digest, load=corpus.decode)
    found = [one for one in storage.list_objects(uri) if one.key.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(
            f"{uri} is no corpus and holds no pictures; give a corpus, or a folder with pictures"
        )
    digest = hashlib.sha256()
    for one in found:
        digest.update(f"{one.key}\0{hashlib.sha256(storage.read_bytes(one.uri)).hexdigest()}\n".encode())

    def load(index: int) -> NDArray[np.uint8]:
        try:
            opened = open_image(storage.read_bytes(found[index].uri))
        except ImageError as error:
            raise ValueError(
                f"{found[index].uri} cannot be used ({error}); take it away or replace it"
            ) from None
        return np.asarray(over_white(opened.rgb, opened.alpha))

    names = [one.key for one in found]
    return PictureSource(uri=uri, names=names, digest=digest.hexdigest(), load=load)


def choose_pairs(num_contents: int, num_styles: int, num_pairs: int, seed: int) -> list[tuple[int, int]]:
    """Distinct pairs (content, style) in which every picture occurs about as often as any other.

    There are at most num_contents * num_styles of them.
    """
    rng = random.Random(seed)
    wanted = min(num_pairs, num_contents * num_styles)
    chosen: dict[tuple[int, int], None] = {}
    contents: list[int] = []
    styles: list[int] = []
    while len(chosen) < wanted:
        contents = contents or rng.sample(range(num_contents), num_contents)
        styles = styles or rng.sample(range(num_styles), num_styles)
        chosen[contents.pop(), styles.pop()] = None
    return list(chosen)


def make_evaluation_set(
    content: PictureSource, style: PictureSource, *, num_pairs: int, size: int, seed: int
) -> EvaluationSet:
    """Reads the pairs' pictures: middle squares, resized to `size` px."""
    pairs = choose_pairs(len(content.names), len(style.names), num_pairs, seed)
    return EvaluationSet(
        content=torch.stack([_load(content, index, size) for index, _ in pairs]),
        style=torch.stack([_load(style, index, size) for _, index in pairs]),
        content_names=[content.names[index] for index, _ in pairs],
        style_names=[style.names[index] for _, index in pairs],
        content_digest=content.digest,
        style_digest=style.digest,
        seed=seed,
        size=size,
    )


def _load(source: PictureSource, index: int, size: int) -> Tensor:
    pixels = np.array(square(source.load(index), size))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
