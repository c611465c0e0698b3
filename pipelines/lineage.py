"""Where results come from: a digest of the code that made them."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

PACKAGES = ("nst", "infra", "pipelines")


@functools.cache
def code_digest() -> str:
    """sha256 over the Python sources of our packages: names and bytes, in order."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
