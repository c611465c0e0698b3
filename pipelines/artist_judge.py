"""Is the artist recognised? The measure `artist_top1`, by an encoder that is trained for the occasion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nst.corpus import Corpus
from nst.images import ImageError
from nst.near_duplicates import MAX_DISTANCE, near_hash
from nst.planning import NO_LABEL
from nst.retrieval import (
    ArtistEncoder,
    embed_works,
    retrieval_accuracy,
    split_works,
    train_artist_encoder,
)
from pipelines.console import Progress, say
from pipelines.evaluation_set import EvaluationSet, Reference, open_corpus

NUM_STEPS = 1500
NUM_NAMED = 5  # labels in a message


@dataclass(frozen=True, kw_only=True)
class ArtistJudge:
    """Looks stylized pictures up among works of known artists.

    Attributes:
        artists: of each pair of the evaluation set, as the gallery's labels; -1: none of its artists.
        accuracy: share of the gallery's own works whose nearest other work is by the same artist: what the
            judge can tell apart at all. NaN where no artist has two works there.
    """

    encoder: ArtistEncoder
    gallery: Tensor
    gallery_labels: NDArray[np.int64]
    artists: NDArray[np.int64]
    accuracy: float

    @property
    def rows(self) -> list[int]:
        """The pairs whose artist is known."""
        return np.flatnonzero(self.artists >= 0).tolist()

    def hits(self, stylized: Tensor, rows: Sequence[int]) -> list[float]:
        """1 where the nearest work is by the artist of the pair's style picture, else 0; of those of the
        pairs `rows` whose artist is known.

        Args:
            stylized: [len(rows), 3, H, W] in [0, 1].
        """
        wanted = self.artists[np.asarray(rows)]
        known = wanted >= 0
        if not known.any():
            return []
        queries = self.encoder.embed(stylized[torch.from_numpy(known)])
        return retrieval_accuracy(queries, wanted[known], self.gallery, self.gallery_labels).hits.tolist()


def judge_identity(artists_uri: str) -> dict[str, str | int | None]:
    """What a judge's figures depend on, apart from the evaluation set: its works and how it is trained."""
    recipe = {
        name: value
        for name, value in (train_artist_encoder.__kwdefaults__ or {}).items()
        if name != "on_step"
    }
    text = json.dumps({**recipe, "num_steps": NUM_STEPS}, sort_keys=True, default=str)
    return {
        "artists_digest": open_corpus(artists_uri).manifest.digest,
        "artists_training": hashlib.sha256(text.encode()).hexdigest(),
    }


def train_judge(artists_uri: str, chosen: EvaluationSet, *, num_steps: int = NUM_STEPS) -> ArtistJudge:
    """A judge for the pairs of `chosen`, trained on labelled works: 0.14 CPU seconds a step.

    The style pictures of the set are left out of the works, whether they are there byte for byte or resized
    or compressed again (but for those too flat to be recognised): a picture must be like the artist, not like
    its reference. Three quarters of each artist's works are trained on, the others are looked up in.

    Raises:
        ValueError: no corpus; its labels and those of the style pictures have too little in common.
    """
    corpus = open_corpus(artists_uri)
    works = _other_works(corpus, chosen.style_references)
    labels = corpus.labels[works].astype(np.int64)
    seen, kept = split_works(labels)
    gallery_labels = labels[kept]
    known = {corpus.label_names[label]: int(label) for label in np.unique(gallery_labels)}
    wanted = [reference.label for reference in chosen.style_references]
    artists = np.array([known.get(label, -1) for label in wanted])
    if not (artists >= 0).any():
        raise ValueError(
            f"--artists {artists_uri} has no two works by an artist of the style pictures: these are by "
            f"{_named(wanted)}, and it has two works or more by {_named(known)}; use the same labels"
        )
    with Progress("artists", total=num_steps, unit="step") as progress:
        encoder = train_artist_encoder(
            corpus.decode, corpus.labels, works[seen], num_steps=num_steps, on_step=progress.advance
        )
    gallery = embed_works(encoder, corpus.decode, works[kept])
    judge = ArtistJudge(
        encoder=encoder,
        gallery=gallery,
        gallery_labels=gallery_labels,
        artists=artists,
        accuracy=_accuracy(gallery, gallery_labels),
    )
    say(
        f"artists   {len(known)} of {len(works):,} works ({len(corpus) - len(works)} left out); top-1 of "
        f"real works {judge.accuracy:.2f}; {len(judge.rows)} of {len(chosen)} pairs have a known artist"
    )
    return judge


def _other_works(corpus: Corpus, references: Sequence[Reference]) -> NDArray[np.int64]:
    """The rows of labelled works that are none of the references."""
    digests = {reference.sha256 for reference in references}
    hashes = {reference.near_hash for reference in references if reference.near_hash is not None}
    kept = []
    with Progress("compare works", total=len(corpus)) as progress:
        for row, label in enumerate(corpus.labels):
            data = corpus.read(row)
            if corpus.label_names[label] != NO_LABEL and hashlib.sha256(data).hexdigest() not in digests:
                found = _hash_of(data)
                if found is None or all((found ^ other).bit_count() > MAX_DISTANCE for other in hashes):
                    kept.append(row)
            progress.advance()
    return np.array(kept, dtype=np.int64)


def _hash_of(data: bytes) -> int | None:
    try:
        return near_hash(data)
    except ImageError as error:
        raise OSError(f"a work of --artists cannot be read ({error})") from error


def _accuracy(gallery: Tensor, labels: NDArray[np.int64]) -> float:
    """Top-1 of the gallery's works among the others; of artists with one work there nothing can be asked."""
    names, counts = np.unique(labels, return_counts=True)
    rows = np.flatnonzero(np.isin(labels, names[counts > 1]))
    if not len(rows):
        return float("nan")
    return retrieval_accuracy(gallery[rows], labels[rows], gallery, labels, exclude=rows).top1


def _named(labels: Sequence[str] | dict[str, int]) -> str:
    distinct = sorted(set(labels))
    shown = ", ".join(repr(label) for label in distinct[:NUM_NAMED]) or "none"
    return shown + (f" and {len(distinct) - NUM_NAMED} more" if len(distinct) > NUM_NAMED else "")
