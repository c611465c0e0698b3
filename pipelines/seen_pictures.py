"""Which pictures of an evaluation set a version was trained on: figures of those say nothing about others.

Each picture of the set is held against each sample of the corpora of the training, by the corpora's indexes:
the bytes of the file, and its looks. So the sources of a corpus are found, a part of them, or the same
pictures in other shards; resized or compressed again too (but for those too flat to be recognised).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from infra import places, storage, training_runs
from infra.registry import RegisteredVersion
from nst.corpus import Corpus
from nst.images import ImageError
from nst.near_duplicates import MAX_DISTANCE, near_hash
from nst.planning import ROLES
from pipelines.evaluation_set import EvaluationSet, Reference, open_corpus
from pipelines.training_facts import corpora_facts

# Of 64 bits in which the difference hashes of two copies may differ: of copies that are resized, brighter or
# compressed again one in a hundred differs in more (JPEG quality 30: one in 25; pieces of sky: most).
# Different pictures are often that close: the nearest samples are looked at themselves, each read on its own.
MAX_BITS = 12
NUM_LOOKED_AT = 16
NUM_READ_AT_ONCE = 16


def unknown(why: str) -> dict[str, Any]:
    """What is kept where it cannot be told; `why` is for people."""
    return {"content": 0, "style": 0, "pictures": [], "unknown": why}


def seen_pictures(version: RegisteredVersion, chosen: EvaluationSet) -> dict[str, Any]:
    """What is kept with an evaluation of `version`: {"content", "style": how many pictures of the set are in
    the corpora that it was trained on, "pictures": which ones and where, "unknown": "" or why that cannot be
    told}."""
    run = training_runs.find_run(version.run_id) if version.run_id else None
    if run is None:
        return unknown(f"MLflow has nothing of the run that {version} came from")
    if not run.is_training:
        return unknown(f"{version} was registered from a checkpoint without its training run")
    missing = [role for role in ROLES if role not in {corpus.role for corpus in run.corpora}]
    if missing:
        return unknown(
            f"the run {run.run_id} that it came from names no corpus of {' and of '.join(missing)}"
        )
    for corpus in corpora_facts(run.corpora):
        if corpus.problem:
            return unknown(f"{corpus.uri}, which it was trained on, is not there as it was: {corpus.problem}")
    try:
        return _compared([open_corpus(uri) for uri in {corpus.uri for corpus in run.corpora}], chosen)
    except (OSError, ValueError) as error:
        return unknown(f"a corpus that it was trained on cannot be read: {error}")


def _compared(corpora: Sequence[Corpus], chosen: EvaluationSet) -> dict[str, Any]:
    found = unknown("")
    sides = (chosen.content_names, chosen.content_references), (chosen.style_names, chosen.style_references)
    for role, (names, references) in zip(ROLES, sides, strict=True):
        pictures = dict(zip(names, references, strict=True))
        seen: dict[str, str] = {}
        for corpus in corpora:
            left = {name: one for name, one in pictures.items() if name not in seen}
            rows = _find(corpus, list(left.values()))
            seen |= {
                name: _told(corpus, row) for name, row in zip(left, rows, strict=True) if row is not None
            }
        found[role] = len(seen)
        found["pictures"] += [f"the {role} {name} is {where}" for name, where in seen.items()]
    return found


def _find(corpus: Corpus, references: Sequence[Reference]) -> list[int | None]:
    """The row of a sample that is the same picture, for each of `references`."""
    wanted = {reference.sha256 for reference in references}
    same: dict[str, int] = {}
    alike: list[list[tuple[int, int]]] = [[] for _ in references]
    for first, sha256s, hashes in corpus.hashes():
        same |= {sha256: row for row, sha256 in enumerate(sha256s, start=first) if sha256 in wanted}
        for place, reference in enumerate(references):
            bits = np.bitwise_count(hashes ^ np.uint64(int(reference.phash, 16)))
            near = np.flatnonzero(bits <= MAX_BITS)
            both = alike[place] + [(int(bits[row]), first + int(row)) for row in near]
            alike[place] = heapq.nsmallest(NUM_LOOKED_AT, both)

    def find(reference: Reference, nearest: list[tuple[int, int]]) -> int | None:
        if reference.sha256 in same or reference.near_hash is None:
            return same.get(reference.sha256)
        return next((row for _, row in nearest if _is_same(corpus, row, reference.near_hash)), None)

    with ThreadPoolExecutor(NUM_READ_AT_ONCE) as pool:
        return list(pool.map(find, references, alike))


def _is_same(corpus: Corpus, row: int, wanted: int) -> bool:
    shard, offset, size = corpus.place(row)
    try:
        bits = near_hash(storage.read_part(places.join(corpus.uri, shard.tar), offset, size))
    except ImageError:
        return False
    return bits is not None and (bits ^ wanted).bit_count() <= MAX_DISTANCE


def _told(corpus: Corpus, row: int) -> str:
    return f"{corpus.sample(row).source!r} of {corpus.uri}"
