"""What `nst stylize` has to do: which source in which style to which output, and what is left out, why."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from infra import places, storage
from infra.storage import ObjectInfo
from nst.images import SUFFIXES

# The last ones turn the direction of writing, so that a name reads like another.
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\u2028-\u202e\u2066-\u2069]|^[A-Za-z]:(?:/|$)")
PAIRINGS = ("each", "cycle", "random")


@dataclass(frozen=True, kw_only=True)
class Look:
    """One style, or a mix of several. `styles` and `weights` have one entry a style picture; `digest` covers
    their bytes and the weights."""

    name: str
    styles: tuple[int, ...]
    weights: tuple[float, ...]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One source in one look. `output` is relative to OUT."""

    source: ObjectInfo
    look: Look
    output: str


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A source that is not attempted. `is_failure`: somebody should look at it; else it is no picture."""

    source: ObjectInfo
    reason: str
    detail: str
    is_failure: bool


Entry = Item | LeftOut


class EntryText:
    """Entries as lines of text, to keep them on disk. A look is written as its name."""

    def __init__(self, looks: Iterable[Look]) -> None:
        self._looks = {look.name: look for look in looks}

    def write(self, entry: Entry) -> str:
        source = [entry.source.uri, entry.source.key, entry.source.num_bytes, entry.source.etag]
        if isinstance(entry, Item):
            return json.dumps([*source, entry.look.name, entry.output])
        return json.dumps([*source, entry.reason, entry.detail, entry.is_failure])

    def read(self, text: str) -> Entry:
        uri, key, num_bytes, etag, *more = json.loads(text)
        source = ObjectInfo(uri=uri, key=key, num_bytes=num_bytes, etag=etag)
        if len(more) == 2:
            return Item(source=source, look=self._looks[more[0]], output=more[1])
        reason, detail, is_failure = more
        return LeftOut(source=source, reason=reason, detail=detail, is_failure=is_failure)


def single_looks(names: list[str], digests: list[str]) -> list[Look]:
    """One look a style picture. Names are made distinct and fit to be a folder's."""
    taken: set[str] = set()
    looks = []
    for index, (name, digest) in enumerate(zip(names, digests, strict=True)):
        plain = re.sub(r"[^\w. -]", "_", name).lstrip("._ ").strip() or "style"
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        distinct = next(name for name in itertools.chain([plain], numbered) if name not in taken)
        taken.add(distinct)
        looks.append(Look(name=distinct, styles=(index,), weights=(1.0,), digest=digest))
    return looks


def mixed_look(looks: list[Look], weights: tuple[float, ...]) -> Look:
    """The mix of single looks. Weights are those given; the stylizer makes them sum to 1."""
    digest = hashlib.sha256(
        repr([(look.digest, weight) for look, weight in zip(looks, weights, strict=True)]).encode()
    )
    name = " + ".join(f"{weight:g} {look.name}" for look, weight in zip(looks, weights, strict=True))
    return Look(name=name, styles=tuple(range(len(looks))), weights=weights, digest=digest.hexdigest())


def plan(sources: Iterable[ObjectInfo], looks: list[Look], *, pairing: str, format: str) -> Iterator[Entry]:
    """Every source's items, in the order of the listing, lazily.

    An output has its source's path with the suffix of `format`, below a folder named after the style where
    each source is paired with each of several. Of sources that would share an output (a.jpg, a.png) the first
    in the listing gets it; the others keep their own suffix in front (a.png.jpg).

    Args:
        sources: in plain string order of their keys.
        pairing: each; cycle (the looks in turn); random (by a hash of the key: a source keeps its look
            whatever else is listed).
    """
    assert pairing in PAIRINGS, pairing
    open_stems: set[str] = set()
    num_pictures = 0
    for source in sources:
        if (left_out := _left_out(source)) is not None:
            yield left_out
            continue
        if pairing == "each":
            chosen = looks
        elif pairing == "cycle":
            chosen = [looks[num_pictures % len(looks)]]
        else:
            chosen = [random.Random(source.key).choice(looks)]
        num_pictures += 1
        # Whoever shares a stem begins with it, and in this order what begins alike is together. A whole key
        # is nobody else's: whose stem it might be comes later.
        open_stems = {stem for stem in open_stems if source.key.startswith(stem)}
        stem = _stem(source.key)
        if stem in open_stems:
            stem = source.key
        open_stems.add(stem)
        for look in chosen:
            folder = f"{look.name}/" if len(chosen) > 1 else ""
            yield Item(source=source, look=look, output=f"{folder}{stem}.{format}")


def _stem(key: str) -> str:
    path = PurePosixPath(key)
    return key[: -len(path.suffix)] if path.suffix.lower() in SUFFIXES else key


def _left_out(source: ObjectInfo) -> LeftOut | None:
    key = source.key
    if source.is_unsafe:
        detail = "a link that leads out of SOURCE, to a folder or to nothing, or no file"
        return LeftOut(source=source, reason="unsafe_link", detail=detail, is_failure=True)
    try:
        key.encode()
    except UnicodeEncodeError:
        return LeftOut(
            source=source, reason="unsafe_key", detail="its name is not UTF-8; rename it", is_failure=True
        )
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or UNSAFE.search(key):
        detail = "its key would lead out of OUT, or be no path ('..', '//', '\\', 'C:', invisible characters)"
        return LeftOut(source=source, reason="unsafe_key", detail=f"{detail}; rename it", is_failure=True)
    if parts[0] == "_nst":
        detail = "_nst/ is where results about results lie"
        return LeftOut(source=source, reason="unsafe_key", detail=f"{detail}; rename it", is_failure=True)
    if any(part.startswith(".") for part in parts):
        detail = "its name, or a folder's, begins with a dot"
        return LeftOut(source=source, reason="hidden", detail=detail, is_failure=False)
    suffix = PurePosixPath(key).suffix.lower()
    if suffix and suffix not in SUFFIXES:
        return LeftOut(
            source=source, reason="not_an_image", detail=f"no picture has {suffix}", is_failure=False
        )
    return None


def list_sources(source_uri: str, out_uri: str) -> Iterator[ObjectInfo]:
    """What lies under SOURCE, without OUT where that lies in it, and without results of earlier runs.

    Raises ValueError if OUT is SOURCE, or a place that it lies in: outputs could replace sources.
    """
    source, out = _absolute(source_uri), _absolute(out_uri)
    if source == out or source.startswith(out + "/"):
        raise ValueError(
            f"OUT {out_uri} holds SOURCE {source_uri}; outputs could replace sources: choose another OUT"
        )
    out_key = out.removeprefix(source + "/") if out.startswith(source + "/") else None
    for found in storage.list_objects(source_uri, include_hidden=True, include_unsafe=True):
        is_result = found.key.startswith("_nst/") or (
            out_key is not None and found.key.startswith(out_key + "/")
        )
        if not is_result:
            yield found


def _absolute(uri: str) -> str:
    if places.is_remote(uri):
        return uri.rstrip("/")
    return os.path.realpath(places.local_path(uri)).rstrip("/")
