"""`nst demo` as a person starts it, with a training too short to be good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.console import EXIT_GATE_REFUSED
from tests.servers import REPOSITORY


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_it_goes_from_pictures_to_the_gate(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.cli", "demo", "--workdir", str(tmp_path), "--images", "64"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == EXIT_GATE_REFUSED, done.stdout + done.stderr
    (record,) = tmp_path.rglob("run.json")
    assert json.loads(record.read_text())["status"] == "FINISHED"
    assert (tmp_path / "report" / "report.html").exists()
    assert "Traceback" not in done.stderr
