"""`nst shard` as a user meets it: the same bytes whatever happens on the way, and nothing lost unsaid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from webdataset.compat import WebDataset

from infra import cluster, storage
from nst.corpus import Corpus, LocalStorage, Manifest
from nst.corpus_check import check_corpus
from pipelines.corpus_inputs import list_inputs
from pipelines.inspect_corpus import inspect
from pipelines.shard_corpus import shard
from tests import corpora
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
    corpus = Corpus.open(str(sharded))
    files = [corpus.manifest.ledger, "corpus.json", "failures.parquet", *names]
    assert sorted(bytes_below(sharded)) == files
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
    assert "2 of 4 shards were there already" in result.output
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


def test_files_that_look_the_same_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    pieces = [Image.fromarray(piece) for some in corpora.pieces(192).values() for piece in some]
    for number, piece in enumerate(pieces[:4]):
        write_picture(folder / f"b/{number}.png", piece)
        write_picture(folder / f"c/{number}.jpg", piece.resize((150, 150), Image.Resampling.LANCZOS))
    write_picture(folder / "c/same.png", pieces[0])
    result = done(folder, tmp_path / "corpus", "--dedupe", "near", "--max-failures", 0)
    assert (result["num_samples"], result["failures"]) == (4, {"duplicate": 1, "near_duplicate": 4})
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "corpus/failures.parquet").to_pylist()}
    assert rows["c/same.png"]["detail"] == "has the same bytes as b/0.png"
    assert re.fullmatch(r"looks like b/2.png: \d of the 64 bits .*", rows["c/2.jpg"]["detail"])
    assert "nothing new" in run(folder, tmp_path / "corpus", "--dedupe", "near").output

    write_picture(folder / "a/first.jpg", pieces[1].resize((120, 120)))  # sorts before what the corpus has
    write_picture(folder / "a/new.jpg", pieces[5])
    result = done(folder, tmp_path / "corpus", "--dedupe", "near")
    assert (result["num_samples"], result["failures"]) == (5, {"duplicate": 1, "near_duplicate": 5})
    assert done(folder, tmp_path / "all")["num_samples"] == 11


def write_picture(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def test_dedupe_alone_means_exact_wherever_it_stands(tmp_path: Path) -> None:
    add_pictures(tmp_path / "source", "a", 2)
    add_pictures(tmp_path / "source", "b", 2)
    assert done("--dedupe", tmp_path / "source", tmp_path / "corpus")["num_samples"] == 2
    assert Corpus.open(str(tmp_path / "corpus")).manifest.settings["dedupe"] == "exact"


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
    rows = pq.read_table(tmp_path / "corpus/failures.parquet").to_pylist()
    assert rows[1]["detail"] == f"is in {table}, but not under SOURCE"
    columns = {
        "path": ["some/000.jpg", "some/001.jpg", "some/gone.jpg"],
        "label": ["Monet", "Hokusai", "Klimt"],
    }
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    done(folder, tmp_path / "parquet", "--labels", tmp_path / "labels.parquet")
    assert bytes_below(tmp_path / "parquet/shards").keys() == bytes_below(tmp_path / "corpus/shards").keys()
    assert Corpus.open(str(tmp_path / "parquet")).manifest.digest == (
        Corpus.open(str(tmp_path / "corpus")).manifest.digest
    )
    done(folder, tmp_path / "flat", "--labels", "none")
    assert Corpus.open(str(tmp_path / "flat")).manifest.labels == {"unlabelled": 3}


def test_mistakes_are_one_line_and_exit_2(source: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("a")
    (tmp_path / "bad.csv").write_text("file,class\n1,2\n")
    (tmp_path / "two.csv").write_text("path,label\na/1.jpg,y\n./a/1.jpg,x\n")
    (tmp_path / "bad.parquet").write_text("path,label\n")
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
        ((source, out, "--labels", tmp_path / "two.csv"), "a/1.jpg has two labels, x and y"),
        ((source, out, "--labels", tmp_path / "bad.parquet"), "no Parquet file"),
        ((source, out, "--labels", tmp_path), "is a folder"),
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
    ledger = next((corpus / "_nst").iterdir())
    ledger.write_bytes(ledger.read_bytes()[:-1])
    result = run(source, corpus)
    assert result.exit_code == 1
    assert f"_nst/{ledger.name}" in result.stderr
    (corpus / "corpus.json").unlink()  # the remedy that it names
    done(source, corpus)
    assert bytes_below(corpus) == bytes_below(sharded)


def files_of(manifest: Manifest) -> set[str]:
    """All that a corpus consists of."""
    shards = {key for shard in manifest.shards for key in (shard.tar, shard.index)}
    return shards | set(manifest.files) | {"corpus.json"}


def while_listing(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """The next run does `act` when it has listed its inputs, before it plans."""

    def list_then_act(*arguments: Any) -> None:
        monkeypatch.undo()
        list_inputs(*arguments)
        act()

    monkeypatch.setattr("pipelines.shard_corpus.list_inputs", list_then_act)


@pytest.mark.parametrize("was_there", [False, True])
def test_of_two_runs_at_once_one_wins_and_the_other_says_so(
    was_there: bool, source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = corpus if was_there else tmp_path / "new"
    more = Path(shutil.copytree(source, tmp_path / "source"))
    add_pictures(more, "turner", 2, first_seed=900)

    def the_other_run() -> None:
        add_pictures(more, "aivazovsky", 3, first_seed=950)
        done(more, place)

    while_listing(monkeypatch, the_other_run)
    result = run(more, place)
    assert result.exit_code == 1
    assert "another run has published" in result.output
    opened = Corpus.open(str(place))
    assert opened.manifest.labels["aivazovsky"] == 3
    assert set(bytes_below(place)) == files_of(opened.manifest)
    assert [
        part.key for part in check_corpus(str(place), opened.manifest, LocalStorage()) if part.problems
    ] == []
    done(more, place)
    opened = Corpus.open(str(place))
    assert len(opened) == 205
    assert [
        part.key for part in check_corpus(str(place), opened.manifest, LocalStorage()) if part.problems
    ] == []
    again = done(more, place)
    assert again["num_new_samples"] == 0


def test_what_a_dead_run_of_other_inputs_left_is_not_in_the_way(
    source: Path, corpus: Path, tmp_path: Path
) -> None:
    more = Path(shutil.copytree(source, tmp_path / "source"))
    add_pictures(more, "aivazovsky", 3, first_seed=950)
    (corpus / "corpus.json").unlink()
    (corpus / "shards/000002.parquet").unlink()
    result = done(more, corpus)
    assert result["digest"] == done(more, tmp_path / "fresh")["digest"]
    manifest = Corpus.open(str(corpus)).manifest
    assert set(bytes_below(corpus)) == files_of(manifest)
    assert [part.key for part in check_corpus(str(corpus), manifest, LocalStorage()) if part.problems] == []


def test_a_shard_that_keeps_failing_ends_the_run_and_keeps_the_others(
    source: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(source, tmp_path / "source"))
    image = own / "hokusai/100.jpg"  # in the first of four shards
    data = image.read_bytes()
    while_listing(monkeypatch, lambda: (image.unlink(), image.mkdir()))
    result = run(own, tmp_path / "corpus", "--workers", 2)
    assert result.exit_code == 1
    assert re.search(r"shard 000000 .* three attempts .*IsADirectory.*hokusai/100.jpg", result.stderr)
    assert not (tmp_path / "corpus/corpus.json").exists()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus/shards").iterdir()}
    assert "000001.parquet" in kept  # it was under way when the other failed
    image.rmdir()
    image.write_bytes(data)
    assert "shards were there already" in run(own, tmp_path / "corpus").output
    assert {name: (tmp_path / "corpus/shards" / name).stat().st_mtime_ns for name in kept} == kept
    assert bytes_below(tmp_path / "corpus/shards") == bytes_below(sharded / "shards")


def test_a_list_of_failures_that_is_lost_is_written_again(source: Path, corpus: Path, sharded: Path) -> None:
    """As a run leaves it that is killed right behind its corpus.json."""
    (corpus / "failures.parquet").write_bytes(b"cut")
    done(source, corpus)
    assert bytes_below(corpus) == bytes_below(sharded)


def test_a_corpus_of_an_earlier_version_grows(source: Path, corpus: Path, sharded: Path) -> None:
    """Its ledger had another name and no reasons; its settings only said whether to leave out duplicates."""
    manifest = Corpus.open(str(corpus)).manifest
    new = corpus / str(manifest.ledger)
    old = pq.read_table(new).drop_columns(["near_hash", "reason", "detail"])
    old = old.set_column(4, "sha256", pa.array([""] * len(old)))
    pq.write_table(old, corpus / "_nst/inputs.parquet")
    new.unlink()
    settings = {**manifest.settings, "dedupe": False}
    del settings["keep_bytes"]
    digest = hashlib.sha256((corpus / "_nst/inputs.parquet").read_bytes()).hexdigest()
    files = {"_nst/inputs.parquet": digest, "failures.parquet": manifest.files["failures.parquet"]}
    (corpus / "corpus.json").write_text(
        dataclasses.replace(manifest, settings=settings, files=files).to_json()
    )
    assert "nothing new" in run(source, corpus).output
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
