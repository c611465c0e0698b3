"""Corpora + sampling -> batches. Decoding and cropping happen in loader workers; every random choice follows
from (seed, step, place in the global batch), so their number changes nothing."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nst.batch import Batch
from nst.config import BatchConfig
from nst.corpus import Corpus
from nst.decoding import Crops, decode_crops, load_crops
from nst.prefetch import ShardPrefetcher
from nst.resident import Places, ResidentPictures, choose_places
from nst.sampling import BatchPlan, DynamicBatchSampler, mix_bits

PREFETCH = 2  # batches that each loader worker prepares ahead, where plans allow it
STEPS_AHEAD = 128  # whose remote shards are fetched, where plans and the cache allow it


class _Loaded(NamedTuple):
    """A batch as a worker hands it over."""

    content: Crops | Places
    style: Crops | Places
    labels: Tensor
    step: int


class _Batches(Dataset[_Loaded]):
    """`sources`: content and style, the corpora themselves or the sizes of their resident pictures."""

    def __init__(
        self,
        sources: tuple[Corpus | NDArray[np.int64], Corpus | NDArray[np.int64]],
        config: BatchConfig,
        seed: int,
        rank: int,
        keep_encoded: bool,
    ) -> None:
        self._sources, self._config = sources, config
        self._seed, self._rank, self._keep_encoded = seed, rank, keep_encoded

    def __getitem__(self, plan: BatchPlan) -> _Loaded:
        return _Loaded(
            content=self._crops(0, plan.content, plan),
            style=self._crops(1, plan.style, plan),
            labels=torch.from_numpy(plan.labels),
            step=plan.step,
        )

    def _crops(self, domain: int, rows: np.ndarray, plan: BatchPlan) -> Crops | Places:
        first, source = self._rank * len(rows), self._sources[domain]
        keys = [mix_bits(self._seed, domain + 1, plan.step, first + place) for place in range(len(rows))]
        if isinstance(source, Corpus):
            return load_crops(source, rows, self._config, keys, plan.size, keep_encoded=self._keep_encoded)
        return choose_places(source, rows, self._config, keys, plan.size)


class _Plans(Sampler[BatchPlan]):
    """This rank's plans from a step on. Those of the next `num_ahead` steps are made already, and what they
    need of remote corpora is announced."""

    def __init__(
        self,
        sampler: DynamicBatchSampler,
        step: int,
        rank: int,
        world_size: int,
        corpora: tuple[Corpus, Corpus],
        prefetcher: ShardPrefetcher | None,
        num_ahead: int,
    ) -> None:
        self._sampler, self._step, self._rank, self._world_size = sampler, step, rank, world_size
        self._corpora, self._prefetcher, self._num_ahead = corpora, prefetcher, num_ahead

    def __iter__(self) -> Iterator[BatchPlan]:
        ahead: deque[BatchPlan] = deque()
        step = self._step
        while True:
            while len(ahead) <= self._num_ahead:
                plan = self._sampler.plan(step).part(self._rank, self._world_size)
                if self._prefetcher is not None:
                    self._prefetcher.want(step, self._remote_shards(plan))
                ahead.append(plan)
                step += 1
            yield ahead.popleft()

    def _remote_shards(self, plan: BatchPlan) -> Iterator[tuple[int, int]]:
        for place, (corpus, rows) in enumerate(zip(self._corpora, (plan.content, plan.style), strict=True)):
            if corpus.is_remote:
                yield from ((place, number) for number in np.unique(corpus.shards_of(rows)).tolist())


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
    device: torch.device | str = "cpu",
    decode_on_device: bool = False,
    resident: tuple[ResidentPictures, ResidentPictures] | None = None,
) -> Iterator[Batch]:
    """This rank's batches from `step` on, without end, on `device`. Shards of remote corpora are fetched
    ahead for as long as somebody holds the iterator.

    Args:
        step: the first step; a resumed training gives the step it stopped at.
        num_workers: processes that decode; 0 decodes in this one.
        decode_on_device: workers only read; JPEGs are decoded on `device`, by this process.
        resident: the corpora's pictures where they are on `device` already; workers only choose crops.

    Raises:
        ValueError: more workers than steps that can be planned ahead.
    """
    prefetch, steps_ahead = PREFETCH, STEPS_AHEAD
    if sampler.horizon is not None:
        # Plans are made in this process, where the sampler also learns, but before their step is reached.
        if num_workers > sampler.horizon:
            raise ValueError(
                f"batch.adaptive plans {sampler.horizon} steps ahead, too few for {num_workers} loader "
                f"workers: use --loader-workers {sampler.horizon} at most"
            )
        prefetch = min(prefetch, sampler.horizon // max(num_workers, 1))
        steps_ahead = min(steps_ahead, sampler.horizon - prefetch * num_workers)
    corpora = (content, style)
    prefetcher = None
    if resident is None and any(corpus.is_remote for corpus in corpora):
        prefetcher = ShardPrefetcher(corpora, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    loader = DataLoader(
        _Batches(
            corpora if resident is None else (resident[0].sizes, resident[1].sizes),
            config,
            seed,
            rank,
            decode_on_device,
        ),
        sampler=_Plans(
            sampler, step, rank, world_size, corpora, prefetcher, steps_ahead if prefetcher else 0
        ),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        # a forked child of a process with Ray's or gloo's threads may hang
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
    )
    batches = _on_device(iter(loader), corpora, config, torch.device(device), prefetcher, resident)
    if prefetcher is not None:
        weakref.finalize(batches, prefetcher.close)
    return batches


def _on_device(
    loaded: Iterator[_Loaded],
    corpora: tuple[Corpus, Corpus],
    config: BatchConfig,
    device: torch.device,
    prefetcher: ShardPrefetcher | None,
    resident: tuple[ResidentPictures, ResidentPictures] | None,
) -> Iterator[Batch]:
    def pixels(domain: int, loaded: Crops | Places) -> Tensor:
        if isinstance(loaded, Crops):
            return decode_crops(loaded, config, device, corpora[domain].uri)
        assert resident is not None
        return resident[domain].cut(loaded)

    for one in loaded:
        if prefetcher is not None:
            prefetcher.done(one.step)
        yield Batch(
            content=pixels(0, one.content),
            style=pixels(1, one.style),
            labels=one.labels.to(device, non_blocking=True),
            works_per_class=config.works_per_class,
            step=one.step,
        )


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
