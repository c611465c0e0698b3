"""The files that travel with a job: code and small inputs, never data, caches, environments, hidden files."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

from infra.cluster import OUR_PACKAGES, REPOSITORY

# Ray refuses 100 MiB, late and without a word about which files they are.
MAX_BYTES = 64 << 20
# Hidden names are left out anyway: .git, .venv, .nst, caches, and .env, which holds secrets.
LEFT_OUT = (
    "__pycache__",
    "venv",
    "nst-demo",
    "build",
    "dist",
    "node_modules",
    "*.egg-info",
    "*.pyc",
    "*.tmp",
)
# A folder with one of these is a corpus, a training, a stylized bucket or a tracking store.
DATA = ("corpus.json", "run.json", "_nst", "mlflow.db")
SECRETS = ("secrets", "*.env", "*.pem", "*.key", "credentials", "auth_token")
SECONDS_FOR_GIT = 10
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


def files_to_pack(working_dir: str) -> dict[str, Path]:
    """Name in the package -> file, in order of the names; with our packages where `working_dir` has none.

    Raises ValueError if `working_dir` is no folder or has more than 64 MiB to pack.
    """
    root = Path(working_dir)
    if not root.is_dir():
        raise ValueError(f"--working-dir {working_dir} is no folder")
    files = dict(_walk(root, ""))
    for package in OUR_PACKAGES:
        if not (root / package / "__init__.py").is_file():
            files |= _walk(REPOSITORY / package, f"{package}/")
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if sum(sizes.values()) > MAX_BYTES:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise ValueError(
            f"--working-dir {working_dir} would send {sum(sizes.values()) / 2**20:.0f} MiB with the job; the "
            f"limit is {MAX_BYTES >> 20} MiB and the largest are {named}. Put data into a bucket, or name a "
            "smaller folder"
        )
    return dict(sorted(files.items()))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_left_out = any(fnmatch.fnmatch(entry.name, pattern) for pattern in (*LEFT_OUT, *SECRETS))
        if entry.name.startswith(".") or is_left_out:
            continue
        if entry.is_dir(follow_symlinks=False) and not any(Path(entry.path, name).exists() for name in DATA):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield f"{prefix}{entry.name}", Path(entry.path)


def pack(working_dir: str, archive: Path) -> str:
    """Writes the zip and returns the digest of names and contents; the same files give the same bytes."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as package:
        for name, path in files_to_pack(working_dir).items():
            data = path.read_bytes()
            digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = (0o755 if os.access(path, os.X_OK) else 0o644) << 16
            package.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return digest.hexdigest()


def commit_of(working_dir: str) -> str | None:
    """The commit (`-dirty` behind it if files differ) of the code that travels; None if git knows of none."""
    has_ours = all((Path(working_dir) / package / "__init__.py").is_file() for package in OUR_PACKAGES)
    root = working_dir if has_ours else str(REPOSITORY)
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_GIT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
