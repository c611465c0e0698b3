"""`make fault-matrix`: trains once for each fault and writes what came of it into the README."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.servers import REPOSITORY

README = REPOSITORY / "README.md"
BEGIN, END = "<!-- fault matrix: written by `make fault-matrix` -->\n", "<!-- end of fault matrix -->\n"
HEAD = (
    "| one fault during a training | restarts | longer by | final weights | MLflow run | processes left |\n"
    "|---|---|---|---|---|---|\n"
)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="nst-fault-table-") as folder:
        table = Path(folder, "table.md")
        table.touch()
        command = [sys.executable, "-m", "pytest", "-m", "faults", "tests/pipelines/test_train_faults.py"]
        done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "NST_FAULT_TABLE": str(table)})
        if done.returncode:
            return done.returncode
        before, _, rest = README.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        assert end, f"README.md has no {BEGIN}"
        README.write_text(f"{before}{BEGIN}{HEAD}{table.read_text()}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
