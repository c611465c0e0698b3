"""What is at CORPUS already, and what of it is lost."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra import storage
from nst.ledger import NO_SHARD
from nst.manifest import FAILURES_NAME, MANIFEST_NAME, REMEDY, CorpusError, Manifest, ShardInfo
from nst.planning import ShardSettings
from nst.shards import TAR_BLOCK
from pipelines.catalogue import Catalogue
from pipelines.shard_publishing import OUR_FILE

FOLDERS = ("shards", "_nst")
OUR_MEMBER = re.compile(r"\d{6,}-\d{5,}\.jpg")
OPTIONS = {"image_size": "--size", "shard_mb": "--shard-mb"}


@dataclass(frozen=True, kw_only=True)
class CorpusState:
    """`manifest` is None (and its text too) where no run has finished. `files` has the sizes in bytes of what
    lies below CORPUS/shards and CORPUS/_nst, by key."""

    uri: str
    files: dict[str, int] = field(repr=False)
    manifest: Manifest | None = None
    manifest_text: bytes | None = field(default=None, repr=False)

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return self.manifest.shards if self.manifest else ()

    def lost_shards(self) -> list[ShardInfo]:
        """Published shards whose files are missing or cut."""
        return [
            shard
            for shard in self.shards
            if self.files.get(shard.tar) != shard.num_bytes
            or self.files.get(shard.index) != shard.index_num_bytes
        ]

    def load_ledger(self, catalogue: Catalogue) -> None:
        """Raises CorpusError if it is missing, cut or altered."""
        if self.manifest is None:
            return
        ledger = self._fetch(self.manifest.ledger or "", catalogue)
        is_old = "reason" not in pq.read_schema(ledger).names
        catalogue.load_ledger(ledger, self._fetch(FAILURES_NAME, catalogue) if is_old else None)

    def refuse_changed(self, catalogue: Catalogue) -> None:
        """Raises ValueError if an image that the corpus holds has changed: a corpus keeps what it has."""
        num_changed, first = catalogue.changed()
        if num_changed:
            raise ValueError(
                f"{num_changed} images that {self.uri} holds have changed since ({first}); a corpus "
                "keeps what it has: shard into a new place, or put the old ones back"
            )

    def next_number(self, catalogue: Catalogue) -> int:
        last = max((int(shard.name) for shard in self.shards), default=NO_SHARD)
        return 1 + max(last, catalogue.last_known_shard())

    def _fetch(self, name: str, catalogue: Catalogue) -> str:
        assert self.manifest is not None
        path = Path(catalogue.folder, Path(name).name)
        uri = storage.join(self.uri, name)
        try:
            storage.download_file(uri, str(path))
            with path.open("rb") as file:
                is_whole = hashlib.file_digest(file, "sha256").hexdigest() == self.manifest.files.get(name)
        except (FileNotFoundError, IsADirectoryError):
            is_whole = False
        if not is_whole:
            remedy = REMEDY.replace("delete it", f"delete {MANIFEST_NAME}")
            raise CorpusError(f"{uri} is missing, cut or altered; {remedy}")
        return str(path)


def read_state(corpus_uri: str, settings: ShardSettings) -> CorpusState:
    """Raises ValueError if CORPUS was made with other settings or by something else, CorpusError if its
    manifest is damaged."""
    files = {
        f"{folder}/{found.key}": found.num_bytes
        for folder in FOLDERS
        for found in storage.list_objects(storage.join(corpus_uri, folder))
    }
    manifest_uri = storage.join(corpus_uri, MANIFEST_NAME)
    try:
        text = storage.read_bytes(manifest_uri)
    except FileNotFoundError:
        _refuse_foreign_tars(corpus_uri, files)
        return CorpusState(uri=corpus_uri, files=files)
    manifest = Manifest.from_json(text, manifest_uri)
    _check_settings(corpus_uri, manifest, settings)
    return CorpusState(uri=corpus_uri, files=files, manifest=manifest, manifest_text=text)


def _check_settings(corpus_uri: str, manifest: Manifest, settings: ShardSettings) -> None:
    if manifest.is_adopted:
        raise ValueError(f"{corpus_uri} holds tars that `nst index` adopted; shard into a place of its own")
    before = _as_written_now(manifest.settings)
    for name, value in settings.to_dict().items():
        if before.get(name) != value:
            option = OPTIONS.get(name, "--" + name.replace("_", "-"))
            raise ValueError(
                f"{corpus_uri} was sharded with {option} {before.get(name)}, not {value}; give that or "
                "another place"
            )


def _as_written_now(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a manifest, also of one from before `dedupe` had a choice and there was `keep_bytes`."""
    dedupe = {False: "none", True: "exact"}.get(settings["dedupe"], settings["dedupe"])
    return {"keep_bytes": False, **settings, "dedupe": dedupe}


def _refuse_foreign_tars(corpus_uri: str, files: Mapping[str, int]) -> None:
    """Without a manifest, what lies there must be what an interrupted run of ours has left."""
    tars = sorted(key for key in files if key.startswith("shards/") and key.endswith(".tar"))
    foreign = [key for key in tars if not OUR_FILE.fullmatch(Path(key).name)]
    for key in foreign or tars[:1]:
        if foreign or not begins_like_ours(storage.join(corpus_uri, key)):
            raise ValueError(
                f"{storage.join(corpus_uri, key)} was not written by `nst shard`; adopt it with `nst index` "
                "or shard into an empty place"
            )


def begins_like_ours(uri: str) -> bool:
    """Whether a tar's first member has a name that we give."""
    header = storage.read_part(uri, 0, TAR_BLOCK)
    try:
        with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
            first = tar.next()
    except tarfile.TarError:
        return False
    return first is None or OUR_MEMBER.fullmatch(first.name) is not None
