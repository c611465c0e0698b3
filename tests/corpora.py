"""Small corpora of real pictures for tests, made by the product's own code without a cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from nst.images import encode_jpeg
from nst.manifest import MANIFEST_NAME, Manifest
from nst.planning import ShardSettings, SourceImage, plan_shards
from nst.shards import ShardRecord, write_shard


def photographs() -> list[np.ndarray]:
    """Two real photographs that scikit-learn carries, uint8 [427, 640, 3]."""
    return [np.asarray(image) for image in load_sample_images().images]


def pieces(side: int = 96) -> dict[str, list[np.ndarray]]:
    """Squares cut out of the photographs, by label: what a small corpus is made of."""
    found = {}
    for label, image in zip(("china", "flower"), photographs(), strict=True):
        tops, lefts = range(0, image.shape[0] - side, side), range(0, image.shape[1] - side, side)
        found[label] = [image[top : top + side, left : left + side] for top in tops for left in lefts]
    return found


def make_corpus(folder: Path, role: str, *, side: int = 96, per_label: int = 6) -> str:
    """A corpus with the labels china-bright, china-dark, flower-bright and flower-dark, in three shards."""
    images: dict[str, bytes] = {}
    for label, cut in pieces(side).items():
        for number, piece in enumerate(cut[:per_label]):
            images[f"{label}-bright/{number}.jpg"] = encode_jpeg(piece)
            images[f"{label}-dark/{number}.jpg"] = encode_jpeg((piece * 0.4).astype(np.uint8))
    sources = [
        SourceImage(source=source, label=source.split("/")[0], num_bytes=len(data))
        for source, data in images.items()
    ]
    shards = folder / "shards"
    shards.mkdir(parents=True)
    records = [
        write_shard(plan, lambda image: images[image.source], str(shards))
        for plan in plan_shards(sources, ShardSettings(role=role, image_size=side))
    ]
    return corpus_of(records, folder, role=role, image_size=side)


def corpus_of(records: list[ShardRecord], folder: Path, *, role: str, image_size: int) -> str:
    """Makes a corpus of the written shards in `folder/shards`; returns its place."""
    labels: Counter[str] = Counter()
    for record in records:
        labels.update(record.labels)
    manifest = Manifest(
        role=role,
        image_size=image_size,
        num_samples=labels.total(),
        labels=dict(sorted(labels.items())),
        shards=tuple(record.info() for record in records),
        settings=ShardSettings(role=role, image_size=image_size).to_dict(),
        source="tests",
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return str(folder)
