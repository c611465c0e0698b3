import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nst.class_draws import WINDOW
from nst.config import BatchConfig
from nst.corpus import Corpus
from nst.loader import load_batches, random_crop
from nst.sampling import DynamicBatchSampler

PLAIN = BatchConfig(num_classes=2, size=32)
ADAPTIVE = replace(PLAIN, adaptive=2.0)


def sampler_of(corpora: tuple[Corpus, Corpus], config: BatchConfig, world_size: int = 1):
    content, style = corpora
    return DynamicBatchSampler(style.labels, len(content), config, 3, world_size)


def losses_of(labels: torch.Tensor) -> torch.Tensor:
    return (labels == 0).float() + 0.1 * labels


def train(corpora, config, num_steps, *, start=0, memory=None, num_workers=0):
    """Batches as a training sees them, and what its sampler remembers at the end."""
    sampler = sampler_of(corpora, config)
    if memory is not None:
        sampler.recall(json.loads(json.dumps(memory)))
    content, style = corpora
    batches = load_batches(content, style, sampler, config, seed=3, step=start, num_workers=num_workers)
    seen = []
    for step in range(start, start + num_steps):
        seen.append(next(batches))
        sampler.observe(step, seen[-1].labels, losses_of(seen[-1].labels))
    return seen, sampler.memory()


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.step == other.step
        for name in ("content", "style", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), (one.step, name)


def test_a_batch_has_the_size_of_its_plan(corpora):
    config = BatchConfig(num_classes=4, size=48, sizes=(32, 48, 64))
    sampler = sampler_of(corpora, config)
    content, style = corpora
    batches = load_batches(content, style, sampler, config, seed=3)
    for step in range(6):
        plan, batch = sampler.plan(step), next(batches)
        assert batch.content.shape == batch.style.shape == (len(plan.style), 3, plan.size, plan.size)
        assert batch.labels.tolist() == plan.labels.tolist()


@pytest.mark.parametrize("sizes", [(), (32, 48)])
def test_the_parts_of_all_ranks_are_the_global_batch(corpora, sizes):
    config = BatchConfig(num_classes=4, size=48, sizes=sizes)
    content, style = corpora
    whole = load_batches(content, style, sampler_of(corpora, config), config, seed=3, step=5)
    parts = [
        load_batches(
            content, style, sampler_of(corpora, config, 2), config, seed=3, step=5, rank=rank, world_size=2
        )
        for rank in range(2)
    ]
    for _ in range(3):
        batch, shares = next(whole), [next(part) for part in parts]
        for name in ("content", "style", "labels"):
            joined = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(joined, getattr(batch, name))


def test_a_resumed_adaptive_training_sees_the_same_pictures(corpora):
    whole, memory = train(corpora, ADAPTIVE, 2 * WINDOW + 20)
    cut, kept = train(corpora, ADAPTIVE, WINDOW + 30)
    rest, end = train(corpora, ADAPTIVE, WINDOW - 10, start=WINDOW + 30, memory=kept)
    assert_same([*cut, *rest], whole)
    assert end == memory


@pytest.mark.slow
def test_loader_workers_change_nothing_where_the_sampler_learns(corpora):
    here, memory = train(corpora, ADAPTIVE, 3 * WINDOW)
    there, other = train(corpora, ADAPTIVE, 3 * WINDOW, num_workers=2)
    assert_same(here, there)
    assert memory == other
    plain = sampler_of(corpora, PLAIN)
    assert any(batch.labels.tolist() != plain.plan(batch.step).labels.tolist() for batch in here)


def test_more_workers_than_can_be_planned_for_are_refused(corpora):
    content, style = corpora
    with pytest.raises(ValueError, match="use --loader-workers 64 at most"):
        load_batches(content, style, sampler_of(corpora, ADAPTIVE), ADAPTIVE, seed=3, num_workers=WINDOW + 1)


def test_a_random_crop_follows_from_its_key():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    config = BatchConfig(size=64)
    assert random_crop(image, config, key=0).shape == (3, 64, 64)
    assert random_crop(image, config, 0, 96).shape == (3, 96, 96)  # larger than the image
    assert torch.equal(random_crop(image, config, 5), random_crop(image, config, 5, 64))
    assert not torch.equal(random_crop(image, config, 5), random_crop(image, config, 6))
