"""The files of a registered version: a list of them all with their checksums, made when it is published and
held against them when it is fetched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "files.json"

# What MLflow leaves behind in a folder that it loads a model from.
TRACES_OF_LOADING = ("registered_model_meta",)
PYTHON_CACHE = "__pycache__"


def write_manifest(folder: str | Path) -> str:
    """Lists every file below `folder` in `files.json` (path -> sha256); returns that file's own sha256."""
    sha256 = {path: _sha256(Path(folder, path)) for path in _files(Path(folder))}
    text = json.dumps(sha256, indent=1, sort_keys=True)
    Path(folder, MANIFEST).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def check_files(folder: str | Path, manifest_digest: str) -> None:
    """Raises OSError, naming the file, if one below `folder` was altered, removed or added since
    `write_manifest` returned `manifest_digest`."""
    manifest = Path(folder, MANIFEST)
    if not manifest.is_file():
        raise OSError(f"{MANIFEST} is missing")
    if _sha256(manifest) != manifest_digest:
        raise OSError(f"{MANIFEST} was altered after it was registered")
    listed = json.loads(manifest.read_text())
    found = set(_files(Path(folder)))
    for path, sha256 in listed.items():
        if path not in found:
            raise OSError(f"{path} is missing")
        if _sha256(Path(folder, path)) != sha256:
            raise OSError(f"{path} was altered after it was registered")
    if added := sorted(found - set(listed)):
        raise OSError(f"{added[0]} was added after it was registered")


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_file()
            and name not in (MANIFEST, *TRACES_OF_LOADING)
            and PYTHON_CACHE not in path.relative_to(folder).parts
        ):
            yield name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
