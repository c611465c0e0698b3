"""Resident corpora: the pixels that loader workers would have decoded and cut."""

from itertools import islice

import numpy as np
import pytest
import torch

from nst.config import override
from nst.crops import cut_at_random, to_range
from nst.loader import load_batches
from nst.resident import ResidentPictures, choose_places, cut_by_products
from nst.sampling import DynamicBatchSampler
from nst.train import prepare, train
from tests.nst.test_train import Recorder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resident(corpora):
    content, style = corpora
    return ResidentPictures.decode(content, CPU), ResidentPictures.decode(style, CPU)


def batches(corpora, config, resident=None, num_workers=0):
    content, style = corpora
    sampler = DynamicBatchSampler.for_corpora(content, style, config.batch, config.seed, 1)
    loaded = load_batches(
        content, style, sampler, config.batch, seed=config.seed, resident=resident, num_workers=num_workers
    )
    return list(islice(loaded, 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_that_workers_decode(corpora, resident, tiny, num_workers):
    expected, found = batches(corpora, tiny), batches(corpora, tiny, resident, num_workers)
    for one, other in zip(expected, found, strict=True):
        assert one.step == other.step
        for name in ("content", "style", "labels"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("size", [48, 160, 512], ids=["smaller", "near", "enlarged"])
def test_products_of_matrices_resize_as_the_filter_does(corpora, resident, tiny, size):
    """A picture of another shape each: the crops end at their own borders, not at those of the stack."""
    style, config = corpora[1], tiny.batch
    rows = np.arange(0, len(style), max(1, len(style) // 12))
    keys = list(range(len(rows)))
    places = choose_places(resident[1].sizes, rows, config, keys, size)
    found = cut_by_products(resident[1].pixels[places.rows], places.boxes, size)
    expected = [
        cut_at_random(style.decode_tensor(row), config, key, size)
        for row, key in zip(rows.tolist(), keys, strict=True)
    ]
    apart = (found - to_range(torch.stack(expected))).abs() * 127.5
    assert apart.max() <= 1.01  # grey levels: the two round at different moments
    assert apart.mean() < 0.3
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_training_takes_them(corpora, tiny):
    """Decoded by whom makes no difference: the same weights."""
    weights = []
    for where in ("cpu", "resident"):
        session = prepare(override(tiny, {"decode": where, "num_images": "16"}), *corpora)
        train(session, Recorder())
        weights.append(session.objective.ema_generator.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_cuts_nearly_the_same_pixels(corpora, tiny):
    there = tuple(ResidentPictures.decode(corpus, torch.device("cuda")) for corpus in corpora)
    for one, other in zip(batches(corpora, tiny), batches(corpora, tiny, there), strict=True):
        assert ((one.content - other.content.cpu()).abs() * 127.5).max() <= 1.01


def test_what_does_not_fit_is_said(corpora, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    with pytest.raises(ValueError, match=r"GB decoded, of 0.0 GB free on cuda; set decode=gpu"):
        ResidentPictures.decode(corpora[0], torch.device("cuda"))
