"""What `nst stylize` has to do: which source in which style to which output, and what is left out, why."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from infra import places, storage
from infra.storage import ObjectInfo
from nst.images import SUFFIXES
from pipelines.ledger import DONE, FAILED, Known, fingerprint, identity

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


def single_looks(names: list[str], digests: list[str]) -> list[Look]:
    """One look a style picture. Names are made distinct and fit to be a folder's."""
    taken: set[str] = set()
    looks = []
    for index, (name, digest) in enumerate(zip(names, digests, strict=True)):
        plain = re.sub(r"[^\w. -]", "_", name).lstrip("._ ").strip() or "style"
        distinct = _first_free(plain, (f"{plain}-{number}" for number in itertools.count(2)), taken)
        looks.append(Look(name=distinct, styles=(index,), weights=(1.0,), digest=digest))
    return looks


def mixed_look(looks: list[Look], weights: tuple[float, ...]) -> Look:
    """The mix of single looks. Weights are those given; the stylizer makes them sum to 1."""
    digest = hashlib.sha256(
        repr([(look.digest, weight) for look, weight in zip(looks, weights, strict=True)]).encode()
    )
    name = " + ".join(f"{weight:g} {look.name}" for look, weight in zip(looks, weights, strict=True))
    return Look(name=name, styles=tuple(range(len(looks))), weights=weights, digest=digest.hexdigest())


def plan(
    sources: Iterable[ObjectInfo], looks: list[Look], *, pairing: str, format: str
) -> Iterator[Item | LeftOut]:
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
    taken: set[str] = set()
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
        stem = _first_free(_stem(source.key), _longer_stems(source.key), taken)
        for look in chosen:
            folder = f"{look.name}/" if len(chosen) > 1 else ""
            yield Item(source=source, look=look, output=f"{folder}{stem}.{format}")


def _stem(key: str) -> str:
    path = PurePosixPath(key)
    return key[: -len(path.suffix)] if path.suffix.lower() in SUFFIXES else key


def _longer_stems(key: str) -> Iterator[str]:
    yield key
    for number in itertools.count(2):
        yield f"{key}-{number}"


def _first_free(wanted: str, others: Iterator[str], taken: set[str]) -> str:
    chosen = wanted
    while chosen in taken:
        chosen = next(others)
    taken.add(chosen)
    return chosen


def _left_out(source: ObjectInfo) -> LeftOut | None:
    key = source.key
    try:
        key.encode()
    except UnicodeEncodeError:
        return LeftOut(
            source=source, reason="unsafe_key", detail="its name is not UTF-8; rename it", is_failure=True
        )
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\x00-\x1f\\]", key):
        detail = "its key would lead out of OUT or cannot be a path ('..', '//', '\\', control characters)"
        return LeftOut(source=source, reason="unsafe_key", detail=f"{detail}; rename it", is_failure=True)
    if parts[0] == "_nst":
        detail = "_nst/ is where results about results lie"
        return LeftOut(source=source, reason="unsafe_key", detail=f"{detail}; rename it", is_failure=True)
    suffix = PurePosixPath(key).suffix.lower()
    if suffix and suffix not in SUFFIXES:
        return LeftOut(
            source=source, reason="not_an_image", detail=f"no picture has {suffix}", is_failure=False
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Past:
    """What earlier runs left: the ledger's rows, and the outputs that are there with their sizes."""

    known: dict[str, Known]
    outputs: dict[str, int]
    model_digest: str
    settings_digest: str

    @classmethod
    def read(cls, out_uri: str, known: dict[str, Known], model_digest: str, settings_digest: str) -> Past:
        outputs = {found.key: found.num_bytes for found in storage.list_objects(out_uri)} if known else {}
        return cls(known=known, outputs=outputs, model_digest=model_digest, settings_digest=settings_digest)

    def verdict(self, item: Item) -> str:
        """new, changed (also an output that is missing or has another size), done, or failed before."""
        known = self.known.get(identity(item.source.key, item.output))
        if known is None:
            return "new"
        now = fingerprint(item.source.etag, item.look.digest, self.model_digest, self.settings_digest)
        if known.fingerprint != now:
            return "changed"
        if known.status == FAILED:
            return FAILED
        return DONE if self.outputs.get(item.output) == known.output_num_bytes else "changed"

    def has_seen(self, left_out: LeftOut) -> bool:
        known = self.known.get(identity(left_out.source.key, ""))
        return known is not None and known.fingerprint == fingerprint(left_out.source.etag, "", "", "")


def still_to_do(
    planned: Iterable[Item | LeftOut], past: Past, *, only_failed: bool, counts: Counter[str]
) -> Iterator[Item | LeftOut]:
    """What is missing or changed, or, `only_failed`, what failed. `counts` is told of the rest: done_before,
    failed_before, left_for_later, and of all that is ignored."""
    for entry in planned:
        if isinstance(entry, LeftOut):
            has_seen = past.has_seen(entry)
            if not entry.is_failure:
                counts["ignored"] += 1
            elif has_seen:
                counts["failed_before"] += 1
            if not has_seen:
                yield entry
            continue
        verdict = past.verdict(entry)
        if only_failed:
            known = past.known.get(identity(entry.source.key, entry.output))
            if known is not None and known.status == FAILED:
                yield entry
            else:
                counts["done_before" if verdict == DONE else "left_for_later"] += 1
        elif verdict in ("new", "changed"):
            yield entry
        else:
            counts["done_before" if verdict == DONE else "failed_before"] += 1


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
    for found in storage.list_objects(source_uri):
        if out_key is None or not found.key.startswith(out_key + "/"):
            yield found


def _absolute(uri: str) -> str:
    if places.is_remote(uri):
        return uri.rstrip("/")
    return os.path.realpath(places.local_path(uri)).rstrip("/")
