"""What a Ray worker does for `nst shard`: write one shard, or hash some inputs. Small records come back."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import ray

from infra import cluster, scratch, storage
from nst import isolation
from nst.images import ImageError
from nst.manifest import ShardInfo
from nst.near_duplicates import near_hash
from nst.planning import ShardPlan, SourceImage
from nst.shards import LIMITS, prepare_image, write_shard
from pipelines import shard_publishing
from pipelines.shard_publishing import PublishedShard

# Three attempts, for a worker that dies and for a storage that fails; a user's mistake is not repeated.
OPTIONS: Any = {"num_cpus": 1, "max_retries": 2, "retry_exceptions": [OSError]}
NUM_READS_AT_ONCE = 4

P = ParamSpec("P")
T = TypeVar("T")
InputHashes = tuple[str, str | None, int | None]


@ray.remote(**OPTIONS)
def write_one(
    plan: ShardPlan, source_uri: str, corpus_uri: str, scratch_dir: str | None, lost: ShardInfo | None
) -> PublishedShard:
    """Writes, checks and publishes a shard, unless a run has done so already. Repeating it changes nothing.

    `scratch_dir` is a local folder for the work (None: a temporary one). `lost` is what the manifest says of
    a shard whose files are missing or cut: these are put back. Raises ValueError if its tar cannot be made
    again as it was.
    """

    def read(image: SourceImage) -> bytes:
        return storage.read_bytes(storage.join(source_uri, image.source))

    if lost is None and (found := shard_publishing.find_published(plan, corpus_uri)) is not None:
        return found
    with (
        scratch.folder("nst-shard-", parent=scratch_dir) as folder,
        _careful_if_tried_before(prepare_image) as prepare,
    ):
        record = write_shard(plan, read, folder, prepare=prepare)
        if lost is not None:
            return shard_publishing.restore(plan, record, folder, corpus_uri, lost)
        return shard_publishing.publish(plan, record, folder, corpus_uri)


@ray.remote(**OPTIONS)
def hash_some(images: Sequence[SourceImage], source_uri: str, near: bool) -> list[InputHashes]:
    """Of every image, in their order: (source, sha256 of its bytes, its near hash).

    The hashes are None for what cannot be read or is too large to be taken; the near hash also unless `near`,
    and for a picture that has none: a broken one, which fails when it is sharded, or a flat one.
    """

    def hash_one(image: SourceImage, look_of: Callable[[bytes], int | None]) -> InputHashes:
        if image.num_bytes > LIMITS.max_bytes:
            return image.source, None, None
        try:
            data = storage.read_bytes(storage.join(source_uri, image.source))
        except (FileNotFoundError, PermissionError):
            return image.source, None, None
        look = None
        if near:
            with contextlib.suppress(ImageError):
                look = look_of(data)
        return image.source, hashlib.sha256(data).hexdigest(), look

    with _careful_if_tried_before(near_hash) as look_of, ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
        return list(pool.map(hash_one, images, itertools.repeat(look_of)))


def _careful_if_tried_before(function: Callable[P, T]) -> AbstractContextManager[Callable[P, T]]:
    """`function`, in a process apart if this task was tried before: what its worker died of may have been an
    image that crashes the decoder, which then becomes the failure of this one image."""
    if cluster.num_earlier_attempts():
        return isolation.apart(function)
    return contextlib.nullcontext(function)
