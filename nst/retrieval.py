"""Is the artist recognised? An encoder trained apart looks stylized pictures up among works that it was not
trained on: the measure of the paper's claim that a model picks up an artist's manner.

It shares no weights with the model that is measured, which could otherwise please it without looking right:
it is trained here, from random weights. Views of one painting belong on one side of the split.

seen, held_out = split_works(corpus.labels)
encoder = train_artist_encoder(corpus.decode, corpus.labels, seen)
gallery = embed_works(encoder, corpus.decode, held_out)
score = retrieval_accuracy(encoder.embed(stylized), artists, gallery, corpus.labels[held_out])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop

from nst.config import BatchConfig
from nst.crops import random_crop
from nst.images import Pixels, to_float
from nst.losses import matrix_loss
from nst.metrics import check_pictures
from nst.networks.blocks import RunningStandardisation
from nst.networks.wavelet_encoder import WaveletEncoder, tap_statistics
from nst.sampling import DynamicBatchSampler, mix_bits

Rows = np.ndarray
Labels = Tensor | Sequence[int] | np.ndarray
Decode = Callable[[int], Pixels]
CHUNK = 16  # pictures in one pass


class ArtistEncoder(nn.Module):
    """A wavelet encoder and a head of its own, which no model has.

    Args:
        size: px, the side at which pictures are looked at; a multiple of 16.
        width: channels of the wavelet encoder's first tap.
        embedding_dim: length of the unit vectors.
    """

    def __init__(self, size: int = 128, width: int = 16, embedding_dim: int = 64) -> None:
        super().__init__()
        self.size = size
        self.trunk = WaveletEncoder(width)
        num_statistics = 2 * sum(self.trunk.tap_channels)
        self.standardise = RunningStandardisation(num_statistics)
        layers = nn.Linear(num_statistics, 256), nn.LeakyReLU(0.2), nn.Linear(256, embedding_dim)
        self.head = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, size, size] in [-1, 1] -> [N, D] unit vectors."""
        statistics = tap_statistics(self.trunk(images))
        if self.training:
            self.standardise.update(statistics)
        return F.normalize(self.head(self.standardise(statistics)), dim=1)

    @torch.inference_mode()
    def embed(self, pictures: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1], 32 px or more a side (or ValueError) -> [N, D] unit vectors of their middle
        squares, on the CPU."""
        squares = center_crop(check_pictures(pictures), [min(pictures.shape[2:])])
        squares = F.interpolate(squares, (self.size, self.size), mode="bilinear", antialias=True)
        device = next(self.parameters()).device
        return torch.cat([self((2 * part - 1).to(device)).cpu() for part in squares.split(CHUNK)])


def split_works(labels: Labels, held_out: float = 0.25, seed: int = 0) -> tuple[Rows, Rows]:
    """Rows to train on and rows to keep apart, both ascending. Of each artist with 2 works or more at least
    one goes to either side; a single work is trained on."""
    labels, generator = np.asarray(labels), np.random.default_rng(seed)
    kept = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        works = generator.permutation(np.flatnonzero(labels == label))
        kept[works[: min(max(1, round(held_out * len(works))), len(works) - 1)]] = True
    return np.flatnonzero(~kept), np.flatnonzero(kept)


def train_artist_encoder(
    decode: Decode,
    labels: Labels,
    rows: Rows | None = None,
    *,
    size: int = 128,
    width: int = 16,
    embedding_dim: int = 64,
    num_classes: int = 8,
    works_per_class: int = 2,
    num_steps: int = 1500,
    learning_rate: float = 1e-3,
    temperature: float = 0.2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> ArtistEncoder:
    """An encoder that tells artists apart, by the matrix loss on batches of P artists x K works. The same
    arguments give the same encoder on the same machine; the process's random state is left alone.

    Args:
        decode: row -> uint8 [H, W, 3]; of a corpus `corpus.decode`, of a list its `__getitem__`.
        labels: int [n], the artist of each work.
        rows: int, the works to train on; None: all.
        num_classes, works_per_class: P, taken down to the number of artists, and K.
        on_step: called after each step; a minute can be long without.

    Raises:
        ValueError: fewer than 2 artists.
    """
    labels = np.asarray(labels)
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    if len(np.unique(labels[rows])) < 2:
        raise ValueError("there is only one artist to train on, or none; give works of 2 artists or more")
    batch = BatchConfig(num_classes=num_classes, works_per_class=works_per_class, size=size)
    sampler = DynamicBatchSampler(labels[rows], 1, batch, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = ArtistEncoder(size, width, embedding_dim).to(device).train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for step in range(num_steps):
        plan = sampler.plan(step)
        keys = [mix_bits(seed, step, place) for place in range(len(plan.style))]
        works = [decode(int(rows[row])) for row in plan.style]
        crops = [random_crop(work, batch, key) for work, key in zip(works, keys, strict=True)]
        z, artists = encoder(torch.stack(crops).to(device)), torch.from_numpy(plan.labels).to(device)
        place = torch.arange(len(z), device=z.device)
        following = place - place % works_per_class + (place + 1) % works_per_class  # of the same artist
        loss = matrix_loss(z, z, following, temperature, mask=artists[:, None] == artists[None, :])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    return encoder.eval().requires_grad_(False)


def embed_works(encoder: ArtistEncoder, decode: Decode, rows: Rows) -> Tensor:
    """[len(rows), D] unit vectors of works of any sizes, 32 px or more a side."""
    works = (to_float(decode(int(row)))[None] for row in rows)
    return torch.cat([encoder.embed((work + 1) / 2) for work in works])


@dataclass(frozen=True)
class Retrieval:
    """What came of Q queries.

    Attributes:
        hits: [Q] 1 where the nearest work is by the right artist, else 0.
        average_precisions: [Q] in (0, 1]: the precision down to each work by the artist, averaged.
    """

    hits: Tensor
    average_precisions: Tensor

    @property
    def top1(self) -> float:
        return float(self.hits.mean())

    @property
    def mean_average_precision(self) -> float:
        return float(self.average_precisions.mean())


def retrieval_accuracy(
    queries: Tensor,
    query_labels: Labels,
    gallery: Tensor,
    gallery_labels: Labels,
    exclude: Labels | None = None,
) -> Retrieval:
    """Looks each query up among the gallery's works, nearest by cosine first.

    Args:
        queries: [Q, D] unit vectors, with the artist that each should show; gallery: [G, D], likewise.
        exclude: [Q] int, the gallery's row that is no answer to a query, or -1: a picture's own reference,
            which it should not be a copy of; or the query itself, to see how well works are told apart.

    Raises:
        ValueError: no queries, numbers that do not fit, or an artist without a work in the gallery.
    """
    wanted, known = torch.as_tensor(query_labels), torch.as_tensor(gallery_labels)
    if not len(queries) or len(queries) != len(wanted) or len(gallery) != len(known):
        raise ValueError(
            f"{len(queries)} queries have {len(wanted)} labels, {len(gallery)} works {len(known)}; "
            "give one label each, and a query or more"
        )
    similarity = queries.double() @ gallery.double().T
    relevant = wanted[:, None] == known[None, :]
    if exclude is not None:
        left_out = torch.as_tensor(exclude)[:, None] == torch.arange(len(gallery))
        similarity, relevant = similarity.masked_fill(left_out, -2.0), relevant & ~left_out
    if not bool(relevant.any(dim=1).all()):
        row = int(torch.nonzero(~relevant.any(dim=1))[0])
        raise ValueError(f"query {row} is of artist {int(wanted[row])}, who has no other work in the gallery")
    order = similarity.argsort(dim=1, descending=True, stable=True)
    ranked = relevant.gather(1, order).double()
    precision = ranked.cumsum(dim=1) / torch.arange(1, len(gallery) + 1)
    return Retrieval(ranked[:, 0], (precision * ranked).sum(dim=1) / ranked.sum(dim=1))
