"""The files that travel with a job: code and small inputs, never data, caches, environments, hidden files."""

from __future__ import annotations

import fnmatch
import functools
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
    "mlruns",
    "mlartifacts",
    "*.egg-info",
    "*.pyc",
    "*.tmp",
)
# A folder with one of these is a corpus, a training (under Ray, or plain), a checkpoint, a report of an
# evaluation, a stylized bucket or a tracking store.
DATA = (
    "corpus.json",
    "run.json",
    "corpora.json",
    "training.safetensors",
    "evaluation.json",
    "_nst",
    "mlflow.db",
)
# Folders or files, in whatever case, but for Python modules of such a name.
SECRETS = (
    "secrets",
    "secrets.*",
    "*.env",
    "*.pem",
    "*.key",
    "*.ppk",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.keystore",
    "*.kdbx",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*credentials*",
    "*client_secret*",
    "*service[-_]account*",
    "auth_token*",
    "*kubeconfig*",
    "*htpasswd",
)
SECONDS_FOR_GIT = 10
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold


def files_to_pack(working_dir: str) -> dict[str, Path]:
    """Name in the package -> file, in order of the names; with our packages where `working_dir` has none.
    In a work tree of git what git ignores stays here, and everywhere what has the name of a secret, of data
    or of something that is made anew.

    Raises ValueError if `working_dir` is no folder or has more than 64 MiB to pack.
    """
    root = Path(working_dir)
    if not root.is_dir():
        raise ValueError(f"--working-dir {working_dir} is no folder")
    files = dict(_files_in(root))
    for package in OUR_PACKAGES:
        if not (root / package / "__init__.py").is_file():
            files |= {f"{package}/{name}": path for name, path in _files_in(REPOSITORY / package)}
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


def _files_in(root: Path) -> Iterator[tuple[str, Path]]:
    holds_data = functools.cache(_holds_data)
    listed = _known_to_git(root)
    for name in _walk(root) if listed is None else listed:
        path = root / name
        folders = list(path.relative_to(root).parents)[:-1]  # below `root`, which may be anything
        if _is_left_out(name) or any(holds_data(root / folder) for folder in folders):
            continue
        if path.is_file():
            yield name, path
        elif path.is_dir() and not path.is_symlink() and not holds_data(path):  # a repository of its own
            yield from ((f"{name.rstrip('/')}/{inner}", file) for inner, file in _files_in(path))


def _holds_data(folder: Path) -> bool:
    return any((folder / name).exists() for name in DATA)


def _is_left_out(name: str) -> bool:
    for part in name.rstrip("/").split("/"):
        if part.startswith(".") or any(fnmatch.fnmatchcase(part, pattern) for pattern in LEFT_OUT):
            return True
        if not part.endswith(".py") and any(fnmatch.fnmatchcase(part.lower(), secret) for secret in SECRETS):
            return True
    return False


def _walk(root: Path) -> Iterator[str]:
    """All files, but for those below a folder that is left out: data may be millions."""
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if not _is_left_out(name) and not _holds_data(Path(folder, name))
        ]
        yield from (str(Path(folder, name).relative_to(root)) for name in files)


def _known_to_git(root: Path) -> list[str] | None:
    """What git tracks in the folder or would add, relative to it; None without git, outside of its work trees
    and in a folder that is ignored as a whole (an environment inside of a repository, say)."""
    if _git(root, "check-ignore", "--quiet", ".") is not None:
        return None
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    return None if listed is None else sorted(set(filter(None, listed.split("\0"))))


def _git(folder: str | Path, *arguments: str) -> str | None:
    """What git prints; None if it says no, is not there or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=SECONDS_FOR_GIT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return os.fsdecode(done.stdout)


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
    described = _git(root, "describe", "--always", "--dirty", "--abbrev=12")
    return (described or "").strip() or None
