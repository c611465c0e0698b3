"""What a Ray worker does for `nst shard`: write one shard, or hash some inputs. Small records come back."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from infra import storage
from nst.images import ImageLimits
from nst.planning import ShardPlan, SourceImage
from nst.shards import ShardRecord, write_shard

# Three attempts, for a worker that dies and for a storage that fails; a user's mistake is not repeated.
OPTIONS: Any = {"num_cpus": 1, "max_retries": 2, "retry_exceptions": [OSError]}
NUM_READS_AT_ONCE = 4


@ray.remote(**OPTIONS)
def write_one(
    plan: ShardPlan, source_uri: str, corpus_uri: str, scratch_dir: str | None, expected_sha256: str | None
) -> ShardRecord:
    """Writes, checks and publishes a shard: the tar first, then the index, whose presence means done.

    Repeating it changes nothing. `scratch_dir` is a local folder for the work (None: a temporary one).
    Raises ValueError instead of publishing a tar that is not the expected one, where one is.
    """

    def read(image: SourceImage) -> bytes:
        return storage.read_bytes(storage.join(source_uri, image.source))

    with tempfile.TemporaryDirectory(prefix="nst-shard-", dir=scratch_dir) as folder:
        record = write_shard(plan, read, folder)
        if expected_sha256 not in (None, record.sha256):
            raise ValueError(
                f"shard {plan.name} of {corpus_uri} is lost and cannot be made again as it was, because "
                f"{source_uri} has changed since; shard into a new place"
            )
        for name in (f"{plan.name}.tar", f"{plan.name}.parquet"):
            path, uri = Path(folder, name), storage.join(corpus_uri, "shards", name)
            storage.upload_file(str(path), uri)
            published = storage.stat(uri)
            if published is None or published.num_bytes != path.stat().st_size:
                raise OSError(
                    f"{uri} was written, but does not have the {path.stat().st_size:,} bytes it should"
                )
    return record


@ray.remote(**OPTIONS)
def hash_some(images: list[SourceImage], source_uri: str) -> dict[str, str]:
    """source -> sha256 of its bytes. What cannot be read, or is too large to be taken, is left out."""

    def hash_one(image: SourceImage) -> str | None:
        if image.num_bytes > ImageLimits().max_bytes:
            return None
        try:
            data = storage.read_bytes(storage.join(source_uri, image.source))
        except (FileNotFoundError, PermissionError):
            return None
        return hashlib.sha256(data).hexdigest()

    with ThreadPoolExecutor(NUM_READS_AT_ONCE) as pool:
        hashes = list(pool.map(hash_one, images))
    return {image.source: digest for image, digest in zip(images, hashes, strict=True) if digest is not None}
