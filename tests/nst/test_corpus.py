"""Reading: every sample as it was stored, and every damaged part named, never fewer samples."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset

from nst.corpus import Corpus, CorpusError, LocalStorage
from nst.images import decode_image
from tests.corpora import make_corpus


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_corpus(tmp_path_factory.mktemp("corpus"), "style", side=96, per_label=24))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def read_all(corpus: Corpus) -> list[bytes]:
    return [corpus.read(row) for row in range(len(corpus))]


class CountingStorage(LocalStorage):
    """Serves the folder `root` under far://, and counts what is fetched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []

    def read_bytes(self, uri: str) -> bytes:
        return super().read_bytes(uri.replace("far://corpus", str(self.root)))

    def download_file(self, uri: str, path: str) -> None:
        self.fetched.append(uri)
        super().download_file(uri.replace("far://corpus", str(self.root)), path)


def test_samples_are_what_webdataset_reads(original: Path) -> None:
    corpus = Corpus.open(str(original))
    tars = [str(original / shard.tar) for shard in corpus.manifest.shards]
    assert len(tars) > 1
    for row, expected in enumerate(WebDataset(tars, shardshuffle=False)):
        sample, description = corpus.sample(row), json.loads(expected["json"])
        assert corpus.read(row) == expected["jpg"]
        assert sample.key == expected["__key__"]
        assert {name: getattr(sample, name) for name in ("label", "source", "width", "height", "sha256")} == {
            name: description[name] for name in ("label", "source", "width", "height", "sha256")
        }
        assert corpus.label_names[corpus.labels[row]] == description["label"]
        assert (corpus.widths[row], corpus.heights[row]) == (description["width"], description["height"])
    assert row + 1 == len(corpus) == 96


def test_decoding_gives_the_pixels_that_pillow_gives(original: Path) -> None:
    corpus = Corpus.open(str(original))
    for row in (0, 50, 95):
        pixels = corpus.decode(row)
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, decode_image(corpus.read(row)).rgb)


def test_a_label_is_a_run_of_rows(original: Path) -> None:
    corpus = Corpus.open(str(original))
    assert corpus.label_names == ["china-bright", "china-dark", "flower-bright", "flower-dark"]
    rows = [corpus.rows_of(label_id) for label_id in range(4)]
    assert [list(found) for found in rows] == [list(range(24 * i, 24 * i + 24)) for i in range(4)]
    assert rows[0].dtype == np.int64
    assert corpus.labels.dtype == np.int32


def test_rows_that_are_not_there(original: Path) -> None:
    corpus = Corpus.open(str(original))
    for row in (-1, len(corpus)):
        with pytest.raises(IndexError):
            corpus.read(row)


def test_no_corpus_and_another_version_are_the_users_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no corpus\.json"):
        Corpus.open(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="storage"):
        Corpus.open("s3://bucket/corpus")
    path = folder / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        Corpus.open(str(folder))


def test_a_damaged_manifest_is_named(folder: Path) -> None:
    path = folder / "corpus.json"
    text = path.read_text()
    for damaged in (
        "",
        text[:-40],
        text.replace("china-dark", "china-dusk"),
        text.replace('"samples": 4', '"samples": 3'),
    ):
        path.write_text(damaged)
        with pytest.raises(CorpusError, match=r"corpus\.json"):
            Corpus.open(str(folder))


def test_a_manifest_cannot_lead_out_of_its_corpus(folder: Path) -> None:
    from nst.planning import digest_of

    path = folder / "corpus.json"
    content = json.loads(path.read_text())
    content["shards"][0]["tar"] = "../../secret.tar"
    del content["checksum"]
    path.write_text(json.dumps(content | {"checksum": digest_of(content)}))
    with pytest.raises(CorpusError, match="outside"):
        Corpus.open(str(folder))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_a_damaged_shard_or_index_is_named_and_nothing_of_it_is_read(
    folder: Path, suffix: str, damage
) -> None:
    damage(folder / "shards" / f"000001.{suffix}")
    with pytest.raises(CorpusError, match=rf"000001\.{suffix}"):
        read_all(Corpus.open(str(folder)))


def test_shards_are_checked_when_they_are_first_read_and_when_they_change(folder: Path) -> None:
    corpus = Corpus.open(str(folder))
    before = corpus.read(0)
    flip(folder / "shards/000000.tar")
    with pytest.raises(CorpusError, match=r"000000\.tar"):
        corpus.read(0)
    flip(folder / "shards/000000.tar")
    assert corpus.read(0) == before


def test_a_pickled_corpus_is_small_and_insists_on_the_same_corpus(folder: Path) -> None:
    corpus = Corpus.open(str(folder))
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    assert read_all(pickle.loads(pickled)) == read_all(corpus)  # noqa: S301 - made in the line above
    shutil.rmtree(folder)
    make_corpus(folder, "style", side=64)
    with pytest.raises(CorpusError, match="changed"):
        pickle.loads(pickled)  # noqa: S301


def read_in_a_child(corpus: Corpus, sender) -> None:
    sender.send((read_all(corpus), corpus.label_names, corpus.labels.tolist()))


@pytest.mark.slow
def test_a_child_process_shares_what_its_parent_has_read_of_the_indexes(folder: Path) -> None:
    corpus = Corpus.open(str(folder))
    expected = read_all(corpus)
    for index in (folder / "shards").glob("*.parquet"):
        index.unlink()  # who opens the corpus anew finds none
    context = torch.multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=read_in_a_child, args=(corpus, sender))
    child.start()
    assert receiver.poll(120)
    assert receiver.recv() == (expected, corpus.label_names, corpus.labels.tolist())
    child.join(60)
    assert child.exitcode == 0
    assert read_all(corpus) == expected


class Pictures(Dataset):
    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(self.corpus.decode(row).copy())


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_workers_read_the_same(original: Path, start: str) -> None:
    corpus = Corpus.open(str(original))
    context = multiprocessing.get_context(start)
    loader = DataLoader(
        Pictures(corpus), batch_size=16, num_workers=2, multiprocessing_context=context, timeout=120
    )
    batches = torch.cat(list(loader))
    assert batches.shape == (96, 96, 96, 3)
    assert np.array_equal(batches[77].numpy(), corpus.decode(77))


def test_remote_files_are_fetched_once_and_checked(folder: Path, tmp_path: Path) -> None:
    storage, cache = CountingStorage(folder), str(tmp_path / "cache")
    corpus = Corpus.open("far://corpus", storage=storage, cache_dir=cache)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(corpus.read, range(len(corpus))))
    assert found == read_all(Corpus.open(str(folder)))
    again = pickle.loads(pickle.dumps(corpus))  # noqa: S301
    assert read_all(again) == found
    assert len(storage.fetched) == len(set(storage.fetched)) == 2 * len(corpus.manifest.shards)
    assert again._files.storage.fetched == storage.fetched  # the copy fetched nothing


def test_a_damaged_cache_is_fetched_again_and_a_damaged_store_is_named(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    corpus = Corpus.open("far://corpus", storage=CountingStorage(folder), cache_dir=str(cache))
    expected = read_all(corpus)
    for path in cache.rglob("*.tar"):
        cut(path)
    assert (
        read_all(Corpus.open("far://corpus", storage=CountingStorage(folder), cache_dir=str(cache)))
        == expected
    )
    flip(folder / "shards/000001.tar")
    fresh = Corpus.open("far://corpus", storage=CountingStorage(folder), cache_dir=str(tmp_path / "other"))
    with pytest.raises(CorpusError, match=r"far://corpus/shards/000001\.tar"):
        read_all(fresh)


def test_two_readers_of_one_cache_fetch_once(folder: Path, tmp_path: Path) -> None:
    storage = CountingStorage(folder)
    corpora = [
        Corpus.open("far://corpus", storage=storage, cache_dir=str(tmp_path / "cache")) for _ in range(4)
    ]
    threads = [threading.Thread(target=read_all, args=(corpus,)) for corpus in corpora]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(storage.fetched) == len(set(storage.fetched))
