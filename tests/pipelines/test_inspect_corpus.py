"""`nst inspect` and `nst index`: a user sees what is there, and every damaged part by name."""

from __future__ import annotations

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
from PIL import Image

from nst.corpus import Corpus, CorpusError
from nst.images import decode_image
from pipelines.index_corpus import index
from pipelines.inspect_corpus import inspect
from tests.bad_images import encoded, picture
from tests.corpora import make_corpus


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_corpus(tmp_path_factory.mktemp("corpus"), "style", side=96, per_label=24))


@pytest.fixture
def corpus(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "corpus"))


def run(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [*map(str, arguments), "--json"], prog_name=f"nst {command.name}")


def result_of(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def test_what_is_in_a_corpus(corpus: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.jpg"
    result = run(inspect, corpus, "--verify", "--contact-sheet", sheet)
    assert result.exit_code == 0, result.output
    for text in ("96 style images", "china-bright", "verified", str(sheet)):
        assert text in result.output
    found = result_of(result)
    assert found["num_samples"] == 96
    assert found["labels"] == {"china-bright": 24, "china-dark": 24, "flower-bright": 24, "flower-dark": 24}
    assert found["sizes"]["width"] == {"min": 96, "median": 96, "max": 96}
    assert found["digest"] == Corpus.open(str(corpus)).manifest.digest
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[0] > 500
    assert pixels.std() > 20  # pictures, not an empty sheet


def test_the_contact_sheet_goes_to_the_current_folder_or_nowhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(inspect, corpus, "--no-contact-sheet").exit_code == 0
    assert not list(tmp_path.glob("*.jpg"))
    assert run(inspect, corpus).exit_code == 0
    assert [path.name for path in tmp_path.glob("*.jpg")] == ["corpus-contact-sheet.jpg"]


def test_every_damaged_part_is_named(corpus: Path) -> None:
    shards = corpus / "shards"
    os.truncate(shards / "000000.tar", (shards / "000000.tar").stat().st_size - 10_000)
    with (shards / "000001.tar").open("r+b") as file:
        file.seek(Corpus.open(str(corpus))._offsets[50] + 400)
        file.write(b"\0\0\0\0")
    (shards / "000001.parquet").unlink()
    result = run(inspect, corpus, "--verify", "--no-contact-sheet")
    assert result.exit_code == 1
    damaged = result_of(result)["damaged"]
    assert set(damaged) == {"shards/000000.tar", "shards/000001.tar", "shards/000001.parquet"}
    for name in damaged:
        assert name in result.stderr
    assert "Traceback" not in result.output


def test_the_damaged_samples_are_counted(corpus: Path) -> None:
    place = Corpus.open(str(corpus))._offsets[3]
    with (corpus / "shards/000000.tar").open("r+b") as file:
        file.seek(place + 400)
        file.write(b"\0\0\0\0")
    damaged = result_of(run(inspect, corpus, "--verify"))["damaged"]
    assert damaged.keys() == {"shards/000000.tar"}
    assert any(
        "1 of 48 samples" in problem and "000000-00003" in problem for problem in damaged["shards/000000.tar"]
    )


def test_no_corpus_is_the_users_mistake(tmp_path: Path) -> None:
    result = run(inspect, tmp_path)
    assert result.exit_code == 2
    assert "corpus.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def write_tars(folder: Path) -> None:
    """Two tars as img2dataset lays them out, with tables of its own beside them."""
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
def test_a_cut_tar_fails_the_adoption(tmp_path: Path) -> None:
    write_tars(tmp_path / "corpus")
    path = tmp_path / "corpus/00001.tar"
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[4].offset
    os.truncate(path, boundary)
    result = run(index, tmp_path / "corpus")
    assert result.exit_code == 1
    assert "00001.tar" in result.stderr
    assert not (tmp_path / "corpus/corpus.json").exists()


def test_what_cannot_be_indexed_is_the_users_mistake(corpus: Path, tmp_path: Path) -> None:
    for folder, expected in ((tmp_path / "empty", "no tars"), (corpus, "nst shard")):
        result = run(index, folder)
        assert result.exit_code == 2
        assert expected in result.stderr
