"""Splits a labelled corpus for a training and for its measurement, by work and by class: details of one
painting are never on both sides.

    python -m benchmarks.split_corpus CORPUS OUT

CORPUS holds `content/`, `style/CLASS/` and LABELS.csv with the columns path and work_id. OUT gets tables that
`nst shard --labels` takes, and the lists of what was held out:

    content.csv, style.csv        path, label of the training
    held_out.csv                  path, label, group: `content`, `works` (unseen works of seen classes) or
                                  `classes` (whole unseen classes)
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HELD_OUT_CLASSES = ("hokusai", "matisse")
HELD_OUT_SHARE = 0.1


class Entry(NamedTuple):
    path: str
    label: str
    group: str


def is_held_out(work_id: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a work is left out of the training. Follows from its name alone, so that a corpus that grows
    keeps its split."""
    digest = hashlib.sha256(work_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(rows: Iterable[dict[str, str]], classes: tuple[str, ...] = HELD_OUT_CLASSES) -> list[Entry]:
    """The group of every row of LABELS.csv: `content`, `works` or `classes` if it is held out, else `train`.

    Raises:
        ValueError: a class to hold out is not there.
    """
    entries = []
    for row in rows:
        role, folder = Path(row["path"]).parts[:2]
        held_out = is_held_out(row["work_id"])
        if role == "content":
            entries.append(Entry(row["path"], folder, "content" if held_out else "train"))
        elif folder in classes:
            entries.append(Entry(row["path"], folder, "classes"))
        else:
            entries.append(Entry(row["path"], folder, "works" if held_out else "train"))
    missing = sorted(set(classes) - {entry.label for entry in entries})
    if missing:
        raise ValueError(f"there is no class {missing[0]!r} to hold out under style/")
    return entries


def _write(path: Path, header: list[str], rows: Iterable[Iterable[str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    with (options.corpus / "LABELS.csv").open(newline="") as file:
        entries = sorted(split(csv.DictReader(file)))
    options.out.mkdir(parents=True, exist_ok=True)
    for role in ("content", "style"):
        trained = [entry for entry in entries if entry.group == "train" and entry.path.startswith(f"{role}/")]
        rows = [(entry.path.removeprefix(f"{role}/"), entry.label) for entry in trained]
        _write(options.out / f"{role}.csv", ["path", "label"], rows)
    _write(options.out / "held_out.csv", list(Entry._fields), [e for e in entries if e.group != "train"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
