"""`nst index`: WebDataset tars that something else wrote become a corpus; they stay as they are."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ray

from infra import cluster, places, storage
from nst.adoption import UnusableTar, adopt_tar
from nst.ledger import encode_failures
from nst.manifest import FAILURES_NAME, MANIFEST_NAME, Manifest, ShardInfo
from nst.planning import ROLES
from nst.shards import Failure, ShardRecord, index_metadata, read_record
from pipelines.console import Progress, Stage, StageFailed, say
from pipelines.shard_tasks import OPTIONS

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
DECOMPRESS = "is a compressed tar, of which no sample can be read alone; decompress it"


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What a task found in one tar. `problem` says why the tar cannot be used; then `record` is None."""

    tar: str
    index: str
    record: ShardRecord | None
    shorter_sides: dict[int, int]
    problem: str = ""


@click.command("index", cls=Stage)
@click.argument("corpus")
@click.option(
    "--role", type=click.Choice(ROLES), default="content", show_default=True, help="What the images are for."
)
@click.option("--workers", type=click.IntRange(min=1), help="Tars indexed at once (default: one a CPU).")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    help="Exit with 1 if more samples fail (default: any number).",
)
def index(corpus: str, role: str, workers: int | None, max_failures: int | None) -> dict[str, Any]:
    """Make a corpus of the tars in CORPUS/shards (or, if there are none, in CORPUS), without rewriting them.

    A sample is a .jpg, .jpeg, .png or .webp with what else has the same name up to the first dot. Its label
    is "label" in its .json, else its .cls, else the folder it is in. What cannot be used is in
    CORPUS/failures.parquet. A tar that is cut fails the command, and nothing is published.

    \b
    Examples:
      nst index laion-subset/ --role content
      nst index s3://bucket/paintings --role style
    """
    started = time.monotonic()
    uri = corpus.rstrip("/")
    tars, compressed = _find_tars(uri)
    _refuse_own_corpus(uri)
    adopted = _adopt_all(uri, tars, workers)
    if unusable := [f"{found.tar} {found.problem}" for found in adopted if found.problem]:
        raise StageFailed(f"{len(unusable)} of {len(tars)} tars cannot be adopted: {'; '.join(unusable)}")
    manifest, failures = _manifest(uri, role, adopted, compressed)
    result = {
        "corpus": uri,
        "role": role,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_labels": len(manifest.labels),
        "num_failures": len(failures),
        "failures": dict(sorted(Counter(failure.reason for failure in failures).items())),
        "digest": manifest.digest,
        "seconds": round(time.monotonic() - started, 2),
    }
    storage.write_bytes(storage.join(uri, FAILURES_NAME), encode_failures(failures))
    if not manifest.num_samples:
        raise StageFailed(f"no sample of {uri} can be used; {uri}/{FAILURES_NAME} says why", result)
    storage.write_bytes(storage.join(uri, MANIFEST_NAME), manifest.to_json().encode())
    say(
        f"{uri}: adopted {manifest.num_samples} {role} images, {len(manifest.labels)} labels, "
        f"{len(manifest.shards)} tars, in {result['seconds']:.1f} s"
    )
    if failures:
        shown = ", ".join(f"{count} {reason}" for reason, count in result["failures"].items())
        say(f"not taken: {len(failures)} ({shown}); listed in {storage.join(uri, FAILURES_NAME)}")
    if max_failures is not None and len(failures) > max_failures:
        raise StageFailed(f"{len(failures)} samples failed, more than --max-failures {max_failures}", result)
    return result


def _find_tars(uri: str) -> tuple[list[str], list[str]]:
    """Keys of the tars below CORPUS, and of the compressed ones beside them, in order."""
    for prefix in ("shards/", ""):
        listed = storage.list_objects(
            storage.join(uri, prefix) if prefix else uri, suffixes=(".tar", *COMPRESSED)
        )
        found = [prefix + item.key for item in listed if "/" not in item.key and item.uri != uri]
        tars = [key for key in found if key.lower().endswith(".tar")]
        compressed = [key for key in found if key not in tars]
        if tars:
            return tars, compressed
        if compressed:
            raise ValueError(f"{uri} holds no plain tars: {compressed[0]} {DECOMPRESS}")
    raise ValueError(f"{uri} holds no tars, neither itself nor in {uri}/shards; give the folder they are in")


def _refuse_own_corpus(uri: str) -> None:
    manifest_uri = storage.join(uri, MANIFEST_NAME)
    if not storage.exists(manifest_uri):
        return
    if not Manifest.from_json(storage.read_bytes(manifest_uri), manifest_uri).is_adopted:
        raise ValueError(f"{uri} is a corpus that `nst shard` made; it needs no index")


def _adopt_all(uri: str, tars: list[str], workers: int | None) -> list[Adopted]:
    info = cluster.connect(min_cpus=workers or 1)
    in_flight = workers or max(2, 2 * info.num_cpus)
    with Progress("index", total=len(tars), unit="tar") as progress:
        adopted = []
        for found in cluster.run_bounded(adopt_one, ((uri, tar) for tar in tars), max_in_flight=in_flight):
            adopted.append(found)
            progress.advance(failed=bool(found.problem))
    return sorted(adopted, key=lambda found: found.tar)


@ray.remote(**OPTIONS)
def adopt_one(uri: str, tar: str) -> Adopted:
    """Indexes one tar and publishes its index; one that fits is taken over. Repeating it changes nothing."""
    name = Path(tar).stem
    index_key, index = f"shards/{name}.parquet", _read_if_there(storage.join(uri, f"shards/{name}.parquet"))
    if index is not None and index_metadata(index) is None:  # img2dataset keeps a table of its own there
        index_key = f"shards/{name}.index.parquet"
        index = _read_if_there(storage.join(uri, index_key))
    with tempfile.TemporaryDirectory(prefix="nst-index-") as folder:
        path = _local_copy(uri, tar, folder)
        try:
            adopted = adopt_tar(path, tar)
        except UnusableTar as error:
            return Adopted(tar=tar, index=index_key, record=None, shorter_sides={}, problem=str(error))
    if adopted.index != index:
        storage.write_bytes(storage.join(uri, index_key), adopted.index)
    return Adopted(
        tar=tar, index=index_key, record=read_record(name, adopted.index), shorter_sides=adopted.shorter_sides
    )


def _local_copy(uri: str, tar: str, folder: str) -> str:
    if not storage.is_remote(uri):
        return places.local_path(storage.join(uri, tar))
    path = str(Path(folder, "shard.tar"))
    storage.download_file(storage.join(uri, tar), path)
    return path


def _read_if_there(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None


def _manifest(
    uri: str, role: str, adopted: list[Adopted], compressed: list[str]
) -> tuple[Manifest, list[Failure]]:
    shards: list[ShardInfo] = []
    labels: Counter[str] = Counter()
    sides: Counter[int] = Counter()
    failures = [Failure(source=key, reason="unsupported", detail=DECOMPRESS) for key in compressed]
    for found in adopted:
        record = found.record
        assert record is not None, found.tar
        failures += record.failures
        labels.update(record.labels)
        sides.update(found.shorter_sides)
        if record.num_samples:
            shards.append(record.info(found.tar, found.index))
    manifest = Manifest(
        role=role,
        image_size=int(statistics.median(sides.elements())) if sides else 0,
        num_samples=sum(shard.num_samples for shard in shards),
        labels=dict(sorted(labels.items())),
        shards=tuple(shards),
        settings={"adopted": True},
        source=uri,
        num_failures=len(failures),
        files={FAILURES_NAME: hashlib.sha256(encode_failures(failures)).hexdigest()},
    )
    return manifest, failures


if __name__ == "__main__":
    index()
