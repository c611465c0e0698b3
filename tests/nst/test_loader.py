import io
import json
import random
import tarfile
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nst.class_draws import WINDOW
from nst.config import BatchConfig
from nst.corpus import Corpus, CorpusError, LocalStorage
from nst.crops import random_crop
from nst.decoding import decodes_on_device
from nst.loader import load_batches
from nst.prefetch import ShardPrefetcher
from nst.sampling import DynamicBatchSampler
from tests.corpora import make_corpus

PLAIN = BatchConfig(num_classes=2, size=32)
ADAPTIVE = replace(PLAIN, adaptive=2.0)
WHOLE = BatchConfig(num_classes=4, size=48)
MODES = {
    "plain": WHOLE,
    "adaptive": replace(WHOLE, adaptive=2.0),
    "sizes": replace(WHOLE, sizes=(32, 48)),
    "random": replace(WHOLE, sampling="random"),
    "window": replace(WHOLE, window_shards=1),
    "window and sizes": replace(WHOLE, window_shards=1, sizes=(32, 48)),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Corpus]:
    """A content and a style corpus of some 500 small pictures in 8 shards each, no two shards alike."""
    folder = tmp_path_factory.mktemp("sharded")
    content = Corpus.open(make_corpus(folder / "content", "content", side=32, per_label=128))
    style = Corpus.open(make_corpus(folder / "style", "style", side=32, per_label=125))
    assert len(content.manifest.shards) == len(style.manifest.shards) == 8
    return content, style


def sampler_of(corpora: tuple[Corpus, Corpus], config: BatchConfig, world_size: int = 1):
    return DynamicBatchSampler.for_corpora(*corpora, config, 3, world_size)


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


# --- exactly the same, however many ranks and workers, and wherever it is resumed -----------------------


def global_batches(corpora, config, num_steps, *, start=0, memory=None, world_size=1, num_workers=0):
    """Batches of all ranks, joined; every rank's sampler learns what all saw, as in a training."""
    content, style = corpora
    samplers = [sampler_of(corpora, config, world_size) for _ in range(world_size)]
    for sampler in samplers:
        sampler.recall(memory or sampler.memory())
    ranks = [
        load_batches(
            content,
            style,
            sampler,
            config,
            seed=3,
            step=start,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        for rank, sampler in enumerate(samplers)
    ]
    joined = []
    for step in range(start, start + num_steps):
        parts = [next(batches) for batches in ranks]
        assert {part.step for part in parts} == {step}
        assert len({(part.content.shape, part.style.shape) for part in parts}) == 1
        names = ("content", "style", "labels")
        joined.append(
            replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
        )
        for sampler in samplers:
            sampler.observe(step, joined[-1].labels, losses_of(joined[-1].labels))
    return joined, samplers[0].memory()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_and_resuming_anywhere_give_the_same_global_batches(sharded, mode):
    config, draw = MODES[mode], random.Random(mode)
    num_steps = 2 * WINDOW + 20 if config.adaptive else 30
    whole, memory = global_batches(sharded, config, num_steps)
    for world_size in (2, 4):
        num = WINDOW + 3 if config.adaptive else 6
        assert_same(global_batches(sharded, config, num, world_size=world_size)[0], whole[:num])
    for stop in sorted(draw.sample(range(1, num_steps), 3)):
        _, kept = global_batches(sharded, config, stop) if config.adaptive else ((), {})
        world_size = draw.choice((1, 2, 4))
        kept = json.loads(json.dumps(kept))
        rest, end = global_batches(
            sharded, config, num_steps - stop, start=stop, memory=kept, world_size=world_size
        )
        assert_same(rest, whole[stop:])
        assert end == memory


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_loader_workers_change_nothing(sharded, mode, num_workers):
    num_steps = WINDOW + 10 if MODES[mode].adaptive else 12
    here, memory = global_batches(sharded, MODES[mode], num_steps)
    there, other = global_batches(sharded, MODES[mode], num_steps, num_workers=num_workers)
    assert_same(here, there)
    assert memory == other


# --- decoding where the training runs -------------------------------------------------------------------


def on_arrival(corpora, config, device="cpu", num_workers=0):
    content, style = corpora
    return load_batches(
        content,
        style,
        sampler_of(corpora, config),
        config,
        seed=3,
        num_workers=num_workers,
        device=device,
        decode_on_device=True,
    )


def test_decoding_on_arrival_gives_the_pixels_that_workers_give(corpora):
    config = MODES["sizes"]
    here, _ = global_batches(corpora, config, 6)
    assert_same(list(islice(on_arrival(corpora, config), 6)), here)


def test_samples_that_only_pillow_reads_right_are_decoded_before(tmp_path, corpora):
    from nst.adoption import adopt_tar
    from nst.manifest import Manifest, ShardInfo
    from nst.shards import read_record

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(8):
            data = io.BytesIO()
            Image.fromarray(np.roll(pixels, number, axis=0)).save(data, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = data.tell()
            tar.addfile(member, io.BytesIO(data.getvalue()))
    adopted = adopt_tar(str(tmp_path / "0.tar"), "0")
    (tmp_path / "0.parquet").write_bytes(adopted.index)
    record = read_record("0", adopted.index)
    shard = ShardInfo(
        name="0",
        num_samples=8,
        num_bytes=record.num_bytes,
        sha256=record.sha256,
        tar="0.tar",
        index="0.parquet",
        index_num_bytes=record.index_num_bytes,
        index_sha256=record.index_sha256,
    )
    manifest = Manifest(
        role="content",
        image_size=40,
        num_samples=8,
        labels={"unlabelled": 8},
        shards=(shard,),
        settings={"adopted": True},
        source="tests",
    )
    (tmp_path / "corpus.json").write_text(manifest.to_json())
    mixed = (Corpus.open(str(tmp_path)), corpora[1])
    here, _ = global_batches(mixed, PLAIN, 3)
    assert_same(list(islice(on_arrival(mixed, PLAIN), 3)), here)


def test_where_jpegs_are_decoded():
    cpu = torch.device("cpu")
    assert not decodes_on_device("cpu", cpu)
    assert not decodes_on_device("auto", cpu)
    with pytest.raises(ValueError, match=r"decode=gpu needs a CUDA device .*runs on cpu.*set decode=cpu"):
        decodes_on_device("gpu", cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_decodes_to_nearly_the_same_pixels(corpora):
    assert decodes_on_device("auto", torch.device("cuda"))
    config = MODES["sizes"]
    here, _ = global_batches(corpora, config, 6)
    there = list(islice(on_arrival(corpora, config, "cuda"), 6))
    for one, other in zip(here, there, strict=True):
        for name in ("content", "style"):
            apart = (getattr(one, name) - getattr(other, name).cpu()).abs() * 127.5
            assert apart.mean() < 1.0
            assert apart.max() < 16


# --- remote corpora: fetched before they are needed ------------------------------------------------------


class FarStorage(LocalStorage):
    """Serves folders under far://; remembers which thread fetched what."""

    def __init__(self) -> None:
        self.fetched: list[tuple[str, str]] = []

    def read_bytes(self, uri: str) -> bytes:
        return super().read_bytes(uri.removeprefix("far:/"))

    def download_file(self, uri: str, path: str) -> None:
        super().download_file(uri.removeprefix("far:/"), path)
        self.fetched.append((uri, threading.current_thread().name))

    @property
    def tars(self) -> list[str]:
        return [uri for uri, _ in self.fetched if uri.endswith(".tar")]


def far(corpora: tuple[Corpus, Corpus], cache: Path, cache_bytes: int | None = None):
    """The same corpora, remote, and the storage that they come from."""
    storage = FarStorage()
    content, style = (
        Corpus.open(f"far:/{corpus.uri}", storage=storage, cache_dir=str(cache), cache_bytes=cache_bytes)
        for corpus in corpora
    )
    return (content, style), storage


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch-")]


def test_remote_corpora_give_the_same_batches_and_are_fetched_ahead(sharded, tmp_path):
    remote, storage = far(sharded, tmp_path)
    config = MODES["plain"]
    batches = load_batches(*remote, sampler_of(remote, config), config, seed=3)
    first = next(batches)
    wait_until(lambda: len(storage.tars) == 16)  # the next 128 steps need every shard
    assert_same([first, *islice(batches, 20)], global_batches(sharded, config, 21)[0])
    assert len(storage.tars) == 16
    assert prefetch_threads()
    del batches
    wait_until(lambda: not prefetch_threads())


def test_prefetching_a_sampler_that_learns_changes_nothing(sharded, tmp_path):
    remote, _ = far(sharded, tmp_path)
    config = MODES["adaptive"]
    here, memory = global_batches(sharded, config, WINDOW + 20)
    there, other = global_batches(remote, config, WINDOW + 20)
    assert_same(here, there)
    assert memory == other


def test_shards_are_fetched_in_the_order_of_need_and_never_more_than_fit(sharded, tmp_path):
    size = max(shard.num_bytes for shard in sharded[0].manifest.shards)
    remote, storage = far(sharded, tmp_path, cache_bytes=6 * size)  # half of it: three shards
    names = [f"{remote[0].uri}/{shard.tar}" for shard in remote[0].manifest.shards]
    prefetcher = ShardPrefetcher(remote, num_sharing=1)
    for step, number in enumerate([5, 2, 7, 2, 0, 1, 3]):
        prefetcher.want(step, [(0, number)])
    wait_until(lambda: len(storage.tars) == 3)
    assert set(storage.tars) == {names[5], names[2], names[7]}
    prefetcher.done(0)  # 5 is not needed any more
    wait_until(lambda: len(storage.tars) == 4)
    assert storage.tars[3] == names[0]
    prefetcher.done(2)  # 7 neither, but 2 once more
    wait_until(lambda: len(storage.tars) == 5)
    time.sleep(0.1)
    assert storage.tars[4:] == [names[1]]
    prefetcher.done(6)
    prefetcher.want(7, [(0, 3), (0, 5)])
    wait_until(lambda: len(storage.tars) >= 6)
    prefetcher.close()
    wait_until(lambda: not prefetch_threads())


def test_a_shard_that_cannot_be_fetched_is_an_error_of_the_step_that_needs_it(tmp_path):
    local = (
        Corpus.open(make_corpus(tmp_path / "content", "content", side=32, per_label=23)),
        Corpus.open(make_corpus(tmp_path / "style", "style", side=32, per_label=24)),
    )
    (tmp_path / "style/shards/000001.tar").unlink()
    remote, _ = far(local, tmp_path / "cache")
    plans = sampler_of(local, PLAIN)
    first = next(step for step in range(100) if (plans.plan(step).style >= 48).any())
    batches = load_batches(*remote, sampler_of(remote, PLAIN), PLAIN, seed=3)
    for _ in range(first):
        next(batches)
    with pytest.raises(CorpusError, match=r"far:/.*style/shards/000001\.tar is missing"):
        next(batches)


@pytest.mark.slow
def test_workers_over_a_small_cache_hand_over_encoded_bytes(sharded, tmp_path):
    size = max(shard.num_bytes for shard in sharded[0].manifest.shards)
    remote, _ = far(sharded, tmp_path, cache_bytes=4 * size)
    config = MODES["window and sizes"]
    there = list(islice(on_arrival(remote, config, num_workers=2), 12))
    assert_same(there, global_batches(sharded, config, 12)[0])
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*.tar")) <= 4 * size
