"""Tars that another program wrote, indexed as they are: WebDataset's ShardWriter, img2dataset, plain tar."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from nst.images import ImageError, difference_hash, open_image, over_white
from nst.planning import FORMAT_VERSION, NO_LABEL
from nst.shards import LIMITS, TAR_BLOCK, Failure, encode_index

# What a sample's image may be called behind the first dot of its name; the first that is there is taken.
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
# How WebDataset splits a member's name into key and ending.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAX_JSON_BYTES = 1 << 20
MAX_LABEL_BYTES = 1 << 10


class UnusableTar(Exception):
    """The whole tar cannot be adopted; the message says why."""


@dataclass(frozen=True, kw_only=True)
class AdoptedTar:
    """`index` are the bytes of the Parquet index; `shorter_sides` counts the samples by shorter side (px)."""

    index: bytes
    shorter_sides: dict[int, int]


def adopt_tar(path: str, name: str) -> AdoptedTar:
    """Indexes the samples of a tar without changing it. Every image is decoded once.

    A label is `label` of the sample's JSON, else the text of its .cls, else the name of the folder that the
    image is in, else "unlabelled". A sample without an image that can be taken is a failure, called NAME:KEY.

    Raises UnusableTar if the file is no tar, is compressed, cut or damaged.
    """
    num_bytes, sha256 = _checked_tar(path)
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    sides: dict[int, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            samples, doubles = _samples(tar)
            _check_end(path, tar.offset)
            for key, detail in doubles:
                failures.append(
                    Failure(source=f"{name}:{_utf8(key)}", reason="duplicate_name", detail=detail)
                )
            for key, members in samples.items():
                try:
                    rows.append(_index_row(tar, key, members))
                except ImageError as error:
                    source = f"{name}:{_utf8(key)}"
                    failures.append(Failure(source=source, reason=error.reason, detail=_utf8(error.detail)))
    except tarfile.TarError as error:
        raise UnusableTar(f"cannot be read as a tar: {error}") from error
    for row in rows:
        side = min(row["width"], row["height"])
        sides[side] = sides.get(side, 0) + 1
    metadata = {
        "format_version": FORMAT_VERSION,
        "plan": "",
        "tar": {"num_bytes": num_bytes, "sha256": sha256},
        "failures": [asdict(failure) for failure in failures],
    }
    return AdoptedTar(index=encode_index(rows, metadata), shorter_sides=sides)


def _checked_tar(path: str) -> tuple[int, str]:
    """(size in bytes, sha256). A tar ends with two empty blocks; one that was cut between two members does
    not, and would otherwise pass for a shorter one."""
    num_bytes = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        start = file.read(8)
        for magic, method in COMPRESSED.items():
            if start.startswith(magic):
                raise UnusableTar(
                    f"is compressed ({method}), so that no sample can be read alone; decompress it"
                )
        if num_bytes >= 2 * TAR_BLOCK:
            file.seek(-2 * TAR_BLOCK, os.SEEK_END)
        if num_bytes < 2 * TAR_BLOCK or any(file.read()):
            raise UnusableTar("is cut, or no tar: it does not end with two empty blocks")
        file.seek(0)
        return num_bytes, hashlib.file_digest(file, "sha256").hexdigest()


def _check_end(path: str, offset: int) -> None:
    """To tarfile, a damaged header is an end like any other, and so is the end of the first of two tars."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        while chunk := file.read(1 << 20):
            if chunk.strip(b"\0"):
                raise UnusableTar(
                    f"holds more behind byte {offset}, where its members end: it is damaged, or made of "
                    "several tars"
                )


def _samples(
    tar: tarfile.TarFile,
) -> tuple[dict[str, dict[str, tarfile.TarInfo]], list[tuple[str, str]]]:
    """(key -> ending -> member, in the order of the keys' first members; key and detail of each member whose
    name is taken)."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    doubles: list[tuple[str, str]] = []
    for member in tar:
        if not member.isdir() and (parts := MEMBER_NAME.fullmatch(member.name)):
            first = samples.setdefault(parts[1], {}).setdefault(parts[2].lower(), member)
            if first is not member:
                doubles.append((parts[1], f"{_utf8(member.name)} is there again; the first one is taken"))
    return samples, doubles


def _index_row(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    if key.startswith("/") or ".." in key.split("/"):
        raise ImageError("unsupported", "has an absolute name, or one with '..', that leads out of its tar")
    if _utf8(key) != key:
        raise ImageError("unsupported", "has a name that is not UTF-8")
    ending = next((ending for ending in IMAGE_ENDINGS if ending in members), None)
    if ending is None:
        found, wanted = ", ".join(sorted(members)), ", ".join(IMAGE_ENDINGS)
        raise ImageError("no_image", f"has {found} behind the first dot of its name, but none of {wanted}")
    member = members[ending]
    if not member.isreg() or member.issparse():
        raise ImageError("unsupported", f"{member.name} is a link, a sparse file or a device in its tar")
    if member.size > LIMITS.max_bytes:
        raise ImageError("too_many_bytes", f"{member.size:,} bytes; at most {LIMITS.max_bytes:,} are read")
    data = _read(tar, member)
    opened = open_image(data)
    image = over_white(opened.rgb, opened.alpha)
    description = _description(tar, members)
    return {
        "key": key,
        "label": _label(tar, key, members, description),
        "offset": member.offset_data,
        "size": member.size,
        "width": image.width,
        "height": image.height,
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": difference_hash(image),
        "source": next(
            (
                _utf8(description[name])
                for name in ("source", "url")
                if isinstance(description.get(name), str)
            ),
            key,
        ),
    }


def _description(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """The sample's JSON object; empty where there is none that can be read."""
    member = members.get("json")
    if member is None:
        return {}
    try:
        description = json.loads(_read(tar, member, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        return {}
    return description if isinstance(description, dict) else {}


def _label(
    tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], description: dict[str, Any]
) -> str:
    if isinstance(label := description.get("label"), (str, int)) and str(label).strip():
        return _utf8(str(label).strip())
    text = _read(tar, members["cls"], MAX_LABEL_BYTES).decode("utf-8", "replace") if "cls" in members else ""
    return text.strip() or PurePosixPath(key).parent.name or NO_LABEL


def _utf8(text: str) -> str:
    """Names in a tar, and texts in JSON, may hold what no Parquet file can: it is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int = -1) -> bytes:
    """The member's bytes, `most` of them; none for what is no regular file."""
    if not member.isreg():
        return b""
    with contextlib.closing(cast(IO[bytes], tar.extractfile(member))) as file:
        return file.read(most)
