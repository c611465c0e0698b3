"""How a finished shard gets its place in a corpus: written once, never over another run's.

A shard's files are called by its number. Two runs at once, or an earlier one that was interrupted, may have
put other images under the same number. Whoever comes first keeps the name; the other takes a name that has
the digest of its plan in it. Only the manifest says which shards are the corpus's.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra import storage
from nst.manifest import ShardInfo
from nst.planning import ShardPlan
from nst.shards import ShardRecord, index_metadata, read_record

SUFFIXES = ("tar", "parquet")  # the index comes last: its presence means that the shard is done
OUR_FILE = re.compile(r"\d{6,}(-[0-9a-f]{8})?\.(tar|parquet)")


@dataclass(frozen=True, kw_only=True)
class PublishedShard:
    """A shard of a corpus: `stem` is the name of its files without their suffix ("" where no image of it
    could be taken: such a shard has no files). `was_there`: another run has written it."""

    record: ShardRecord
    stem: str
    was_there: bool = False

    @property
    def info(self) -> ShardInfo:
        return self.record.info(f"shards/{self.stem}.tar", f"shards/{self.stem}.parquet")


def stems(plan: ShardPlan) -> tuple[str, str]:
    """What the files of a shard may be called, the second if the first is taken."""
    return plan.name, f"{plan.name}-{plan.digest()[:8]}"


def find_published(plan: ShardPlan, corpus_uri: str) -> PublishedShard | None:
    """The shard, if a run has written it from the same plan."""
    for stem in stems(plan):
        try:
            index = storage.read_bytes(_uri(corpus_uri, stem, "parquet"))
        except FileNotFoundError:
            continue
        metadata = index_metadata(index)
        if metadata is None or metadata.get("plan") != plan.digest():
            continue
        record = read_record(plan.name, index)
        tar = storage.stat(_uri(corpus_uri, stem, "tar"))
        if tar is not None and tar.num_bytes == record.num_bytes:
            return PublishedShard(record=record, stem=stem, was_there=True)
    return None


def publish(plan: ShardPlan, record: ShardRecord, folder: str, corpus_uri: str) -> PublishedShard:
    """Puts `folder/NAME.tar` and `folder/NAME.parquet` into the corpus, under the first name that is free or
    that holds the same bytes. Raises OSError if the store did not keep them."""
    if not record.num_samples:
        return PublishedShard(record=record, stem="")
    for stem in stems(plan):
        if all(
            _put(Path(folder, f"{plan.name}.{suffix}"), _uri(corpus_uri, stem, suffix)) for suffix in SUFFIXES
        ):
            return PublishedShard(record=record, stem=stem)
    raise OSError(
        f"{corpus_uri} holds other files under both names of shard {plan.name}, {' and '.join(stems(plan))}; "
        "remove those"
    )


def restore(
    plan: ShardPlan, record: ShardRecord, folder: str, corpus_uri: str, lost: ShardInfo
) -> PublishedShard:
    """Puts the files of a shard that the manifest names, and that is lost or damaged, back into their places.
    Raises ValueError if the tar is not as it was."""
    if record.sha256 != lost.sha256:
        raise ValueError(
            f"shard {plan.name} of {corpus_uri} is lost and cannot be made again as it was, because its "
            "sources have changed since; shard into a new place"
        )
    stem = Path(lost.tar).stem
    for suffix in SUFFIXES:
        path, uri = Path(folder, f"{plan.name}.{suffix}"), _uri(corpus_uri, stem, suffix)
        storage.upload_file(str(path), uri)
        _check_size(path, uri)
    return PublishedShard(record=record, stem=stem)


def _put(path: Path, uri: str) -> bool:
    """False if something else has that name."""
    if not storage.upload_file(str(path), uri, if_absent=True):
        return _has_same_bytes(path, uri)
    _check_size(path, uri)
    return True


def _has_same_bytes(path: Path, uri: str) -> bool:
    found = storage.stat(uri)
    if found is None or found.num_bytes != path.stat().st_size:
        return False
    with tempfile.TemporaryDirectory(prefix="compare-", dir=path.parent) as folder:
        copy = Path(folder, path.name)
        storage.download_file(uri, str(copy))
        return _sha256(copy) == _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, uri: str) -> None:
    published, num_bytes = storage.stat(uri), path.stat().st_size
    if published is None or published.num_bytes != num_bytes:
        raise OSError(f"{uri} was written, but does not have the {num_bytes:,} bytes it should")


def _uri(corpus_uri: str, stem: str, suffix: str) -> str:
    return storage.join(corpus_uri, "shards", f"{stem}.{suffix}")
