"""The pairs that models are measured on: fixed by what lies there and a seed."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra import places, storage
from nst.corpus import Corpus
from nst.grids import square
from nst.images import SUFFIXES, ImageError, difference_hash, open_image, over_white
from nst.manifest import MANIFEST_NAME
from nst.near_duplicates import near_hash
from nst.planning import NO_LABEL
from pipelines.console import Progress

NUM_PAIRS, SIZE, SEED = 64, 256, 0

Identity = dict[str, str | int | None]


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Pictures that can be had by number. `digest` stands for what there is to choose from: the manifest of a
    corpus, of a folder the names and sizes of its pictures (what they show is told by the digest of the set
    that is chosen). A picture in a folder that is no corpus has the first part of its path as label, as
    `nst shard` would give it."""

    uri: str
    names: list[str]
    labels: list[str]
    digest: str
    read: Callable[[int], bytes]
    load: Callable[[int], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What tells a picture from others: its label, and the hashes of the file that it came from: of its
    bytes, and of its looks as `nst.near_duplicates` (None: it is too flat to have one) and as
    `nst.images.difference_hash` (16 hex digits) take them."""

    label: str
    sha256: str
    near_hash: int | None
    phash: str


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """N pairs, chosen by `seed` among `num_contents` and `num_styles` pictures. `content` and `style` are
    [N, 3, size, size] in [0, 1], the middle squares in 8-bit steps; the names say what they are."""

    content: Tensor
    style: Tensor
    content_names: list[str]
    style_names: list[str]
    content_references: list[Reference]
    style_references: list[Reference]
    content_digest: str
    style_digest: str
    num_contents: int
    num_styles: int
    seed: int
    size: int

    def __len__(self) -> int:
        return len(self.content)

    def identity(self) -> Identity:
        """What makes figures comparable, as far as it is the set's: all of this must agree."""
        return {
            "content_digest": self.content_digest,
            "style_digest": self.style_digest,
            "digest": self.digest,
            "num_pairs": len(self),
            "seed": self.seed,
            "size": self.size,
        }

    @cached_property
    def digest(self) -> str:
        """sha256 over the pixels of all pairs in order: another decoder or resizer shows here."""
        digest = hashlib.sha256()
        for content, style in zip(self.content, self.style, strict=True):
            digest.update(pixels_of(content).tobytes())
            digest.update(pixels_of(style).tobytes())
        return digest.hexdigest()

    def pairs(self) -> dict[str, list[int]]:
        """Which content and which style each pair has, as numbers: pairs that share one go up and down
        together."""
        return {
            "content": np.unique(self.content_names, return_inverse=True)[1].tolist(),
            "style": np.unique(self.style_names, return_inverse=True)[1].tolist(),
        }


def open_pictures(uri: str) -> PictureSource:
    """A corpus, or a folder or prefix with pictures, of which none is read yet. Raises ValueError if it is
    neither."""
    uri = places.absolute(uri)
    if storage.exists(places.join(uri, MANIFEST_NAME)):
        corpus = open_corpus(uri)
        labels = [corpus.label_names[label] for label in corpus.labels]
        return PictureSource(
            uri=uri,
            names=[f"{label} {row}" for row, label in enumerate(labels)],
            labels=labels,
            digest=corpus.manifest.digest,
            read=corpus.read,
            load=corpus.decode,
        )
    found = [one for one in storage.list_objects(uri) if one.key.lower().endswith(SUFFIXES)]
    if not found:
        raise ValueError(
            f"{uri} is no corpus and holds no pictures; give a corpus, or a folder with pictures"
        )
    digest = hashlib.sha256()
    for one in found:
        digest.update(f"{one.key}\0{one.num_bytes}\n".encode())

    @functools.lru_cache(maxsize=1)  # it is decoded, then hashed
    def read(index: int) -> bytes:
        return storage.read_bytes(found[index].uri)

    def load(index: int) -> NDArray[np.uint8]:
        try:
            opened = open_image(read(index))
        except ImageError as error:
            raise ValueError(
                f"{found[index].uri} cannot be used ({error}); take it away or replace it"
            ) from None
        return np.asarray(over_white(opened.rgb, opened.alpha))

    names = [one.key for one in found]
    labels = [name.split("/")[0] if "/" in name else NO_LABEL for name in names]
    return PictureSource(uri=uri, names=names, labels=labels, digest=digest.hexdigest(), read=read, load=load)


def open_corpus(uri: str) -> Corpus:
    """A corpus in a folder or a bucket. Raises ValueError if there is none."""
    return Corpus.open(uri, storage=storage.ObjectStorage() if places.is_remote(uri) else None)


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
    wanted = [list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)]
    with Progress("read pictures", total=sum(map(len, wanted))) as progress:
        contents, styles = (
            {index: _read(source, index, size, progress) for index in indexes}
            for source, indexes in zip((content, style), wanted, strict=True)
        )
    return EvaluationSet(
        content=torch.stack([contents[index][0] for index, _ in pairs]),
        style=torch.stack([styles[index][0] for _, index in pairs]),
        content_names=[content.names[index] for index, _ in pairs],
        style_names=[style.names[index] for _, index in pairs],
        content_references=[contents[index][1] for index, _ in pairs],
        style_references=[styles[index][1] for _, index in pairs],
        content_digest=content.digest,
        style_digest=style.digest,
        num_contents=len(content.names),
        num_styles=len(style.names),
        seed=seed,
        size=size,
    )


def pixels_of(picture: Tensor) -> NDArray[np.uint8]:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3]."""
    return (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def picture_of(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [H, W, 3] -> [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _read(source: PictureSource, index: int, size: int, progress: Progress) -> tuple[Tensor, Reference]:
    picture = picture_of(np.array(square(source.load(index), size)))
    data = source.read(index)
    opened = open_image(data)
    progress.advance()
    return picture, Reference(
        label=source.labels[index],
        sha256=hashlib.sha256(data).hexdigest(),
        near_hash=near_hash(data),
        phash=difference_hash(over_white(opened.rgb, opened.alpha)),
    )
