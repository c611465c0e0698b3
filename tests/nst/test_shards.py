"""What the shards are relied on for: plain tars, the same bytes, every failure listed, plans that balance."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from nst.corpus import Corpus
from nst.images import ImageLimits, decode_image, difference_hash
from nst.planning import ShardPlan, ShardSettings, SourceImage, plan_shards
from nst.shards import (
    MAX_BYTES_AHEAD,
    PreparedImage,
    ShardRecord,
    index_metadata,
    prepare_image,
    read_record,
    write_shard,
)
from tests.bad_images import bad_files, encoded, good_files, picture, turned
from tests.corpora import corpus_of

SETTINGS = ShardSettings(role="style", image_size=32)


def images_of(files: dict[str, bytes]) -> list[SourceImage]:
    return [
        SourceImage(source=path, label=path.split("/")[0], num_bytes=len(data))
        for path, data in files.items()
    ]


def write(
    files: dict[str, bytes], folder: Path, settings: ShardSettings = SETTINGS
) -> tuple[ShardPlan, ShardRecord]:
    folder.mkdir(exist_ok=True)
    (plan,) = plan_shards(images_of(files), settings)
    return plan, write_shard(plan, lambda image: files[image.source], str(folder))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {path: data for path, (data, _) in (good_files() | bad_files()).items()}


@pytest.fixture(scope="module")
def written(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShardRecord]:
    folder = tmp_path_factory.mktemp("shard")
    return folder, write(files, folder)[1]


def test_tarfile_reads_a_shard(written: tuple[Path, ShardRecord]) -> None:
    folder, record = written
    with tarfile.open(folder / "000000.tar") as tar:
        members = tar.getmembers()
        keys = [member.name.removesuffix(".jpg") for member in members if member.name.endswith(".jpg")]
        assert [member.name for member in members] == [
            f"{key}.{end}" for key in keys for end in ("jpg", "json")
        ]
        assert keys == [f"000000-{number:05d}" for number in range(record.num_samples)]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
        for member in members[::2]:
            jpeg = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
            text = tar.extractfile(member.name.replace(".jpg", ".json")).read()  # pyright: ignore[reportOptionalMemberAccess]
            description = json.loads(text)
            assert set(description) == {
                *("label", "source", "sha256", "phash"),
                *("width", "height", "original_width", "original_height"),
            }
            assert hashlib.sha256(jpeg).hexdigest() == description["sha256"]
            image = decode_image(jpeg)
            assert image.rgb.shape == (description["height"], description["width"], 3)
            assert min(image.rgb.shape[:2]) == 32
            assert (description["original_width"], description["original_height"]) in ((64, 48), (48, 64))


def test_webdataset_reads_a_shard(written: tuple[Path, ShardRecord]) -> None:
    folder, record = written
    dataset: Any = WebDataset(str(folder / "000000.tar"), shardshuffle=False).decode("rgb8")
    samples = list(dataset)
    assert len(samples) == record.num_samples
    assert {sample["json"]["source"] for sample in samples} == set(good_files())
    assert all(sample["jpg"].shape[2] == 3 for sample in samples)


def test_every_input_is_a_sample_or_a_failure(written: tuple[Path, ShardRecord]) -> None:
    _, record = written
    assert record.num_samples == len(good_files())
    assert {failure.source: failure.reason for failure in record.failures} == {
        path: reason for path, (_, reason) in bad_files().items()
    }
    assert sum(record.labels.values()) == record.num_samples


def test_the_index_finds_every_sample(written: tuple[Path, ShardRecord]) -> None:
    folder, record = written
    table = pq.read_table(folder / "000000.parquet")
    assert table.column_names == [
        "key",
        "label",
        "offset",
        "size",
        "width",
        "height",
        "sha256",
        "phash",
        "source",
    ]
    data = (folder / "000000.tar").read_bytes()
    for row in table.to_pylist():
        jpeg = data[row["offset"] : row["offset"] + row["size"]]
        assert hashlib.sha256(jpeg).hexdigest() == row["sha256"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (record.num_bytes, record.sha256)
    assert read_record("000000", (folder / "000000.parquet").read_bytes()) == record


def test_transparent_pictures_lie_on_white(tmp_path: Path) -> None:
    write({"a/rgba.png": good_files()["alpha/rgba.png"][0]}, tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        jpeg = tar.extractfile("000000-00000.jpg").read()  # pyright: ignore[reportOptionalMemberAccess]
    rgb = decode_image(jpeg).rgb
    assert (rgb[:, -8:] > 245).all()
    assert np.abs(rgb[4, 4].astype(int) - (255, 0, 0)).max() < 10


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    """Small files of every kind, sharded with `keep_bytes` at a size that some of them fit into."""
    gps = Image.Exif()
    gps[0x8825] = {1: "N", 2: (47.0, 22.0, 0.0)}
    files = {
        "taken/baseline.jpg": encoded(picture(), "JPEG", quality=60),
        "taken/comment.jpg": encoded(picture(seed=1), "JPEG", comment=b"a boat", progressive=True),
        "taken/exif.jpg": encoded(picture(seed=2), "JPEG", exif=gps),
        "taken/gray.jpg": encoded(picture(seed=3).convert("L"), "JPEG"),
        "taken/small.jpg": encoded(picture(30, 20), "JPEG"),
        "taken/upright.jpg": turned(1),
        "remade/cmyk.jpg": good_files()["colours/cmyk.jpg"][0],
        "remade/large.jpg": encoded(picture(100, 49), "JPEG"),
        "remade/more_behind.jpg": encoded(picture(), "JPEG") + b"a film",
        "remade/png.jpg": encoded(picture(), "PNG"),
        "remade/profile.jpg": good_files()["colours/swapped_profile.jpg"][0],
        "remade/turned.jpg": turned(6),
        "refused/cut.jpg": bad_files()["broken/cut.jpg"][0],
    }
    folder = tmp_path_factory.mktemp("kept")
    write(files, folder, ShardSettings(role="style", image_size=48, keep_bytes=True))
    return files, folder


def test_only_what_needs_no_change_is_kept(kept: tuple[dict[str, bytes], Path]) -> None:
    files, folder = kept
    data = (folder / "000000.tar").read_bytes()
    rows = pq.read_table(folder / "000000.parquet").to_pylist()
    assert sorted(row["source"] for row in rows) == [path for path in sorted(files) if "refused" not in path]
    for row in rows:
        stored = data[row["offset"] : row["offset"] + row["size"]]
        assert (stored == files[row["source"]]) == row["source"].startswith("taken/"), row["source"]
        assert row["sha256"] == hashlib.sha256(stored).hexdigest()
        if stored == files[row["source"]]:
            assert row["phash"] == difference_hash(decode_image(stored).rgb)
        assert b"a film" not in stored


def test_a_corpus_reads_kept_files_as_they_look(kept: tuple[dict[str, bytes], Path], tmp_path: Path) -> None:
    files, folder = kept
    shutil.copytree(folder, tmp_path / "shards")
    record = read_record("000000", (folder / "000000.parquet").read_bytes())
    corpus = Corpus.open(corpus_of([record], tmp_path, role="style", image_size=48))
    for row in range(len(corpus)):
        sample = corpus.sample(row)
        seen, wanted = corpus.decode(row), decode_image(files[sample.source]).rgb
        assert seen.shape == (sample.height, sample.width, 3)
        if sample.source.startswith("taken/"):
            assert np.abs(seen.astype(int) - wanted).max() <= 1, sample.source


def test_the_images_read_ahead_are_bounded_in_bytes(tmp_path: Path) -> None:
    """Not a picture each, and as large as all that may be read ahead: never two at once."""
    num_bytes = MAX_BYTES_AHEAD // 2 + 1
    under_way: set[str] = set()
    most = 0

    def read(image: SourceImage) -> bytes:
        nonlocal most
        under_way.add(image.source)
        most = max(most, len(under_way))
        return bytes(num_bytes)

    def prepare(data: bytes, settings: ShardSettings, limits: ImageLimits) -> PreparedImage:
        under_way.pop()
        return prepare_image(data, settings, limits)

    images = [SourceImage(source=str(number), label="", num_bytes=num_bytes) for number in range(4)]
    (plan,) = plan_shards(images, SETTINGS)
    record = write_shard(plan, read, str(tmp_path), prepare=prepare)
    assert len(record.failures) == 4
    assert most == 1


def test_equal_inputs_give_equal_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    backwards = dict(reversed(list(files.items())))
    for number, given in enumerate((files, backwards)):
        write(given, tmp_path / str(number))
    for name in ("000000.tar", "000000.parquet"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_a_file_that_vanishes_is_a_failure_and_a_broken_storage_is_not(tmp_path: Path) -> None:
    files = {"a/1.jpg": encoded(picture(), "JPEG"), "a/2.jpg": encoded(picture(seed=1), "JPEG")}
    (plan,) = plan_shards(images_of(files), SETTINGS)

    def vanished(image: SourceImage) -> bytes:
        if image.source == "a/2.jpg":
            raise FileNotFoundError(image.source)
        return files[image.source]

    record = write_shard(plan, vanished, str(tmp_path))
    assert [(failure.source, failure.reason) for failure in record.failures] == [("a/2.jpg", "unreadable")]
    with pytest.raises(ConnectionResetError):
        write_shard(plan, lambda image: (_ for _ in ()).throw(ConnectionResetError("gone")), str(tmp_path))
    grown = write_shard(plan, lambda image: files[image.source] + b"more", str(tmp_path))
    assert [failure.reason for failure in grown.failures] == ["unreadable"] * 2


def test_only_our_indexes_are_taken_for_ours() -> None:
    assert index_metadata(b"no parquet") is None
    assert index_metadata(b"") is None
    foreign = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(_foreign_parquet())), foreign)
    assert index_metadata(foreign.getvalue()) is None


def _foreign_parquet() -> bytes:
    import pyarrow as pa

    sink = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://example.org/a.jpg"]}), sink)
    return sink.getvalue()


def sources(count: int, num_labels: int = 3) -> list[SourceImage]:
    return [
        SourceImage(source=f"{number % num_labels}/{number}.jpg", label=str(number % num_labels), num_bytes=1)
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "num_shards"), [(0, 0), (1, 1), (64, 1), (65, 2), (300, 5), (5_000, 8), (100_000, 19)]
)
def test_plans_are_balanced_and_complete(count: int, num_shards: int) -> None:
    plans = plan_shards(sources(count), ShardSettings(role="content"), first_number=7)
    assert len(plans) == num_shards
    assert [plan.number for plan in plans] == list(range(7, 7 + num_shards))
    planned = [image for plan in plans for image in plan.images]
    assert sorted(image.source for image in planned) == sorted(image.source for image in sources(count))
    assert [image.label for image in planned] == sorted(image.label for image in planned)
    if plans:
        sizes = {len(plan.images) for plan in plans}
        assert max(sizes) - min(sizes) <= 1


def test_a_smaller_cap_makes_more_shards() -> None:
    def count(shard_mb: int) -> int:
        return len(plan_shards(sources(5_000), ShardSettings(role="style", shard_mb=shard_mb)))

    assert count(256) < count(16) < count(4)


def test_a_plan_is_known_by_what_its_bytes_depend_on() -> None:
    def digest(images: list[SourceImage], image_size: int = 288) -> str:
        return plan_shards(images, ShardSettings(role="style", image_size=image_size))[0].digest()

    assert digest(sources(9)) == digest(list(reversed(sources(9))))
    assert len({digest(sources(9)), digest(sources(8)), digest(sources(9), image_size=64)}) == 3


@pytest.mark.parametrize("wrong", [{"role": "both"}, {"image_size": 3}, {"shard_mb": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        ShardSettings(**({"role": "style"} | wrong))  # pyright: ignore[reportArgumentType]
