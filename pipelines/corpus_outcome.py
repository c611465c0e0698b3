"""The last step of `nst shard`: what the run came to becomes the files that say what the corpus holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infra import storage
from nst.ledger import NO_SHARD, LedgerEntry, encode_failures, encode_ledger
from nst.manifest import FAILURES_NAME, LEDGER_NAME, MANIFEST_NAME, Manifest, ShardInfo
from nst.planning import ShardPlan, ShardSettings
from nst.shards import UNREADABLE, Failure, ShardRecord
from pipelines.console import StageFailed
from pipelines.corpus_inputs import Inputs
from pipelines.corpus_state import OUR_FILE, CorpusState


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the run came to: with what was there before, all that the corpus holds."""

    source_uri: str
    settings: ShardSettings
    state: CorpusState
    inputs: Inputs
    plans: list[ShardPlan]
    records: dict[str, ShardRecord]
    duplicates: list[Failure]
    hashes: dict[str, str]

    def publish(self) -> Manifest:
        """Writes the failures and the ledger, then corpus.json, if any of it has changed."""
        state, uri = self.state, self.state.uri
        parts = {FAILURES_NAME: encode_failures(self.failures()), LEDGER_NAME: encode_ledger(self.ledger())}
        manifest = self._manifest({name: hashlib.sha256(data).hexdigest() for name, data in parts.items()})
        text = manifest.to_json().encode()
        if manifest.num_samples == 0:
            storage.write_bytes(storage.join(uri, FAILURES_NAME), parts[FAILURES_NAME])
            raise StageFailed(
                f"none of the {manifest.num_failures} inputs could be taken; {uri}/{FAILURES_NAME} says why",
                {"corpus": uri, "num_samples": 0, "num_failures": manifest.num_failures},
            )
        if text != state.manifest_text:
            self._refuse_if_another_run_published(text)
            for name, data in parts.items():
                storage.write_bytes(storage.join(uri, name), data)
            storage.write_bytes(storage.join(uri, MANIFEST_NAME), text)
        self._delete_leftovers(manifest)
        return manifest

    def failures(self) -> list[Failure]:
        """One a input that is under SOURCE now and was not taken."""
        handled_now = {image.source for plan in self.plans for image in plan.images}
        handled_now |= {failure.source for failure in self.duplicates}
        listed = {image.source for image in self.inputs.images}
        failures = {
            failure.source: failure
            for failure in self.state.failures
            if failure.source in listed and failure.source not in handled_now
        }
        planned = {plan.name for plan in self.plans}
        records = [record for name, record in self.records.items() if name in planned]
        in_shards = (failure for record in records for failure in record.failures)
        for failure in (*self.inputs.refused, *self.duplicates, *in_shards):
            failures[failure.source] = failure
        return list(failures.values())

    def num_gone(self) -> int:
        """Images that the corpus holds and that are no longer under SOURCE."""
        listed = {image.source for image in self.inputs.images}
        failed = {failure.source for failure in self.state.failures}
        known = {entry.image.source for entry in self.state.ledger}
        return len(known - listed - failed)

    def ledger(self) -> list[LedgerEntry]:
        """What was dealt with, unlike what could not be read, which the next run tries again."""
        entries = {entry.image.source: entry for entry in self.state.ledger}
        for plan in self.plans:
            unread = {
                failure.source for failure in self.records[plan.name].failures if failure.reason == UNREADABLE
            }
            for image in plan.images:
                if image.source not in unread:
                    sha256 = self.hashes.get(image.source, "")
                    entries[image.source] = LedgerEntry(image=image, shard=plan.number, sha256=sha256)
        sizes = {image.source: image for image in self.inputs.images}
        for failure in self.duplicates:
            image, sha256 = sizes[failure.source], self.hashes[failure.source]
            entries[failure.source] = LedgerEntry(image=image, shard=NO_SHARD, sha256=sha256)
        return list(entries.values())

    def _manifest(self, files: dict[str, str]) -> Manifest:
        before = self.state.manifest
        labels = Counter(before.labels if before else {})
        shards = {shard.name: shard for shard in (before.shards if before else ())}
        for name, record in sorted(self.records.items()):
            if name not in shards:
                labels.update(record.labels)
            if record.num_samples:
                shards[name] = _shard_info(record)
        return Manifest(
            role=self.settings.role,
            image_size=self.settings.image_size,
            num_samples=sum(shard.num_samples for shard in shards.values()),
            labels=dict(sorted(labels.items())),
            shards=tuple(shards[name] for name in sorted(shards)),
            settings=self.settings.to_dict(),
            source=self.source_uri,
            num_failures=len(self.failures()),
            files=files,
        )

    def _refuse_if_another_run_published(self, text: bytes) -> None:
        uri = storage.join(self.state.uri, MANIFEST_NAME)
        found = storage.read_bytes(uri) if storage.exists(uri) else b""
        if found not in (self.state.manifest_text, text):
            raise StageFailed(f"another run has published {uri} meanwhile; run again to add what it lacks")

    def _delete_leftovers(self, manifest: Manifest) -> None:
        """Shards of interrupted runs that came to nothing: some readers take all of shards/*.tar."""
        kept = {Path(key).name for shard in manifest.shards for key in (shard.tar, shard.index)}
        written = {f"{name}.{suffix}" for name in self.records for suffix in ("tar", "parquet")}
        for name in sorted((set(self.state.files) | written) - kept):
            if OUR_FILE.fullmatch(name):
                storage.delete(storage.join(self.state.uri, "shards", name))


def _shard_info(record: ShardRecord) -> ShardInfo:
    return ShardInfo(
        name=record.name,
        num_samples=record.num_samples,
        num_bytes=record.num_bytes,
        sha256=record.sha256,
        tar=f"shards/{record.name}.tar",
        index=f"shards/{record.name}.parquet",
        index_num_bytes=record.index_num_bytes,
        index_sha256=record.index_sha256,
        plan=record.plan,
    )
