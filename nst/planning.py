"""Which image goes into which shard: a pure function of the inputs and the settings, so that any number of
workers, and a run that was interrupted, arrive at the same bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
ROLES = ("content", "style")
DEDUPES = ("none", "exact", "near")
NO_LABEL = "unlabelled"

# A sample of ours (JPEG, JSON, tar headers) per pixel, measured on photographs and paintings at 288 pixels.
BYTES_PER_PIXEL = 0.42
ASPECT_RATIO = 1.4
# A small corpus is cut into a few shards all the same, so that several workers find work.
FEW_SHARDS = 8
FEW_IMAGES = 64
MAX_IMAGES_PER_SHARD = 100_000
# An object store takes 5 GiB in one request, and images may need more than twice the bytes that are expected.
MAX_SHARD_MB = 2048


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What the bytes of a corpus depend on, apart from the images. Raises ValueError for what cannot be.

    `image_size` is the shorter side in pixels that larger images are shrunk to; `shard_mb` the size in MiB
    that a shard should not pass; `labels` says where labels come from: dirname, none, csv or parquet;
    `dedupe` which repeated inputs are left out: none, exact (the same bytes) or near (they look the same,
    too); `keep_bytes` whether an input that needs no change is stored as it is.
    """

    role: str
    image_size: int = 288
    shard_mb: int = 256
    labels: str = "dirname"
    dedupe: str = "none"
    keep_bytes: bool = False
    jpeg_quality: int = 92

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is none of {', '.join(ROLES)}")
        if not 16 <= self.image_size <= 4096:
            raise ValueError(f"an image size of {self.image_size} is out of range; choose 16 to 4096 pixels")
        if not 1 <= self.shard_mb <= MAX_SHARD_MB:
            raise ValueError(f"shards of {self.shard_mb} MiB are out of range; choose 1 to {MAX_SHARD_MB}")
        if self.dedupe not in DEDUPES:
            raise ValueError(f"dedupe {self.dedupe!r} is none of {', '.join(DEDUPES)}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """An input: `source` is its posix path relative to the source folder or prefix."""

    source: str
    label: str
    num_bytes: int

    @property
    def order(self) -> tuple[str, str]:
        return self.label, self.source


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The inputs of one shard, in the order of its samples."""

    number: int
    images: tuple[SourceImage, ...]
    settings: ShardSettings

    @property
    def name(self) -> str:
        return f"{self.number:06d}"

    def digest(self) -> str:
        """Tells whether a shard that is there already is this one."""
        images = [[image.source, image.label, image.num_bytes] for image in self.images]
        settings = self.settings.to_dict() | {"dedupe": self.settings.dedupe != "none"}
        if not self.settings.keep_bytes:
            del settings["keep_bytes"]  # shards that were written before there was this setting stay the same
        return digest_of({"version": FORMAT_VERSION, "settings": settings, "images": images})


def plan_shards(
    images: Iterable[SourceImage], settings: ShardSettings, *, first_number: int = 0
) -> list[ShardPlan]:
    """Sorts by (label, source), so that a label is a run of neighbours, and cuts at `shard_edges`."""
    ordered = sorted(images, key=lambda image: image.order)
    return [
        ShardPlan(number=first_number + position, images=tuple(ordered[start:end]), settings=settings)
        for position, (start, end) in enumerate(itertools.pairwise(shard_edges(len(ordered), settings)))
    ]


def shard_edges(num_images: int, settings: ShardSettings) -> list[int]:
    """Where a sorted list of images is cut: shard k has those from edge k up to edge k + 1. Shards have equal
    numbers of images (give or take one), and each is expected to stay below `settings.shard_mb`."""
    if not num_images:
        return []
    bytes_per_image = settings.image_size**2 * ASPECT_RATIO * BYTES_PER_PIXEL
    most = min(MAX_IMAGES_PER_SHARD, max(1, int(settings.shard_mb * 2**20 / bytes_per_image)))
    num_shards = max(math.ceil(num_images / most), min(FEW_SHARDS, math.ceil(num_images / FEW_IMAGES)))
    return [position * num_images // num_shards for position in range(num_shards + 1)]


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 (hex) of a JSON value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
