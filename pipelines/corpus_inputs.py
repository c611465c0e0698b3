"""The inputs of a corpus: what lies under SOURCE, its labels, and what is refused without being opened."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from nst.images import SUFFIXES
from nst.planning import NO_LABEL
from pipelines.catalogue import FOUND_SCHEMA, LABELS_SCHEMA, Catalogue
from pipelines.console import Progress, say

ROWS_AT_ONCE = 1 << 16
KEYS_A_PAGE = 1_000  # of an object store's listing
TABLE_SUFFIXES = {".parquet": "parquet", ".pq": "parquet"}


def kind_of_labels(labels: str) -> str:
    """dirname, none, or what kind of table `labels` names: parquet, else csv."""
    return labels if labels in ("dirname", "none") else TABLE_SUFFIXES.get(Path(labels).suffix.lower(), "csv")


def list_inputs(catalogue: Catalogue, source_uri: str, labels: str) -> None:
    """Lists SOURCE into the catalogue. `labels` is dirname, none, or a CSV or Parquet file with the columns
    path and label.

    Raises ValueError if SOURCE is missing or a file, holds no image, or the table cannot be used.
    """
    kind = kind_of_labels(labels)
    if kind in ("csv", "parquet"):
        _read_table(catalogue, labels, kind)
    with Progress("list", total=None, unit="file") as progress:
        num_found = fill(catalogue, storage.list_objects(source_uri), source_uri, progress)
    if not num_found:
        raise ValueError(
            f"{source_uri} does not exist or holds no files; give a folder or prefix with images"
        )
    say(f"{num_found:,} files under {source_uri}")
    catalogue.label_inputs(kind, labels)
    if not catalogue.one("SELECT count(*) FROM inputs"):
        first = catalogue.rows(
            "SELECT source, detail FROM failed WHERE reason != 'missing' ORDER BY source LIMIT 1"
        )
        raise ValueError(f"{source_uri} holds {num_found} files, but no image to take: {' '.join(first[0])}")


def fill(
    catalogue: Catalogue, listing: Iterable[storage.ObjectInfo], source_uri: str, progress: Progress
) -> int:
    """Puts a listing into the catalogue, lazily. Returns how many objects it had."""
    num_found = 0
    for rows in _in_batches(_judged(_counted(listing, progress), source_uri)):
        catalogue.insert("found", dict(zip(FOUND_SCHEMA.names, zip(*rows, strict=True), strict=True)))
        num_found += len(rows)
    return num_found


def _counted(listing: Iterable[storage.ObjectInfo], progress: Progress) -> Iterator[storage.ObjectInfo]:
    number = 0
    for number, found in enumerate(listing, 1):
        if number % KEYS_A_PAGE == 0:
            progress.advance(KEYS_A_PAGE)
        yield found
    progress.advance(number % KEYS_A_PAGE)


def _judged(
    listing: Iterable[storage.ObjectInfo], source_uri: str
) -> Iterator[tuple[str, int, str | None, str | None]]:
    """(source, size in bytes, reason, detail) of each object, the last two None where it is to be opened."""
    for found in listing:
        if found.uri == source_uri:
            raise ValueError(f"{source_uri} is a file; give the folder or prefix that it is in")
        problem = _problem_of(found.key)
        if problem is None:
            yield found.key, found.num_bytes, None, None
        else:
            yield found.key.encode("utf-8", "backslashreplace").decode(), found.num_bytes, *problem


def _problem_of(key: str) -> tuple[str, str] | None:
    """Why a name is refused: (reason, detail). One without a suffix says nothing, so that file is opened."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return "unsupported", "has a name that is not UTF-8; rename it"
    if ".." in key and ".." in key.split("/"):
        return "unsupported", "has '..' in its key; rename it"
    stem, dot, suffix = key[key.rfind("/") + 1 :].rpartition(".")
    if stem and suffix and (dot + suffix).lower() not in SUFFIXES:
        return "not_an_image", f"has the suffix {(dot + suffix).lower()}, which no image that is read has"
    return None


def _read_table(catalogue: Catalogue, uri: str, kind: str) -> None:
    """Raises ValueError if the file is missing or is no such table."""
    path = str(Path(catalogue.folder, "labels"))
    try:
        storage.download_file(uri, path)
    except FileNotFoundError:
        raise ValueError(
            f"--labels {uri}: no such file; give dirname, none, or a CSV or Parquet file with the columns "
            "path and label"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"--labels {uri} is a folder; give a CSV or Parquet file") from None
    for rows in _in_batches(_parquet_rows(path, uri) if kind == "parquet" else _csv_rows(path, uri)):
        labelled = (
            (_stripped(path).removeprefix("./"), _stripped(label) or NO_LABEL) for path, label in rows
        )
        catalogue.insert("labels", dict(zip(LABELS_SCHEMA.names, zip(*labelled, strict=True), strict=True)))
    _refuse_two_labels(catalogue, uri)


def _csv_rows(path: str, uri: str) -> Iterator[tuple[Any, Any]]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            _check_columns(uri, reader.fieldnames or [])
            for row in reader:
                yield row["path"], row["label"]
        except csv.Error as error:
            raise ValueError(f"--labels {uri} is no CSV file: line {reader.line_num}: {error}") from None
        except UnicodeDecodeError:
            raise ValueError(f"--labels {uri} is no CSV file in UTF-8") from None


def _parquet_rows(path: str, uri: str) -> Iterator[tuple[Any, Any]]:
    try:
        with contextlib.closing(pq.ParquetFile(path)) as file:
            _check_columns(uri, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["path", "label"]):
                columns = (batch.column(name).cast(pa.string()).to_pylist() for name in ("path", "label"))
                yield from zip(*columns, strict=True)
    except pa.ArrowException as error:
        what = str(error).splitlines()[0]
        raise ValueError(f"--labels {uri} is no Parquet file with texts in path and label: {what}") from None


def _check_columns(uri: str, columns: Iterable[str]) -> None:
    if not {"path", "label"} <= set(columns):
        raise ValueError(
            f"--labels {uri} has the columns {', '.join(columns) or '(none)'}; it needs path and label"
        )


def _stripped(text: str | None) -> str:
    return (text or "").strip()


def _refuse_two_labels(catalogue: Catalogue, uri: str) -> None:
    several = catalogue.rows(
        "SELECT source, min(label), max(label) FROM labels SEMI JOIN "
        "(SELECT source FROM labels GROUP BY source HAVING count(*) > 1) USING (source) "
        "GROUP BY source HAVING min(label) != max(label) ORDER BY source LIMIT 1"
    )
    if several:
        path, one, other = several[0]
        raise ValueError(f"--labels {uri}: {path} has two labels, {one} and {other}; keep one")


def _in_batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
