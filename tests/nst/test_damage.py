"""Damage at seeded places of a corpus: each is reported with the file's name, and nobody reads fewer or other
samples without an error."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nst.adoption import adopt_tar
from nst.corpus import Corpus, CorpusError
from nst.corpus_check import check_corpus
from nst.ledger import FAILURES_SCHEMA, LEDGER_SCHEMA
from nst.manifest import FAILURES_NAME, LEDGER_PREFIX, MANIFEST_NAME, Manifest, ShardInfo
from nst.shards import read_record
from nst.verified_files import LocalStorage
from pipelines.inspect_corpus import inspect
from tests.corpora import make_corpus

NUM_PLACES = 50


def parquet(schema: pa.Schema, num_rows: int) -> bytes:
    columns = [
        pa.array([f"{name} {row}" if pa.types.is_string(kind) else row for row in range(num_rows)], kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def own_corpus(folder: Path) -> Path:
    """As `nst shard` leaves it: with failures and the ledger of its inputs."""
    make_corpus(folder, "style", side=64, per_label=20)
    parts = {
        FAILURES_NAME: parquet(FAILURES_SCHEMA, 30),
        f"{LEDGER_PREFIX}-0.parquet": parquet(LEDGER_SCHEMA, 110),
    }
    for key, data in parts.items():
        (folder / key).parent.mkdir(exist_ok=True)
        (folder / key).write_bytes(data)
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    files = {key: hashlib.sha256(data).hexdigest() for key, data in parts.items()}
    (folder / MANIFEST_NAME).write_text(replace(manifest, files=files, num_failures=30).to_json())
    return folder


def adopted_corpus(folder: Path, own: Path) -> Path:
    """The same samples, adopted from tars without an index."""
    shutil.copytree(own, folder, ignore=shutil.ignore_patterns("*.parquet", "_nst"))
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    failures = parquet(FAILURES_SCHEMA, 3)
    (folder / FAILURES_NAME).write_bytes(failures)
    shards: list[ShardInfo] = []
    for shard in manifest.shards:
        index = adopt_tar(str(folder / shard.tar), shard.tar).index
        (folder / shard.index).write_bytes(index)
        record = read_record(shard.name, index)
        changed = {"index_num_bytes": record.index_num_bytes, "index_sha256": record.index_sha256, "plan": ""}
        shards.append(replace(shard, **changed))
    adopted = replace(
        manifest,
        shards=tuple(shards),
        settings={"adopted": True},
        num_failures=3,
        files={FAILURES_NAME: hashlib.sha256(failures).hexdigest()},
    )
    (folder / MANIFEST_NAME).write_text(adopted.to_json())
    return folder


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("corpora")
    own = own_corpus(root / "own")
    return [own, adopted_corpus(root / "adopted", own)]


@dataclass(frozen=True)
class Damage:
    """What is done to one file; `seed` chooses the file, the place and the kind."""

    seed: int

    def apply(self, folder: Path) -> tuple[str, str]:
        """(key of the file, what was done to it)."""
        chance = random.Random(self.seed)
        keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        key = keys[self.seed // 2 % len(keys)]  # in turn, so that none is left out
        path = folder / key
        data = bytearray(path.read_bytes())
        place = chance.randrange(len(data))
        length = chance.choice([1, 2, 16, 512, 4096])
        kind = chance.choice(["flip", "overwrite", "zero", "truncate", "delete"])
        before = bytes(data)
        if kind == "flip":
            data[place] ^= 1 << chance.randrange(8)
        elif kind == "overwrite":
            data[place : place + length] = chance.randbytes(len(data[place : place + length]))
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "truncate":
            del data[place:]
        else:
            del data[place : place + length]
        if data == before:  # zeros upon zeros
            data[place] ^= 1
        path.write_bytes(data)
        return key, f"{kind} at {place} of {len(before)} bytes of {key}"


def read_all(folder: Path) -> list[bytes]:
    corpus = Corpus.open(str(folder))
    return [corpus.read(row) for row in range(len(corpus))]


def has_the_same_content(damaged: Path, original: Path) -> bool:
    """A JSON text may differ where its content does not: a blank for another."""
    try:
        return json.loads(damaged.read_bytes()) == json.loads(original.read_bytes())
    except ValueError:
        return False


@pytest.mark.parametrize("seed", range(NUM_PLACES))
def test_damage_is_reported_and_never_read(corpora: list[Path], tmp_path: Path, seed: int) -> None:
    original = corpora[seed % 2]
    folder = Path(shutil.copytree(original, tmp_path / "corpus"))
    key, what = Damage(seed).apply(folder)

    verified = CliRunner().invoke(inspect, [str(folder), "--verify", "--no-contact-sheet"])
    assert verified.exit_code in (1, 2), what
    assert key in verified.stderr, (what, verified.output)
    assert "Traceback" not in verified.output, what

    if key.startswith("shards/"):
        with pytest.raises(CorpusError, match=re.escape(key)):
            read_all(folder)
    elif key == MANIFEST_NAME and not has_the_same_content(folder / key, original / key):
        with pytest.raises((CorpusError, ValueError), match=re.escape(key)):
            read_all(folder)
    else:
        assert read_all(folder) == read_all(original), what


def test_every_kind_of_file_is_among_the_damaged(corpora: list[Path], tmp_path: Path) -> None:
    damaged = set()
    for seed in range(NUM_PLACES):
        folder = Path(shutil.copytree(corpora[seed % 2], tmp_path / str(seed)))
        damaged.add((seed % 2, Damage(seed).apply(folder)[0]))
    everything = {
        (number, str(path.relative_to(folder)))
        for number, folder in enumerate(corpora)
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert damaged == everything


def test_what_is_not_damaged_is_not_reported(corpora: list[Path]) -> None:
    for folder in corpora:
        manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
        reports = list(check_corpus(str(folder), manifest, LocalStorage()))
        assert [report.key for report in reports if report.problems] == []
        assert {report.key for report in reports} == {
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        }
        assert sum(report.num_samples for report in reports) == 80


def test_shards_that_changed_places_are_named(corpora: list[Path], tmp_path: Path) -> None:
    """Two whole files under each other's names: nothing is damaged but the order."""
    for number, folder in enumerate(corpora):
        swapped = Path(shutil.copytree(folder, tmp_path / str(number)))
        for suffix in ("tar", "parquet"):
            first, second = (swapped / f"shards/00000{n}.{suffix}" for n in (0, 1))
            first.rename(swapped / "kept")
            second.rename(first)
            (swapped / "kept").rename(second)
        with pytest.raises(CorpusError, match="000000"):
            read_all(swapped)
        result = CliRunner().invoke(inspect, [str(swapped), "--verify", "--no-contact-sheet"])
        assert result.exit_code == 1
        assert all(f"00000{n}.{suffix}" in result.stderr for n in (0, 1) for suffix in ("tar", "parquet"))
