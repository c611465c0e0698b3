"""Every byte of a corpus against its checksums: what is damaged, by name, without stopping at the first."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nst.manifest import MANIFEST_NAME, Manifest, ShardInfo
from nst.verified_files import Storage, is_remote, local_path


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One file of a corpus. `problems` is empty where it is whole; `num_samples` is 0 for all but tars."""

    key: str
    num_samples: int
    problems: tuple[str, ...]


def check_corpus(uri: str, manifest: Manifest, storage: Storage) -> Iterator[PartReport]:
    """Reads the manifest's own text and every file that it names: sizes, checksums, and each sample through
    its index.

    Damage is reported; what keeps a file from being read (other than its absence) is raised as OSError.
    """
    text = storage.read_bytes(f"{uri}/{MANIFEST_NAME}")
    yield PartReport(key=MANIFEST_NAME, num_samples=0, problems=_problems_of_text(text))
    for key, sha256 in manifest.files.items():
        data = _read(uri, key, storage)
        yield PartReport(key=key, num_samples=0, problems=_problems_of_bytes(data, None, sha256))
    for shard in manifest.shards:
        index = _read(uri, shard.index, storage)
        problems = _problems_of_bytes(index, shard.index_num_bytes, shard.index_sha256)
        yield PartReport(key=shard.index, num_samples=0, problems=problems)
        rows = [] if problems or index is None else pq.read_table(pa.BufferReader(index)).to_pylist()
        yield PartReport(
            key=shard.tar, num_samples=shard.num_samples, problems=_problems_of_tar(uri, shard, rows, storage)
        )


def _problems_of_text(text: bytes) -> tuple[str, ...]:
    """The manifest's checksum is that of its content, which a blank for another leaves as it is."""
    try:
        is_as_written = text == (json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n").encode()
    except ValueError:
        is_as_written = False
    return () if is_as_written else ("is altered: it is not as it was written",)


def _read(uri: str, key: str, storage: Storage) -> bytes | None:
    try:
        return storage.read_bytes(f"{uri}/{key}")
    except FileNotFoundError:
        return None


def _problems_of_bytes(data: bytes | None, num_bytes: int | None, sha256: str) -> tuple[str, ...]:
    if data is None:
        return ("is missing",)
    if num_bytes is not None and len(data) != num_bytes:
        return (f"has {len(data):,} bytes instead of {num_bytes:,}",)
    return () if hashlib.sha256(data).hexdigest() == sha256 else ("is altered: its checksum does not fit",)


def _problems_of_tar(
    uri: str, shard: ShardInfo, rows: list[dict[str, Any]], storage: Storage
) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(prefix="nst-check-") as folder:
        path = Path(local_path(uri), shard.tar)
        if is_remote(uri):
            path = Path(folder, "shard.tar")
            try:
                storage.download_file(f"{uri}/{shard.tar}", str(path))
            except FileNotFoundError:
                return ("is missing",)
        if not path.is_file():
            return ("is missing",)
        problems = []
        if path.stat().st_size != shard.num_bytes:
            problems.append(f"has {path.stat().st_size:,} bytes instead of {shard.num_bytes:,}")
        with path.open("rb") as file:
            if not problems and hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                problems.append("is altered: its checksum does not fit")
            return tuple(problems + _problems_of_samples(file, rows))


def _problems_of_samples(file: io.BufferedReader, rows: list[dict[str, Any]]) -> list[str]:
    damaged = []
    for row in rows:
        file.seek(row["offset"])
        if hashlib.sha256(file.read(row["size"])).hexdigest() != row["sha256"]:
            damaged.append(row["key"])
    problems = [f"{len(damaged)} of {len(rows)} samples are damaged (first: {damaged[0]})"] if damaged else []
    if rows and not damaged:
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                places = {(member.offset_data, member.size) for member in tar if member.isfile()}
        except tarfile.TarError as error:
            return [f"cannot be read as a tar: {error}"]
        num_lost = sum((row["offset"], row["size"]) not in places for row in rows)
        problems += [f"{num_lost} samples are not where its index says"] if num_lost else []
    return problems
