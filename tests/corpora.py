"""Small corpora of real pictures for tests, made by the product's own code without a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from nst.images import encode_jpeg
from nst.manifest import MANIFEST_NAME, Manifest, ShardInfo
from nst.planning import ShardSettings, SourceImage, plan_shards
from nst.shards import write_shard


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
    settings = ShardSettings(role=role, image_size=side)
    (folder / "shards").mkdir(parents=True)
    shards, labels = [], {}
    for plan in plan_shards(sources, settings):
        record = write_shard(plan, lambda image: images[image.source], str(folder / "shards"))
        index = folder / "shards" / f"{record.name}.parquet"
        shards.append(
            ShardInfo(
                name=record.name,
                num_samples=record.num_samples,
                num_bytes=record.num_bytes,
                sha256=record.sha256,
                tar=f"shards/{record.name}.tar",
                index=f"shards/{record.name}.parquet",
                index_num_bytes=index.stat().st_size,
                index_sha256=record.index_sha256,
            )
        )
        for label, count in record.labels.items():
            labels[label] = labels.get(label, 0) + count
    manifest = Manifest(
        role=role,
        image_size=side,
        num_samples=sum(labels.values()),
        labels=dict(sorted(labels.items())),
        shards=tuple(shards),
        settings=settings.to_dict(),
        source="tests",
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return str(folder)
