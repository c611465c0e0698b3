"""Shards of two runs under one number: both stay whole, and neither is written over the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from nst.manifest import ShardInfo
from nst.planning import ShardPlan, ShardSettings, SourceImage
from nst.shards import ShardRecord, write_shard
from pipelines.shard_publishing import find_published, publish, restore, stems
from tests.bad_images import encoded, picture

SETTINGS = ShardSettings(role="style", image_size=32)


def images(first: int) -> dict[str, bytes]:
    return {f"a/{seed}.jpg": encoded(picture(seed=seed), "JPEG") for seed in range(first, first + 3)}


def written(folder: Path, data: dict[str, bytes]) -> tuple[ShardPlan, ShardRecord, str]:
    """A shard number 5 of these images, in a folder of its own."""
    sources = [SourceImage(source=name, label="a", num_bytes=len(text)) for name, text in data.items()]
    plan = ShardPlan(number=5, images=tuple(sources), settings=SETTINGS)
    folder.mkdir()
    return plan, write_shard(plan, lambda image: data[image.source], str(folder)), str(folder)


def names(corpus: Path) -> list[str]:
    return sorted(path.name for path in (corpus / "shards").iterdir())


def test_the_second_plan_takes_a_name_of_its_own(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    one, other = written(tmp_path / "one", images(0)), written(tmp_path / "other", images(10))
    assert find_published(one[0], str(corpus)) is None
    assert publish(*one, str(corpus)).stem == "000005"
    before = (corpus / "shards/000005.tar").read_bytes()
    published = publish(*other, str(corpus))
    assert published.stem == stems(other[0])[1] == f"000005-{other[0].digest()[:8]}"
    assert published.info.tar == f"shards/{published.stem}.tar"
    assert (corpus / "shards/000005.tar").read_bytes() == before
    for plan, record, _ in (one, other):
        found = find_published(plan, str(corpus))
        assert found is not None
        assert (found.record, found.was_there) == (record, True)
    assert len(names(corpus)) == 4


def test_the_same_plan_again_changes_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    one, again = written(tmp_path / "one", images(0)), written(tmp_path / "again", images(0))
    publish(*one, str(corpus))
    (corpus / "shards/000005.parquet").unlink()  # as if the first run was killed between the two
    before = (corpus / "shards/000005.tar").stat().st_mtime_ns
    assert find_published(again[0], str(corpus)) is None
    assert publish(*again, str(corpus)).stem == "000005"
    assert (corpus / "shards/000005.tar").stat().st_mtime_ns == before
    assert names(corpus) == ["000005.parquet", "000005.tar"]


def test_foreign_files_under_both_names_are_an_error_and_stay(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    one = written(tmp_path / "one", images(0))
    (corpus / "shards").mkdir(parents=True)
    for stem in stems(one[0]):
        (corpus / f"shards/{stem}.tar").write_bytes(b"somebody's")
    with pytest.raises(OSError, match="000005"):
        publish(*one, str(corpus))
    assert [path.read_bytes() for path in (corpus / "shards").iterdir()] == [b"somebody's"] * 2


def test_a_shard_without_samples_has_no_files(tmp_path: Path) -> None:
    published = publish(*written(tmp_path / "one", {"a/broken.jpg": b"no picture"}), str(tmp_path / "corpus"))
    assert published.stem == ""
    assert [failure.reason for failure in published.record.failures] == ["not_an_image"]
    assert not (tmp_path / "corpus").exists()


def test_a_lost_shard_goes_back_where_it_was_or_not_at_all(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    one, changed = written(tmp_path / "one", images(0)), written(tmp_path / "changed", images(10))
    lost: ShardInfo = publish(*one, str(corpus)).info
    whole = (corpus / lost.tar).read_bytes()
    (corpus / lost.tar).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="000005"):
        restore(*changed, str(corpus), lost)
    assert (corpus / lost.tar).read_bytes() == whole[:-1]
    assert restore(*one, str(corpus), lost).info == lost
    assert (corpus / lost.tar).read_bytes() == whole
