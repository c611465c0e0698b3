"""Corpora + sampling -> batches. Decoding and cropping happen in loader workers; every random choice follows
from (seed, step, place in the global batch), so their number changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nst.batch import Batch
from nst.config import BatchConfig
from nst.corpus import Corpus
from nst.images import to_float
from nst.sampling import BatchPlan, DynamicBatchSampler, mix_bits

PREFETCH = 2  # batches that each loader worker prepares ahead, where plans allow it


def random_crop(image: np.ndarray, config: BatchConfig, key: int, size: int | None = None) -> Tensor:
    """A random square of the image, mirrored half of the time.

    Args:
        image: uint8 [H, W, 3].
        key: decides the crop.
        size: side of the result; None: the batch's.

    Returns:
        [3, size, size] in [-1, 1].
    """
    size = size or config.size
    draw = np.random.Generator(np.random.Philox(key=key)).random(4)
    height, width = image.shape[:2]
    short = min(height, width)
    # never enlarge more than the image demands
    smallest = min(short, max(config.min_scale * short, size))
    side = round(smallest + float(draw[0]) * (short - smallest))
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    crop = to_float(image[top : top + side, left : left + side])
    if side != size:
        crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
    return crop.flip(2) if draw[3] < 0.5 else crop


class _Batches(Dataset[Batch]):
    def __init__(self, content: Corpus, style: Corpus, config: BatchConfig, seed: int, rank: int) -> None:
        self._content, self._style, self._config = content, style, config
        self._seed, self._rank = seed, rank

    def __getitem__(self, plan: BatchPlan) -> Batch:
        return Batch(
            content=self._images(self._content, plan.content, plan, 1),
            style=self._images(self._style, plan.style, plan, 2),
            labels=torch.from_numpy(plan.labels),
            works_per_class=self._config.works_per_class,
            step=plan.step,
        )

    def _images(self, corpus: Corpus, rows: np.ndarray, plan: BatchPlan, domain: int) -> Tensor:
        first = self._rank * len(rows)
        keys = [mix_bits(self._seed, domain, plan.step, first + place) for place in range(len(rows))]
        return torch.stack(
            [
                random_crop(corpus.decode(int(row)), self._config, key, plan.size)
                for row, key in zip(rows, keys, strict=True)
            ]
        )


class _Plans(Sampler[BatchPlan]):
    def __init__(self, sampler: DynamicBatchSampler, step: int, rank: int, world_size: int) -> None:
        self._sampler, self._step, self._rank, self._world_size = sampler, step, rank, world_size

    def __iter__(self) -> Iterator[BatchPlan]:
        step = self._step
        while True:
            yield self._sampler.plan(step).part(self._rank, self._world_size)
            step += 1


def load_batches(
    content: Corpus,
    style: Corpus,
    sampler: DynamicBatchSampler,
    config: BatchConfig,
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's batches from `step` on, without end.

    Args:
        step: the first step; a resumed training gives the step it stopped at.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: more workers than steps that can be planned ahead.
    """
    prefetch = PREFETCH
    if sampler.horizon is not None:
        # Plans are made in this process, where the sampler also learns, but before their step is reached.
        if num_workers > sampler.horizon:
            raise ValueError(
                f"batch.adaptive plans {sampler.horizon} steps ahead, too few for {num_workers} loader "
                f"workers: use --loader-workers {sampler.horizon} at most"
            )
        prefetch = min(prefetch, sampler.horizon // max(num_workers, 1))
    loader = DataLoader(
        _Batches(content, style, config, seed, rank),
        sampler=_Plans(sampler, step, rank, world_size),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        # a forked child of a process with Ray's or gloo's threads may hang
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
