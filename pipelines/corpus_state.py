"""What is at CORPUS already, and what a run of `nst shard` still has to do there."""

from __future__ import annotations

import hashlib
import re
import tarfile
from dataclasses import dataclass, field

from infra import storage
from nst.ledger import NO_SHARD, LedgerEntry, decode_failures, decode_ledger, plan_of
from nst.manifest import FAILURES_NAME, LEDGER_NAME, MANIFEST_NAME, REMEDY, CorpusError, Manifest
from nst.planning import ShardPlan, ShardSettings, SourceImage
from nst.shards import Failure, ShardRecord, index_metadata, read_record
from pipelines.corpus_inputs import Inputs

OUR_FILE = re.compile(r"\d{6}\.(tar|parquet)")
OUR_MEMBER = re.compile(r"\d{6}-\d{5}\.jpg")
OPTIONS = {"image_size": "--size", "shard_mb": "--shard-mb"}


@dataclass(frozen=True, kw_only=True)
class CorpusState:
    """`manifest` is None (and the rest of it empty) where no run has finished. `files` has the sizes in bytes
    of what lies below CORPUS/shards."""

    uri: str
    files: dict[str, int]
    manifest: Manifest | None = None
    manifest_text: bytes = b""
    ledger: list[LedgerEntry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def next_number(self) -> int:
        shards = self.manifest.shards if self.manifest else ()
        return 1 + max(
            [NO_SHARD, *(int(shard.name) for shard in shards), *(entry.shard for entry in self.ledger)]
        )

    def new_images(self, inputs: Inputs) -> list[SourceImage]:
        """The inputs that no run has dealt with, and those that failed and have another size now.

        Raises ValueError if an image that the corpus holds has changed, because a corpus keeps what it has.
        """
        known = {entry.image.source: entry.image for entry in self.ledger}
        failed = {failure.source for failure in self.failures}
        new: list[SourceImage] = []
        changed: list[str] = []
        for image in inputs.images:
            before = known.get(image.source)
            if before is None or (image.source in failed and before.num_bytes != image.num_bytes):
                new.append(image)
            elif image.source not in failed and before != image:
                what = "size" if before.num_bytes != image.num_bytes else "label"
                changed.append(f"the {what} of {image.source}")
        if changed:
            raise ValueError(
                f"{len(changed)} images that {self.uri} holds have changed since ({changed[0]}); a corpus "
                "keeps what it has: shard into a new place, or put the old ones back"
            )
        return new

    def lost_shards(self, settings: ShardSettings) -> list[tuple[ShardPlan, str]]:
        """Published shards whose files are missing or cut: (plan, sha256 that its tar must get)."""
        return [
            (plan_of(int(shard.name), self.ledger, settings), shard.sha256)
            for shard in (self.manifest.shards if self.manifest else ())
            if self.files.get(f"{shard.name}.tar") != shard.num_bytes
            or self.files.get(f"{shard.name}.parquet") != shard.index_num_bytes
        ]

    def finished(self, plan: ShardPlan) -> ShardRecord | None:
        """The record of a shard that an interrupted run has written from the same plan."""
        if f"{plan.name}.parquet" not in self.files or f"{plan.name}.tar" not in self.files:
            return None
        index = storage.read_bytes(storage.join(self.uri, "shards", f"{plan.name}.parquet"))
        metadata = index_metadata(index)
        if metadata is None or metadata.get("plan") != plan.digest():
            return None
        record = read_record(plan.name, index)
        return record if record.num_bytes == self.files[f"{plan.name}.tar"] else None


def read_state(corpus_uri: str, settings: ShardSettings) -> CorpusState:
    """Raises ValueError if CORPUS was made with other settings or by something else, CorpusError if one of
    the files that say what it holds is damaged."""
    shards_uri = storage.join(corpus_uri, "shards")
    files = {found.key: found.num_bytes for found in storage.list_objects(shards_uri)}
    manifest_uri = storage.join(corpus_uri, MANIFEST_NAME)
    try:
        text = storage.read_bytes(manifest_uri)
    except FileNotFoundError:
        _refuse_foreign_tars(shards_uri, files)
        return CorpusState(uri=corpus_uri, files=files)
    manifest = Manifest.from_json(text, manifest_uri)
    _check_settings(corpus_uri, manifest, settings)
    return CorpusState(
        uri=corpus_uri,
        files=files,
        manifest=manifest,
        manifest_text=text,
        ledger=decode_ledger(_read_checked(corpus_uri, LEDGER_NAME, manifest)),
        failures=decode_failures(_read_checked(corpus_uri, FAILURES_NAME, manifest)),
    )


def _check_settings(corpus_uri: str, manifest: Manifest, settings: ShardSettings) -> None:
    if manifest.is_adopted:
        raise ValueError(f"{corpus_uri} holds tars that `nst index` adopted; shard into a place of its own")
    for name, value in settings.to_dict().items():
        before = manifest.settings.get(name)
        if before != value:
            option = OPTIONS.get(name, "--" + name.replace("_", "-"))
            raise ValueError(
                f"{corpus_uri} was sharded with {option} {before}, not {value}; give that or another place"
            )


def _read_checked(corpus_uri: str, name: str, manifest: Manifest) -> bytes:
    uri = storage.join(corpus_uri, name)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
        remedy = REMEDY.replace("delete it", f"delete {MANIFEST_NAME}")
        raise CorpusError(f"{uri} is missing, cut or altered; {remedy}")
    return data


def _refuse_foreign_tars(shards_uri: str, files: dict[str, int]) -> None:
    """Without a manifest, what lies there must be what an interrupted run of ours has left."""
    for name in sorted(files):
        if name.endswith(".tar") and not (OUR_FILE.fullmatch(name) and _begins_like_ours(shards_uri, name)):
            raise ValueError(
                f"{storage.join(shards_uri, name)} was not written by `nst shard`; adopt it with `nst index` "
                "or shard into an empty place"
            )


def _begins_like_ours(shards_uri: str, name: str) -> bool:
    filesystem, path = storage.pyarrow_filesystem(storage.join(shards_uri, name))
    with filesystem.open_input_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                first = tar.next()
        except tarfile.TarError:
            return False
    return first is None or OUR_MEMBER.fullmatch(first.name) is not None
