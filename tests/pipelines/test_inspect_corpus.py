"""`nst inspect`: a user sees what is there, and every damaged part by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nst.corpus import Corpus
from pipelines.inspect_corpus import inspect
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
        file.seek(Corpus.open(str(corpus)).place(50)[1] + 400)
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
    place = Corpus.open(str(corpus)).place(3)[1]
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
