"""The last step of `nst shard`: what the run came to becomes the files that say what the corpus holds.

Two runs may get here at once. What they write before `corpus.json` has names that they cannot share, and
`corpus.json` is replaced only if it still is what the run began with: one wins, and the other says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from infra import storage
from nst.ledger import FAILURES_SCHEMA, LEDGER_SCHEMA, write_rows
from nst.manifest import FAILURES_NAME, LEDGER_PREFIX, MANIFEST_NAME, Manifest, ShardInfo
from nst.planning import ShardSettings
from pipelines.catalogue import Catalogue
from pipelines.console import StageFailed
from pipelines.corpus_state import CorpusState, begins_like_ours
from pipelines.shard_publishing import OUR_FILE, PublishedShard


@dataclass(kw_only=True)
class Written:
    """The shards that a run has written, or an interrupted one had. `own_keys`: the files of the former."""

    shards: dict[str, ShardInfo] = field(default_factory=dict)
    own_keys: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    num_were_there: int = 0

    def add(self, published: PublishedShard, *, is_restored: bool) -> None:
        record = published.record
        if record.num_samples:
            info = self.shards[record.name] = published.info
            if not published.was_there:
                self.own_keys |= {info.tar, info.index}
        if not is_restored:
            self.labels.update(record.labels)
        self.num_were_there += published.was_there


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the run came to: with what was there before, all that the corpus holds. The plan was cut into
    `num_planned_shards` shards, numbered from `first_number`."""

    source_uri: str
    settings: ShardSettings
    state: CorpusState
    catalogue: Catalogue
    first_number: int
    num_planned_shards: int
    written: Written

    def publish(self) -> Manifest:
        """Writes the ledger, then corpus.json, then the failures, if any of it has changed.

        Raises StageFailed if no image could be taken, or if another run has changed the corpus meanwhile.
        """
        state, uri, catalogue = self.state, self.state.uri, self.catalogue
        catalogue.conclude(first_shard=self.first_number, num_shards=self.num_planned_shards)
        failures = self._write("failures.parquet", FAILURES_SCHEMA, catalogue.failures())
        ledger = self._write("ledger.parquet", LEDGER_SCHEMA, catalogue.ledger())
        ledger_name = f"{LEDGER_PREFIX}-{ledger.sha256[:16]}.parquet"
        manifest = self._manifest({FAILURES_NAME: failures.sha256, ledger_name: ledger.sha256})
        if manifest.num_samples == 0:
            storage.upload_file(failures.path, storage.join(uri, FAILURES_NAME))
            raise StageFailed(
                f"none of the {manifest.num_failures} inputs could be taken; {uri}/{FAILURES_NAME} says why",
                {"corpus": uri, "num_samples": 0, "num_failures": manifest.num_failures},
            )
        text = manifest.to_json().encode()
        is_new = text != state.manifest_text
        if is_new:
            self._check_all_there(manifest)
            storage.upload_file(ledger.path, storage.join(uri, ledger_name))
            if not storage.replace_bytes(
                storage.join(uri, MANIFEST_NAME), text, expected=state.manifest_text
            ):
                self._withdraw(ledger_name)
                raise StageFailed(
                    f"another run has published {uri}/{MANIFEST_NAME} meanwhile; run again to add what it "
                    "lacks"
                )
        self._publish_failures(failures)
        self._delete_leftovers(manifest if is_new else None)
        return manifest

    def _write(self, name: str, schema: pa.Schema, rows: Iterator[pa.RecordBatch]) -> _LocalFile:
        path = Path(self.catalogue.folder, f"new-{name}")
        write_rows(str(path), schema, rows)
        with path.open("rb") as file:
            return _LocalFile(path=str(path), sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def _manifest(self, files: dict[str, str]) -> Manifest:
        before = self.state.manifest
        labels = Counter(before.labels if before else {}) + self.written.labels
        shards = {shard.name: shard for shard in self.state.shards} | self.written.shards
        return Manifest(
            role=self.settings.role,
            image_size=self.settings.image_size,
            num_samples=sum(shard.num_samples for shard in shards.values()),
            labels=dict(sorted(labels.items())),
            shards=tuple(shards[name] for name in sorted(shards, key=int)),
            settings=self.settings.to_dict(),
            source=self.source_uri,
            num_failures=sum(reason.num for reason in self.catalogue.reasons()),
            files=files,
        )

    def _check_all_there(self, manifest: Manifest) -> None:
        """A run that has won may have removed what it took for leftovers of a dead one."""
        shards_uri = storage.join(self.state.uri, "shards")
        there = {f"shards/{found.key}": found.num_bytes for found in storage.list_objects(shards_uri)}
        for shard in manifest.shards:
            if (there.get(shard.tar), there.get(shard.index)) != (shard.num_bytes, shard.index_num_bytes):
                raise StageFailed(
                    f"shard {shard.name} of {self.state.uri} went away or changed while this run went on, as "
                    "when another one works there; run again to write it again"
                )

    def _withdraw(self, ledger_name: str) -> None:
        """Deletes what this run has written and the corpus, as another one published it, does not have."""
        uri = storage.join(self.state.uri, MANIFEST_NAME)
        kept = _keys(Manifest.from_json(storage.read_bytes(uri), uri))
        for key in sorted((self.written.own_keys | {ledger_name}) - kept):
            storage.delete(storage.join(self.state.uri, key))

    def _publish_failures(self, failures: _LocalFile) -> None:
        """Written by the run that has won, and again by the next one where that was killed in between."""
        uri = storage.join(self.state.uri, FAILURES_NAME)
        try:
            is_there = hashlib.sha256(storage.read_bytes(uri)).hexdigest() == failures.sha256
        except FileNotFoundError:
            is_there = False
        if not is_there:
            storage.upload_file(failures.path, uri)

    def _delete_leftovers(self, manifest: Manifest | None) -> None:
        """What the corpus does not need: some readers take all of shards/*.tar.

        Shards and ledgers go only where this run has published a manifest. A run that began before that can
        no longer publish; without it, they might be those of a run that goes on right now.
        """
        uri = self.state.uri
        storage.remove_abandoned(uri)
        if manifest is None:
            return
        for key in sorted(set(self.state.files) - _keys(manifest)):
            if key.startswith(LEDGER_PREFIX) or self._is_our_shard(key):
                storage.delete(storage.join(uri, key))

    def _is_our_shard(self, key: str) -> bool:
        if not (key.startswith("shards/") and OUR_FILE.fullmatch(Path(key).name)):
            return False
        return not key.endswith(".tar") or begins_like_ours(storage.join(self.state.uri, key))


def _keys(manifest: Manifest) -> set[str]:
    """The files of a corpus."""
    return {key for shard in manifest.shards for key in (shard.tar, shard.index)} | set(manifest.files)


@dataclass(frozen=True, kw_only=True)
class _LocalFile:
    path: str
    sha256: str
