"""The artist encoder that all runs are judged by: trained once, apart, on the works that they are trained on,
with a seed of its own. What it is asked about, held-out works and pictures in their styles, it has not seen
either."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablation.corpora import Corpora
from benchmarks.ablation.pairs import UNSEEN_WORKS, Evaluation, Pixels, Works
from nst import retrieval
from nst.planning import digest_of
from nst.retrieval import ArtistEncoder, Retrieval, retrieval_accuracy, train_artist_encoder

SEED = 1000
NUM_STEPS = 1500
WEIGHTS_FILE, RECORD_FILE = "encoder.safetensors", "encoder.json"


@dataclass(frozen=True)
class Judge:
    """Looks pictures up among all works, those of unseen artists too; the very work that a picture has its
    style from is left out.

    Attributes:
        encoder: the artist encoder.
        gallery: the works that it looks among.
        digest: of its weights.
    """

    encoder: ArtistEncoder
    gallery: Works
    digest: str

    @cached_property
    def _embedded(self) -> Tensor:
        return self._embed(self.gallery.pictures)

    def _embed(self, pictures: Pixels) -> Tensor:
        return self.encoder.embed(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)

    def look_up(self, pictures: Pixels, styles: Works) -> Retrieval:
        """Is the artist of each style found in its picture [N, S, S, 3]?"""
        numbers = {label: number for number, label in enumerate(sorted(set(self.gallery.labels)))}
        places = {work_id: row for row, work_id in enumerate(self.gallery.work_ids)}
        return retrieval_accuracy(
            self._embed(pictures),
            [numbers[label] for label in styles.labels],
            self._embedded,
            [numbers[label] for label in self.gallery.labels],
            exclude=[places.get(work_id, -1) for work_id in styles.work_ids],
        )

    def accuracy(self, evaluation: Evaluation) -> Mapping[str, float]:
        """Share of pictures in which it finds the artist: real works are the ceiling of what a model can
        reach, contents left as they are (for their pairs' styles) the floor."""
        pairs = evaluation.groups[UNSEEN_WORKS]
        asked = {
            "works it was trained on": (evaluation.works.pictures, evaluation.works),
            "unseen works": (evaluation.unseen_works.pictures, evaluation.unseen_works),
            "works of unseen artists": (evaluation.unseen_artists.pictures, evaluation.unseen_artists),
            "unchanged contents": (pairs.contents, pairs.styles),
        }
        return {name: self.look_up(pictures, works).top1 for name, (pictures, works) in asked.items()}


def train_judge(
    corpora: Corpora, evaluation: Evaluation, folder: Path, *, num_steps: int = NUM_STEPS
) -> Judge:
    """Trains the encoder, or takes the one in `folder` if it was trained alike. Minutes on one thread."""
    corpus = corpora.open("works")
    source = inspect.getsource(retrieval)  # another encoder is another judge
    key = digest_of({"corpus": corpus.manifest.digest, "seed": SEED, "steps": num_steps, "source": source})
    weights, record = folder / WEIGHTS_FILE, folder / RECORD_FILE
    if record.exists() and json.loads(record.read_text())["key"] == key:
        encoder = ArtistEncoder()
        encoder.load_state_dict(load_file(weights))
        encoder.eval().requires_grad_(False)
    else:
        encoder = train_artist_encoder(
            corpus.decode, np.asarray(corpus.labels), seed=SEED, num_steps=num_steps
        )
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, weights)
        record.write_text(json.dumps({"key": key}) + "\n")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return Judge(encoder, evaluation.all_works, digest)
