"""`nst index`: tars of other programs become corpora as they are, and every sample is taken or listed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from webdataset.writer import ShardWriter

from nst.corpus import Corpus, CorpusError
from nst.images import decode_image
from pipelines.index_corpus import index
from pipelines.inspect_corpus import inspect
from tests.bad_images import encoded, picture
from tests.corpora import make_corpus


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "--json"], prog_name=f"nst {command.name}")


def result_of(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def failures_of(corpus: Path) -> dict[str, str]:
    return {row["source"]: row["reason"] for row in pq.read_table(corpus / "failures.parquet").to_pylist()}


def write_tars(folder: Path) -> None:
    """Two tars as plain tar makes them, with tables of another program beside them."""
    folder.mkdir(parents=True)
    pictures = folder.parent / "pictures"
    for number in range(2):
        shutil.rmtree(pictures, ignore_errors=True)
        pictures.mkdir()
        for key in range(4):
            name = f"{number:05d}{key:04d}"
            (pictures / f"{name}.jpg").write_bytes(encoded(picture(64, 48 + 8 * key, seed=key), "JPEG"))
            (pictures / f"{name}.json").write_text(json.dumps({"url": f"http://example.org/{name}"}))
        (pictures / "bad.jpg").write_bytes(b"no picture")
        tar = folder / f"{number:05d}.tar"
        subprocess.run(
            ["tar", "cf", tar, "-C", pictures, *sorted(path.name for path in pictures.iterdir())],
            check=True,
            timeout=30,
        )
        pq.write_table(pa.table({"url": ["http://example.org"]}), folder / f"{number:05d}.parquet")


def write_as_img2dataset(folder: Path) -> list[str]:
    """Two shards as img2dataset 1.47 leaves them (`--output_format webdataset --compute_hash sha256
    --save_additional_columns '["label"]'`): samples in the order in which downloads ended, those that failed
    only in the table. Returns the addresses that were downloaded, in the order of the tars."""
    folder.mkdir(parents=True)
    urls: list[str] = []
    for shard in range(2):
        table: list[dict[str, Any]] = []
        with ShardWriter(str(folder / "%05d.tar"), start_shard=shard, maxcount=100, verbose=0) as writer:
            for number in (1, 0, 2, 3):
                key, is_gone = f"{shard:05d}{number:04d}", number == 3
                meta = {
                    "label": ("monet", "klimt")[number % 2],
                    "caption": f"a boat, {number}",
                    "url": f"http://example.org/{shard}/{number}.jpg",
                    "key": key,
                    "status": "failed_to_download" if is_gone else "success",
                    "error_message": "HTTP Error 404: File not found" if is_gone else None,
                    "width": None if is_gone else 96,
                    "height": None if is_gone else 64,
                    "original_width": None if is_gone else 300,
                    "original_height": None if is_gone else 200,
                    "exif": None if is_gone else "{}",
                    "sha256": None if is_gone else "0" * 64,
                }
                table.append(meta)
                if not is_gone:
                    urls.append(str(meta["url"]))
                    jpeg = encoded(picture(96, 64, seed=10 * shard + number), "JPEG")
                    sample = {"__key__": key, "jpg": jpeg, "txt": str(meta["caption"])}
                    writer.write(sample | {"json": json.dumps(meta, indent=4)})
        pq.write_table(pa.Table.from_pylist(table), folder / f"{shard:05d}.parquet")
        stats = {"count": 4, "successes": 3, "failed_to_download": 1, "failed_to_resize": 0}
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    return urls


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("place", ["shards", "."])
def test_tars_of_another_program_are_adopted_as_they_are(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "corpus"
    write_tars(folder / place)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    result = run(index, folder, "--role", "style")
    assert result.exit_code == 0, result.output
    assert result_of(result)["num_samples"] == 8
    assert {path: path.read_bytes() for path in before} == before
    corpus = Corpus.open(str(folder))
    assert (corpus.manifest.role, corpus.manifest.image_size) == ("style", 60)
    for row in range(len(corpus)):
        assert np.array_equal(corpus.decode(row), decode_image(corpus.read(row)).rgb)
    assert corpus.sample(0).source == "http://example.org/000000000"
    failures = pq.read_table(folder / "failures.parquet").to_pylist()
    assert [(row["source"].split(":")[1], row["reason"]) for row in failures] == [("bad", "not_an_image")] * 2
    assert run(inspect, folder, "--verify", "--no-contact-sheet").exit_code == 0
    assert result_of(run(index, folder, "--role", "style"))["digest"] == corpus.manifest.digest
    tar = next(folder.rglob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(CorpusError, match=tar.name):
        corpus.read(0 if tar.name == "00000.tar" else 4)


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("place", ["shards", "."])
def test_a_folder_of_img2dataset_is_adopted_as_it_is(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "corpus"
    urls = write_as_img2dataset(folder / place)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    result = run(index, folder, "--max-failures", 0)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in before} == before
    corpus = Corpus.open(str(folder))
    assert corpus.manifest.labels == {"klimt": 2, "monet": 4}
    assert [corpus.sample(row).source for row in range(len(corpus))] == urls
    assert [corpus.sample(row).label for row in range(3)] == ["klimt", "monet", "monet"]
    assert list(corpus.rows_of(0)) == [0, 3]  # labels of an adopted corpus need not be neighbours
    assert run(inspect, folder, "--verify", "--no-contact-sheet").exit_code == 0


@pytest.mark.usefixtures("ray_here")
def test_compressed_tars_are_listed_and_only_compressed_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write_tars(folder)
    compressed = folder / "00001.tar.gz"
    compressed.write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    (folder / "00001.tar").unlink()
    result = run(index, folder)
    assert result.exit_code == 0, result.output
    assert failures_of(folder) == {"00000.tar:bad": "not_an_image", "00001.tar.gz": "unsupported"}
    assert "1 unsupported" in result.output
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "00000.tgz").write_bytes(b"")
    result = run(index, folder)
    assert result.exit_code == 2
    assert "00000.tgz" in result.stderr
    assert "decompress" in result.stderr


@pytest.mark.usefixtures("ray_here")
def test_a_tar_that_is_cut_or_compressed_fails_the_adoption(tmp_path: Path) -> None:
    write_tars(tmp_path / "corpus")
    path = tmp_path / "corpus/00001.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[4].offset
    whole = path.read_bytes()
    os.truncate(path, boundary)
    for expected in ("is cut", "is compressed (gzip)"):
        result = run(index, tmp_path / "corpus")
        assert result.exit_code == 1
        assert f"00001.tar {expected}" in result.stderr
        assert not (tmp_path / "corpus/corpus.json").exists()
        path.write_bytes(gzip.compress(whole))


def test_what_cannot_be_indexed_is_the_users_mistake(tmp_path: Path) -> None:
    own = make_corpus(tmp_path / "own", "style", side=32, per_label=1)
    for folder, expected in ((tmp_path / "empty", "no tars"), (own, "nst shard")):
        result = run(index, folder)
        assert result.exit_code == 2
        assert expected in result.stderr
