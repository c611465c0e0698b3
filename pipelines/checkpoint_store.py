"""The checkpoints of one training, under OUT/NAME/checkpoints: each complete or absent, and verified when it
is read. The newest few are kept, and the best.

checkpoints/000000012000/   named by the images seen
    model.safetensors, training.safetensors, state.json, config.json
    checksums.json          written last; a folder without it is no checkpoint
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from infra import storage
from nst.checkpoint import CONFIG_FILE
from pipelines.console import StageFailed

log = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
NUM_NEWEST = 3
NAME = re.compile(r"\d{12}")
FILE_NAME = re.compile(r"[a-z_]+\.(json|safetensors)")
SHA256 = re.compile(r"[0-9a-f]{64}")


class Damaged(Exception):
    """A file of a checkpoint is missing or has other bytes than were written."""


@dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """What `checksums.json` says. `score` is lower for a better one, None if nobody measured it; `sha256` has
    the checksum of each file."""

    name: str
    num_images_seen: int
    score: float | None
    sha256: dict[str, str]

    @classmethod
    def parse(cls, text: bytes, name: str) -> StoredCheckpoint:
        """Raises Damaged unless it is what `publish` writes into the folder `name`: whoever can write to the
        store must not choose which files we read or write here."""
        try:
            found = cls(**json.loads(text))
            is_sound = (
                (found.name, f"{found.num_images_seen:012d}") == (name, name)
                and (found.score is None or isinstance(found.score, float))
                and CONFIG_FILE in found.sha256
                and all(FILE_NAME.fullmatch(file) for file in found.sha256)
                and all(SHA256.fullmatch(sha256) for sha256 in found.sha256.values())
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise Damaged(f"{name}/{CHECKSUMS_FILE} cannot be read ({error})") from error
        if not is_sound:
            raise Damaged(f"{name}/{CHECKSUMS_FILE} is not what was written")
        return found


class CheckpointStore:
    """One writer (rank 0) and any readers.

    Args:
        uri: a folder or s3://bucket/prefix.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def publish(self, folder: str, num_images_seen: int, score: float | None) -> StoredCheckpoint:
        """Copies the files of `folder`; then removes what is neither among the newest nor the best.

        Raises:
            OSError: the store did not take it. Others that are there are untouched, and so they are after a
                kill.
        """
        name = f"{num_images_seen:012d}"
        files = _files(folder)
        stored = StoredCheckpoint(
            name=name,
            num_images_seen=num_images_seen,
            score=score,
            sha256={path.name: _sha256(path) for path in files},
        )
        # A damaged one of this name may be there, of which this training is the remedy.
        storage.delete(self._uri(name, CHECKSUMS_FILE))
        for path in files:
            storage.upload_file(str(path), self._uri(name, path.name))
        storage.write_bytes(self._uri(name, CHECKSUMS_FILE), json.dumps(asdict(stored), indent=1).encode())
        try:
            self._remove_others(name)
        except OSError as error:
            log.warning("%s: old checkpoints stay for now (%s)", self.uri, error)
        return stored

    def stored(self) -> list[StoredCheckpoint]:
        """Every complete checkpoint, the newest first. Their files may still be damaged."""
        return self._read_all()[0]

    def fetch(self, name: str, folder: str) -> None:
        """Copies the checkpoint `name` into the empty `folder`.

        Raises:
            Damaged: it is not what was written.
        """
        try:
            stored = StoredCheckpoint.parse(storage.read_bytes(self._uri(name, CHECKSUMS_FILE)), name)
            for file, sha256 in stored.sha256.items():
                storage.download_file(self._uri(name, file), str(Path(folder, file)))
                if _sha256(Path(folder, file)) != sha256:
                    raise Damaged(f"{self._uri(name, file)} has other bytes than were written")
        except FileNotFoundError as error:
            raise Damaged(f"{self._uri(name)} is not complete: {error}") from error

    def fetch_newest(self, folder: str) -> StoredCheckpoint | None:
        """The newest whole checkpoint, copied into the empty `folder`; None if none was ever complete. Newer
        ones that are damaged are none any more, once a whole one is found.

        Raises:
            StageFailed: there are some, and all are damaged.
        """
        found, num_damaged = self._read_all()
        damaged = []
        for checkpoint in found:
            try:
                self.fetch(checkpoint.name, folder)
            except Damaged as error:
                log.warning("%s; the checkpoint before it is taken", error)
                damaged.append(checkpoint)
                for path in _files(folder):
                    path.unlink()
            else:
                for other in damaged:
                    storage.delete(self._uri(other.name, CHECKSUMS_FILE))
                return checkpoint
        if damaged or num_damaged:
            raise StageFailed(
                f"every checkpoint in {self.uri} is damaged; delete them to train from the start"
            )
        return None

    def uri_of(self, checkpoint: StoredCheckpoint) -> str:
        return self._uri(checkpoint.name)

    def best(self) -> StoredCheckpoint | None:
        """The one with the lowest score."""
        return _best(self.stored())

    def _uri(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    def _read_all(self) -> tuple[list[StoredCheckpoint], int]:
        """(the complete ones, the newest first; how many cannot be read)."""
        found, num_damaged = [], 0
        for checksums in storage.list_objects(self.uri, suffixes=(f"/{CHECKSUMS_FILE}",)):
            name = checksums.key.removesuffix(f"/{CHECKSUMS_FILE}")
            try:
                found.append(StoredCheckpoint.parse(storage.read_bytes(checksums.uri), name))
            except FileNotFoundError:
                continue  # it made room for a newer one since it was listed
            except Damaged as error:
                log.warning("%s is not used: %s", checksums.uri, error)
                num_damaged += 1
        return sorted(found, key=lambda checkpoint: checkpoint.name, reverse=True), num_damaged

    def _remove_others(self, newest: str) -> None:
        """What is not worth keeping, and what killed uploads have left behind."""
        found = self.stored()
        kept = {checkpoint.name for checkpoint in [*found[:NUM_NEWEST], *filter(None, [_best(found)])]}
        files: dict[str, list[str]] = {}
        for item in storage.list_objects(self.uri):
            name, _, file = item.key.partition("/")
            if NAME.fullmatch(name) and name < newest and name not in kept:
                files.setdefault(name, []).append(file)
        for name, its_files in files.items():
            for file in sorted(its_files, key=lambda file: file != CHECKSUMS_FILE):  # what makes it one first
                storage.delete(self._uri(name, file))


def _best(found: list[StoredCheckpoint]) -> StoredCheckpoint | None:
    scored = [(checkpoint.score, checkpoint) for checkpoint in found if checkpoint.score is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else None


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if path.name[0] != ".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
