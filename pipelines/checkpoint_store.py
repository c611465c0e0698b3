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
from dataclasses import asdict, dataclass
from pathlib import Path

from infra import storage
from pipelines.console import StageFailed

log = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"
NUM_NEWEST = 3


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
            OSError: the store did not take it. What was there before is untouched, and so it is after a kill.
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
        self._remove_others()
        return stored

    def stored(self) -> list[StoredCheckpoint]:
        """Every complete checkpoint, the newest first. Their files may still be damaged."""
        found = []
        for checksums in storage.list_objects(self.uri, suffixes=(f"/{CHECKSUMS_FILE}",)):
            try:
                found.append(StoredCheckpoint(**json.loads(storage.read_bytes(checksums.uri))))
            except FileNotFoundError:
                continue  # it made room for a newer one since it was listed
            except (ValueError, TypeError) as error:
                log.warning("%s is damaged and not used (%s)", checksums.uri, error)
        return sorted(found, key=lambda checkpoint: checkpoint.num_images_seen, reverse=True)

    def fetch(self, name: str, folder: str) -> None:
        """Copies the checkpoint `name` into the empty `folder`.

        Raises:
            Damaged: it is not what was written.
        """
        stored = StoredCheckpoint(**json.loads(storage.read_bytes(self._uri(name, CHECKSUMS_FILE))))
        for file, sha256 in stored.sha256.items():
            path = Path(folder, Path(file).name)
            try:
                storage.download_file(self._uri(name, path.name), str(path))
            except FileNotFoundError as error:
                raise Damaged(f"{self._uri(name, path.name)} is missing") from error
            if _sha256(path) != sha256:
                raise Damaged(f"{self._uri(name, path.name)} has other bytes than were written")

    def fetch_newest(self, folder: str) -> StoredCheckpoint | None:
        """The newest whole checkpoint, copied into the empty `folder`; None if none was ever complete.

        Raises:
            StageFailed: there are some, and all are damaged.
        """
        found = self.stored()
        for checkpoint in found:
            try:
                self.fetch(checkpoint.name, folder)
            except Damaged as error:
                log.warning("%s; the checkpoint before it is taken", error)
                for path in _files(folder):
                    path.unlink()
            else:
                return checkpoint
        if found:
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

    def _remove_others(self) -> None:
        found = self.stored()
        kept = {checkpoint.name for checkpoint in [*found[:NUM_NEWEST], *filter(None, [_best(found)])]}
        for checkpoint in found:
            if checkpoint.name not in kept:
                for file in (CHECKSUMS_FILE, *checkpoint.sha256):  # first what makes it a checkpoint
                    storage.delete(self._uri(checkpoint.name, file))


def _best(found: list[StoredCheckpoint]) -> StoredCheckpoint | None:
    scored = [(checkpoint.score, checkpoint) for checkpoint in found if checkpoint.score is not None]
    return min(scored, key=lambda pair: pair[0])[1] if scored else None


def _files(folder: str) -> list[Path]:
    return sorted(path for path in Path(folder).iterdir() if path.name[0] != ".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
