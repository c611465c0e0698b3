"""`nst shard` as a user meets it: the same bytes whatever happens on the way, and nothing lost unsaid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from webdataset.compat import WebDataset

from infra import cluster, storage
from nst.corpus import Corpus
from pipelines.inspect_corpus import inspect
from pipelines.shard_corpus import shard
from tests.bad_images import encoded, make_difficult_images, picture
from tests.servers import S3Server

pytestmark = pytest.mark.usefixtures("ray_here")


def run(*arguments: object, role: str = "style") -> Result:
    return CliRunner().invoke(
        shard, [*map(str, arguments), "--role", role, "--size", "32", "--json"], prog_name="nst shard"
    )


def done(*arguments: object, role: str = "style") -> dict[str, Any]:
    result = run(*arguments, role=role)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def failures_of(corpus: Path) -> dict[str, str]:
    rows = pq.read_table(corpus / "failures.parquet").to_pylist()
    assert all(set(row) == {"source", "reason", "detail"} and row["detail"] for row in rows)
    return {row["source"]: row["reason"] for row in rows}


def add_pictures(folder: Path, label: str, count: int, first_seed: int = 0) -> None:
    (folder / label).mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + count):
        (folder / label / f"{seed:03d}.jpg").write_bytes(encoded(picture(seed=seed), "JPEG"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pictures in three labels, and one that is no picture: four shards."""
    folder = tmp_path_factory.mktemp("source")
    for number, label in enumerate(("monet", "hokusai", "klimt")):
        add_pictures(folder, label, 66, first_seed=100 * number)
    add_pictures(folder, ".", 2, first_seed=500)
    (folder / "klimt" / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def sharded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("sharded") / "corpus"
    result = done(source, corpus, "--workers", 1)
    assert (result["num_samples"], result["num_labels"], result["num_shards"]) == (200, 4, 4)
    assert result["failures"] == {"not_an_image": 1}
    return corpus


@pytest.fixture
def corpus(sharded: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / "corpus"))


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    source: Path, sharded: Path, tmp_path: Path
) -> None:
    done(source, tmp_path / "two", "--workers", 2)
    assert bytes_below(tmp_path / "two") == bytes_below(sharded)


def test_the_corpus_is_laid_out_as_promised(source: Path, sharded: Path) -> None:
    names = [f"shards/{number:06d}.{suffix}" for number in range(4) for suffix in ("parquet", "tar")]
    assert sorted(bytes_below(sharded)) == ["_nst/inputs.parquet", "corpus.json", "failures.parquet", *names]
    corpus = Corpus.open(str(sharded))
    assert corpus.manifest.labels == {"hokusai": 66, "klimt": 66, "monet": 66, "unlabelled": 2}
    assert corpus.manifest.source == str(source)
    samples = [corpus.sample(row) for row in range(len(corpus))]
    assert [(s.label, s.source) for s in samples] == sorted((s.label, s.source) for s in samples)
    assert len(list(WebDataset([str(sharded / name) for name in names[1::2]], shardshuffle=False))) == 200
    assert failures_of(sharded) == {"klimt/broken.jpg": "not_an_image"}


def test_nothing_is_lost_of_a_difficult_folder(tmp_path: Path) -> None:
    expected = make_difficult_images(tmp_path / "source")
    result = done(tmp_path / "source", tmp_path / "corpus")
    assert result["num_samples"] == len(expected.taken)
    assert failures_of(tmp_path / "corpus") == expected.refused
    corpus = Corpus.open(str(tmp_path / "corpus"))
    samples = {corpus.sample(row).source: corpus.sample(row) for row in range(len(corpus))}
    for source, (width, height) in expected.taken.items():
        assert (samples[source].width, samples[source].height) == (round(32 * width / height), 32), source


def test_a_rerun_has_nothing_to_do(source: Path, corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    result = run(source, corpus)
    assert "nothing new" in result.output
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.parametrize("lost", [["tar"], ["parquet"], ["tar", "parquet"]])
def test_a_lost_shard_is_written_again_as_it_was(
    source: Path, corpus: Path, sharded: Path, lost: list[str]
) -> None:
    for suffix in lost:
        (corpus / f"shards/000001.{suffix}").unlink()
    done(source, corpus)
    assert bytes_below(corpus) == bytes_below(sharded)


def test_a_lost_shard_whose_images_are_gone_is_said(corpus: Path, source: Path, tmp_path: Path) -> None:
    less = Path(shutil.copytree(source, tmp_path / "source"))
    shutil.rmtree(less / "hokusai")
    (corpus / "shards/000000.tar").unlink()
    result = run(less, corpus)
    assert result.exit_code == 2
    assert "000000" in result.output
    assert not (corpus / "shards/000000.tar").exists()


def test_an_interrupted_run_is_gone_on_with(source: Path, corpus: Path, sharded: Path) -> None:
    """What a killed run leaves: some finished shards, a tar without its index, no corpus.json."""
    for name in ("corpus.json", "failures.parquet", "shards/000001.parquet", "shards/000003.parquet"):
        (corpus / name).unlink()
    (corpus / "shards/000003.tar").unlink()
    before = (corpus / "shards/000002.tar").stat().st_mtime_ns
    result = run(source, corpus)
    assert "2 of 4 shards are there already" in result.output
    assert (corpus / "shards/000002.tar").stat().st_mtime_ns == before
    assert bytes_below(corpus) == bytes_below(sharded)


def test_new_images_go_into_new_shards(source: Path, corpus: Path, tmp_path: Path) -> None:
    more = Path(shutil.copytree(source, tmp_path / "source"))
    add_pictures(more, "turner", 3, first_seed=900)
    add_pictures(more, "monet", 1, first_seed=950)
    (more / "klimt/broken.jpg").write_bytes(encoded(picture(seed=960), "JPEG"))  # somebody repaired it
    before = bytes_below(corpus / "shards")
    result = done(more, corpus)
    assert (result["num_samples"], result["num_new_samples"], result["num_shards"]) == (205, 5, 5)
    after = bytes_below(corpus / "shards")
    assert {name: after[name] for name in before} == before
    assert sorted(set(after) - set(before)) == ["000004.parquet", "000004.tar"]
    assert failures_of(corpus) == {}
    opened = Corpus.open(str(corpus))
    monet = opened.label_names.index("monet")
    assert [opened.sample(int(row)).label for row in opened.rows_of(monet)] == ["monet"] * 67
    again = done(more, corpus)
    assert again["digest"] == result["digest"]


def test_an_added_failure_alone_makes_no_shard(source: Path, corpus: Path, tmp_path: Path) -> None:
    more = Path(shutil.copytree(source, tmp_path / "source"))
    (more / "monet/empty.jpg").write_bytes(b"")
    digest = Corpus.open(str(corpus)).manifest.digest
    result = done(more, corpus)
    assert (result["num_shards"], result["digest"]) == (4, digest)
    assert failures_of(corpus) == {"klimt/broken.jpg": "not_an_image", "monet/empty.jpg": "empty"}
    assert len(list((corpus / "shards").iterdir())) == 8
    assert "nothing new" in run(more, corpus).output


def test_images_that_vanish_stay_and_that_change_are_refused(
    source: Path, corpus: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(source, tmp_path / "source"))
    (other / "monet/000.jpg").unlink()
    result = run(other, corpus)
    assert result.exit_code == 0
    assert "1 images of the corpus are no longer under SOURCE" in result.output
    (other / "monet/001.jpg").write_bytes(encoded(picture(seed=77), "JPEG", quality=30))
    result = run(other, corpus)
    assert result.exit_code == 2
    assert "monet/001.jpg" in result.output


def test_duplicates_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    add_pictures(folder, "b", 3)
    add_pictures(folder, "a", 2)  # the same bytes as b/000.jpg and b/001.jpg
    result = done(folder, tmp_path / "corpus", "--dedupe", "--max-failures", 0)
    assert (result["num_samples"], result["failures"]) == (3, {"duplicate": 2})
    assert failures_of(tmp_path / "corpus") == {"b/000.jpg": "duplicate", "b/001.jpg": "duplicate"}
    assert "nothing new" in run(folder, tmp_path / "corpus", "--dedupe").output
    add_pictures(folder, "c", 4)
    result = done(folder, tmp_path / "corpus", "--dedupe")
    assert (result["num_samples"], result["failures"]) == (4, {"duplicate": 5})
    assert done(folder, tmp_path / "all")["num_samples"] == 9


def test_labels_from_a_table(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    add_pictures(folder, "some", 3)
    table = tmp_path / "labels.csv"
    table.write_text(
        "﻿label,path,year\nMonet,some/000.jpg,1873\nHokusai,./some/001.jpg,1831\nKlimt,some/gone.jpg,1\n"
    )
    done(folder, tmp_path / "corpus", "--labels", table)
    assert Corpus.open(str(tmp_path / "corpus")).manifest.labels == {"Hokusai": 1, "Monet": 1}
    assert failures_of(tmp_path / "corpus") == {"some/002.jpg": "no_label", "some/gone.jpg": "missing"}
    done(folder, tmp_path / "flat", "--labels", "none")
    assert Corpus.open(str(tmp_path / "flat")).manifest.labels == {"unlabelled": 3}


def test_mistakes_are_one_line_and_exit_2(source: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("a")
    (tmp_path / "bad.csv").write_text("file,class\n1,2\n")
    foreign = tmp_path / "foreign/shards"
    foreign.mkdir(parents=True)
    (foreign / "00000.tar").write_bytes(b"\0" * 1024)
    out = tmp_path / "out"
    for arguments, expected in (
        ((tmp_path / "nowhere", out), "nowhere"),
        ((tmp_path / "empty", out), "no files"),
        ((notes, out), "no image"),
        ((tmp_path / "bad.csv", out), "is a file"),
        ((source, tmp_path / "bad.csv"), "is a file"),
        ((source, tmp_path / "bad.csv/below"), "is a file"),
        ((source, source), "lies in SOURCE"),
        ((source, source / "corpus"), "lies in SOURCE"),
        ((source, out, "--labels", tmp_path / "none.csv"), "no such file"),
        ((source, out, "--labels", tmp_path / "bad.csv"), "file, class"),
        ((source, corpus, "--shard-mb", 8), "--shard-mb 256, not 8"),
        ((source, corpus, "--labels", "none"), "--labels dirname, not none"),
        ((source, tmp_path / "foreign"), "nst index"),
        ((source, out, "--shard-mb", 0), "0 MiB"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert expected in result.stderr, (expected, result.stderr)
        assert len(result.stderr.strip().splitlines()) == 1
        assert not out.exists()
    assert run(source, corpus, role="content").exit_code == 2


def test_too_many_failures_and_no_success_exit_1(tmp_path: Path) -> None:
    expected = make_difficult_images(tmp_path / "source")
    result = run(tmp_path / "source", tmp_path / "corpus", "--max-failures", len(expected.refused) - 1)
    assert result.exit_code == 1
    assert len(Corpus.open(str(tmp_path / "corpus"))) == len(expected.taken)
    assert (
        run(tmp_path / "source", tmp_path / "corpus", "--max-failures", len(expected.refused)).exit_code == 0
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_bytes(b"no picture")
    result = run(tmp_path / "bad", tmp_path / "none")
    assert result.exit_code == 1
    assert "none of the 1 inputs" in result.output
    assert not (tmp_path / "none/corpus.json").exists()


def test_a_damaged_ledger_or_manifest_is_named(source: Path, corpus: Path, sharded: Path) -> None:
    ledger = corpus / "_nst/inputs.parquet"
    ledger.write_bytes(ledger.read_bytes()[:-1])
    result = run(source, corpus)
    assert result.exit_code == 1
    assert "_nst/inputs.parquet" in result.stderr
    (corpus / "corpus.json").unlink()  # the remedy that it names
    done(source, corpus)
    assert bytes_below(corpus) == bytes_below(sharded)


@pytest.mark.slow
def test_a_bucket_gives_the_same_corpus_as_a_folder(
    source: Path, sharded: Path, tmp_path: Path, s3: S3Server
) -> None:
    cluster.disconnect()  # the workers that are there do not know where the store is
    bucket = s3.create_bucket()
    storage.upload_dir(str(source), f"{bucket}/source")
    done(f"{bucket}/source", f"{bucket}/corpus")
    remote = Corpus.open(
        f"{bucket}/corpus", storage=storage.ObjectStorage(), cache_dir=str(tmp_path / "cache")
    )
    local = Corpus.open(str(sharded))
    assert remote.manifest.digest == local.manifest.digest
    assert [remote.read(row) for row in range(0, 200, 7)] == [local.read(row) for row in range(0, 200, 7)]
    assert "nothing new" in run(f"{bucket}/source", f"{bucket}/corpus").output

    def verified() -> Result:
        return CliRunner().invoke(inspect, [f"{bucket}/corpus", "--verify", "--no-contact-sheet"])

    storage.delete(f"{bucket}/corpus/shards/000001.tar")
    found = verified()
    assert found.exit_code == 1
    assert "shards/000001.tar is missing" in found.output
    done(f"{bucket}/source", f"{bucket}/corpus")
    assert verified().exit_code == 0
    storage.download_dir(f"{bucket}/corpus/shards", str(tmp_path / "shards"))
    assert bytes_below(tmp_path / "shards") == bytes_below(sharded / "shards")
    cluster.disconnect()


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path (Ray's sockets lie in it) for what a killed program leaves behind."""
    folder = tempfile.mkdtemp(prefix="nst-killed-", dir="/tmp")
    yield Path(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_program_is_gone_on_with(
    source: Path, sharded: Path, tmp_path: Path, scratch: Path, number: int
) -> None:
    corpus = tmp_path / "corpus"
    command = [sys.executable, "-m", "pipelines.cli", "shard", str(source), str(corpus)]
    command += ["--role", "style", "--size", "32", "--workers", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not list(corpus.rglob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0].decode()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
    assert process.returncode in ((-signal.SIGKILL,) if number == signal.SIGKILL else (0, 130)), output
    if process.returncode == 130:
        assert "the same command goes on from here" in output
        assert not list(scratch.glob("nst-shards-*"))
    _wait_for_the_end_of(scratch)
    done(source, corpus)
    assert bytes_below(corpus) == bytes_below(sharded)


def _wait_for_the_end_of(scratch: Path) -> None:
    """Ray's processes end by themselves when their driver is gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [_command_line(process) for process in psutil.process_iter()]
        if not any(str(scratch) in line for line in lines):
            return
        time.sleep(0.2)
    pytest.fail(f"processes of {scratch} are still there")


def _command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""
