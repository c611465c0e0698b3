"""The inputs of a corpus: what lies under SOURCE, its labels, and what is refused without being opened."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from infra import storage
from nst.images import SUFFIXES
from nst.planning import NO_LABEL, SourceImage
from nst.shards import Failure


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`images` in plain string order of their paths; `refused` is everything else under SOURCE that is not
    hidden."""

    images: list[SourceImage]
    refused: list[Failure]


def list_inputs(source_uri: str, labels: str) -> Inputs:
    """Lists SOURCE. `labels` is dirname, none, or a CSV file with the columns path and label.

    Raises ValueError if SOURCE is missing or a file, holds no image, or the CSV file cannot be used.
    """
    label_of, listed = _labelling(labels)
    images: list[SourceImage] = []
    refused: list[Failure] = []
    for found in storage.list_objects(source_uri):
        if found.uri == source_uri:
            raise ValueError(f"{source_uri} is a file; give the folder or prefix that it is in")
        name = found.key.encode("utf-8", "backslashreplace").decode()
        listed.discard(found.key)
        problem = _problem_of(found.key)
        label = label_of(found.key)
        if problem is not None:
            refused.append(Failure(source=name, reason=problem[0], detail=problem[1]))
        elif label is None:
            refused.append(Failure(source=name, reason="no_label", detail=f"has no row in {labels}"))
        else:
            images.append(SourceImage(source=found.key, label=label, num_bytes=found.num_bytes))
    if not images and not refused:
        raise ValueError(
            f"{source_uri} does not exist or holds no files; give a folder or prefix with images"
        )
    if not images:
        raise ValueError(f"{source_uri} holds {len(refused)} files, but no image to take: {_first(refused)}")
    for path in sorted(listed):
        refused.append(Failure(source=path, reason="missing", detail=f"is in {labels}, but not under SOURCE"))
    return Inputs(images=images, refused=refused)


def _first(refused: list[Failure]) -> str:
    return f"{refused[0].source} {refused[0].detail}"


def _problem_of(key: str) -> tuple[str, str] | None:
    """Why a name is refused: (reason, detail). One without a suffix says nothing, so that file is opened."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return "unsupported", "has a name that is not UTF-8; rename it"
    if ".." in key.split("/"):
        return "unsupported", "has '..' in its key; rename it"
    suffix = PurePosixPath(key).suffix.lower()
    if suffix and suffix not in SUFFIXES:
        return "not_an_image", f"has the suffix {suffix}, which no image that is read has"
    return None


def _labelling(labels: str) -> tuple[Callable[[str], str | None], set[str]]:
    """(key -> label or None if it has none, the keys that must be there)."""
    if labels == "none":
        return (lambda key: NO_LABEL), set()
    if labels == "dirname":
        return (lambda key: key.split("/")[0] if "/" in key else NO_LABEL), set()
    table = _read_csv(labels)
    return table.get, set(table)


def _read_csv(uri: str) -> dict[str, str]:
    """path -> label. Raises ValueError if the file is missing or is no such table."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(
            f"--labels {uri}: no such file; give dirname, none or a CSV file with the columns path and label"
        ) from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise ValueError(f"--labels {uri} is no CSV file in UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        columns, rows = list(reader.fieldnames or []), list(reader)
    except csv.Error as error:
        raise ValueError(f"--labels {uri} is no CSV file: line {reader.line_num}: {error}") from None
    if "path" not in columns or "label" not in columns:
        shown = ", ".join(columns) or "(none)"
        raise ValueError(f"--labels {uri} has the columns {shown}; it needs path and label")
    table: dict[str, str] = {}
    for row in rows:
        path, label = (row["path"] or "").strip(), (row["label"] or "").strip() or NO_LABEL
        path = path.removeprefix("./")
        if table.setdefault(path, label) != label:
            raise ValueError(f"--labels {uri}: {path} has two labels, {table[path]} and {label}; keep one")
    return table
