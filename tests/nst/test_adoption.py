"""Other programs read our tars; theirs become corpora as they are, and what is wrong with them is said."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from nst.adoption import UnusableTar, adopt_tar
from nst.corpus import Corpus
from nst.shards import read_record
from tests.bad_images import encoded, picture
from tests.corpora import make_corpus


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def failures_of(path: Path) -> dict[str, str]:
    record = read_record(path.stem, adopt_tar(str(path), path.name).index)
    assert all(failure.detail for failure in record.failures)
    return {failure.source.removeprefix(f"{path.name}:"): failure.reason for failure in record.failures}


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    index = adopt_tar(str(path), path.name).index
    rows = {row["key"]: row for row in pq.read_table(io.BytesIO(index)).to_pylist()}
    data = path.read_bytes()
    for row in rows.values():
        payload = data[row["offset"] : row["offset"] + row["size"]]
        assert payload.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))
    return rows


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_corpus(tmp_path_factory.mktemp("ours"), "style", side=48, per_label=20))


@pytest.mark.parametrize("reader", ["webdataset", "tar", "tarfile"])
def test_others_read_all_of_ours(ours: Path, tmp_path: Path, reader: str) -> None:
    corpus = Corpus.open(str(ours))
    samples = [corpus.sample(row) for row in range(len(corpus))]
    expected = {sample.key: corpus.read(row) for row, sample in enumerate(samples)}
    tars = [str(ours / shard.tar) for shard in corpus.manifest.shards]
    assert (len(expected), len(tars)) == (80, 2)
    found: dict[str, bytes] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    if reader == "webdataset":
        for sample in WebDataset(tars, shardshuffle=False):
            found[sample["__key__"]] = sample["jpg"]
            descriptions[sample["__key__"]] = json.loads(sample["json"])
    elif reader == "tar":
        for tar in tars:
            subprocess.run(["tar", "xf", tar, "-C", tmp_path], check=True, timeout=30)
        found = {path.stem: path.read_bytes() for path in tmp_path.glob("*.jpg")}
        descriptions = {path.stem: json.loads(path.read_bytes()) for path in tmp_path.glob("*.json")}
    else:
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    data = tar.extractfile(member)
                    assert data is not None
                    key, _, ending = member.name.partition(".")
                    if ending == "jpg":
                        found[key] = data.read()
                    else:
                        descriptions[key] = json.load(data)
    assert found == expected
    assert descriptions.keys() == expected.keys()
    for sample in samples:
        described = descriptions[sample.key]
        assert (described["label"], described["source"]) == (sample.label, sample.source)
        assert (described["width"], described["height"]) == (sample.width, sample.height)


def test_what_shard_writer_writes(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%06d.tar"), maxcount=100, verbose=0) as writer:
        writer.write({"__key__": "a", "jpg": encoded(picture(), "JPEG"), "cls": 3})
        writer.write({"__key__": "b/c", "png": encoded(picture(40, 60), "PNG"), "json": {"label": "monet"}})
        writer.write({"__key__": "b/d", "webp": encoded(picture(), "WEBP"), "txt": "a boat"})
    rows = rows_of(tmp_path / "000000.tar")
    assert {key: row["label"] for key, row in rows.items()} == {"a": "3", "b/c": "monet", "b/d": "b"}
    assert (rows["b/c"]["width"], rows["b/c"]["height"]) == (40, 60)


def test_what_plain_tar_writes_of_a_folder(tmp_path: Path) -> None:
    for place in ("monet/a.jpg", "monet/b.JPEG", "hokusai/with.dots.jpg", "top.png"):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / place).write_bytes(encoded(picture(), "PNG" if place.endswith("png") else "JPEG"))
    (tmp_path / "in/README").write_text("about")
    subprocess.run(
        ["tar", "cf", str(tmp_path / "all.tar"), "-C", str(tmp_path / "in"), "."], check=True, timeout=30
    )
    labels = {key: row["label"] for key, row in rows_of(tmp_path / "all.tar").items()}
    assert labels == {"./monet/a": "monet", "./monet/b": "monet", "./top": "unlabelled"}
    failures = read_record("all", adopt_tar(str(tmp_path / "all.tar"), "all.tar").index).failures
    assert [(failure.source, failure.reason) for failure in failures] == [
        ("all.tar:./hokusai/with", "no_image")
    ]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    """As `tar` makes of a folder in whatever order; readers of streams split such samples."""
    path = tmp_path / "x.tar"
    names = ("b", "a", "c")
    jpegs = {name: encoded(picture(seed=number), "JPEG") for number, name in enumerate(names)}
    members = [(f"{name}.cls", f"class {name}\n".encode()) for name in names]
    members += [(f"{name}.JPG", jpegs[name]) for name in reversed(names)]
    members += [(f"{name}.json", json.dumps({"source": f"from/{name}"}).encode()) for name in names]
    write_tar(path, members)
    rows = rows_of(path)
    assert {key: (row["label"], row["source"]) for key, row in rows.items()} == {
        name: (f"class {name}", f"from/{name}") for name in names
    }
    data = path.read_bytes()
    for name, row in rows.items():
        assert data[row["offset"] : row["offset"] + row["size"]] == jpegs[name]


def test_a_key_ends_at_the_first_dot_of_the_name_as_in_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    jpeg = encoded(picture(), "JPEG")
    members = [("v1.0/a.jpg", jpeg), ("v1.0/a.seg.png", b"a mask"), ("v1.0/b.v2.jpg", jpeg)]
    write_tar(path, members)
    theirs = {
        sample["__key__"]: set(sample) - {"__key__", "__url__", "__local_path__"}
        for sample in WebDataset([str(path)], shardshuffle=False)
    }
    assert theirs == {"v1.0/a": {"jpg", "seg.png"}, "v1.0/b": {"v2.jpg"}}
    assert {key: row["label"] for key, row in rows_of(path).items()} == {"v1.0/a": "v1.0"}
    assert failures_of(path) == {"v1.0/b": "no_image"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(tmp_path: Path, format: int) -> None:
    path = tmp_path / "x.tar"
    key = "/".join(
        ["a folder with a long name"] * 8 + ["画 of a boat"]
    )  # more than the 100 bytes of a header
    if format == tarfile.USTAR_FORMAT:
        key = key.encode()[-150:].decode(errors="ignore").lstrip("/")
    jpeg = encoded(picture(), "JPEG")
    write_tar(path, [(f"{key}.jpg", jpeg), (f"{key}.cls", b"7")], format)
    (row,) = rows_of(path).values()
    assert (row["key"], row["label"]) == (key, "7")
    assert path.read_bytes()[row["offset"] : row["offset"] + row["size"]] == jpeg


def test_names_that_lead_out_or_come_twice_or_are_no_text_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    jpeg = encoded(picture(), "JPEG")
    names = ["/etc/a.jpg", "../b.jpg", "in/../../c.jpg", "./d.jpg", "e..e/f.jpg", "d/g.jpg", "d/g.jpg"]
    write_tar(path, [(name, jpeg) for name in names])
    assert set(rows_of(path)) == {"./d", "e..e/f", "d/g"}
    expected = {"/etc/a": "unsupported", "../b": "unsupported", "in/../../c": "unsupported"}
    assert failures_of(path) == expected | {"d/g": "duplicate_name"}
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("Überfahrt.jpg")
        member.size = len(jpeg)
        tar.addfile(member, io.BytesIO(jpeg))
    assert rows_of(path) == {}
    assert failures_of(path) == {"\\udcdcberfahrt": "unsupported"}


def test_texts_that_are_no_utf8_and_json_that_is_a_bomb_cost_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    jpeg = encoded(picture(), "JPEG")
    members = [("a.jpg", jpeg), ("a.json", b'{"label": "\\ud800", "source": "\\udfff"}')]
    members += [("b.jpg", jpeg), ("b.json", b"[" * 200_000), ("b.cls", b"\xff")]
    write_tar(path, members)
    rows = rows_of(path)
    assert {key: row["label"] for key, row in rows.items()} == {"a": "\\ud800", "b": "\ufffd"}
    assert rows["a"]["source"] == "\\udfff"


def test_samples_that_cannot_be_taken_are_failures(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("good.jpg", encoded(picture(), "JPEG")),
            ("good.json", b"{no json"),
            ("bad.jpg", b"no picture"),
            ("cut.jpg", encoded(picture(400, 400), "JPEG")[:-2000]),
            ("text.txt", b"only words"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("fifo", tarfile.FIFOTYPE)):
            link = tarfile.TarInfo(f"{name}.jpg")
            link.type, link.linkname = kind, "good.jpg" if kind == tarfile.LNKTYPE else "/etc/passwd"
            tar.addfile(link)
    record = read_record("x", adopt_tar(str(path), "shards/x.tar").index)
    assert record.num_samples == 1
    assert {failure.source: failure.reason for failure in record.failures} == {
        "shards/x.tar:bad": "not_an_image",
        "shards/x.tar:cut": "truncated",
        "shards/x.tar:text": "no_image",
        "shards/x.tar:link": "unsupported",
        "shards/x.tar:hard": "unsupported",
        "shards/x.tar:fifo": "unsupported",
    }


def test_a_tar_that_is_cut_is_refused_even_between_two_samples(tmp_path: Path) -> None:
    whole = tmp_path / "0.tar"
    with ShardWriter(str(tmp_path / "%d.tar"), maxcount=100, verbose=0) as writer:
        for seed in range(5):
            writer.write({"__key__": str(seed), "jpg": encoded(picture(seed=seed), "JPEG")})
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        boundary = tar.getmembers()[3].offset
    for size in (0, 100, 512, boundary, boundary + 700, len(data) - 10240):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(UnusableTar):
            adopt_tar(str(tmp_path / "cut.tar"), "cut.tar")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UnusableTar):
        adopt_tar(str(tmp_path / "text.tar"), "text.tar")


def test_a_tar_that_ends_too_early_for_tarfile_is_refused(tmp_path: Path) -> None:
    """A damaged header in the middle, and two tars in one file: tarfile itself gives fewer samples."""
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{number}.jpg", encoded(picture(seed=number), "JPEG")) for number in range(4)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmembers()[2].offset
    for damaged in (
        whole[: header + 150] + b"\xff" + whole[header + 151 :],
        whole[:header] + bytes(1024) + whole[header + 1024 :],
        whole + whole,
    ):
        path.write_bytes(damaged)
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) in (2, 4)
        with pytest.raises(UnusableTar, match="holds more behind byte"):
            adopt_tar(str(path), "x.tar")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UnusableTar, match="gzip"):
        adopt_tar(str(path), "x.tar")
