"""ARCHITECTURE.md names every module, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_module_has_its_line():
    modules = {
        str(path.relative_to(ROOT))
        for package in ("nst", "infra", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    named = re.findall(r"^\| `([a-z0-9_/]+\.py)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(modules)
