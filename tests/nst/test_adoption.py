"""Tars of other programs become corpora as they are; what is wrong with them is said."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from webdataset.writer import ShardWriter

from nst.adoption import UnusableTar, adopt_tar
from nst.shards import read_record
from tests.bad_images import encoded, picture


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    index = adopt_tar(str(path), path.name).index
    rows = {row["key"]: row for row in pq.read_table(io.BytesIO(index)).to_pylist()}
    data = path.read_bytes()
    for row in rows.values():
        payload = data[row["offset"] : row["offset"] + row["size"]]
        assert payload.startswith((b"\xff\xd8", b"\x89PNG", b"RIFF"))
    return rows


def test_what_shard_writer_writes(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%06d.tar"), maxcount=100, verbose=0) as writer:
        writer.write({"__key__": "a", "jpg": encoded(picture(), "JPEG"), "cls": 3})
        writer.write({"__key__": "b/c", "png": encoded(picture(40, 60), "PNG"), "json": {"label": "monet"}})
        writer.write({"__key__": "b/d", "webp": encoded(picture(), "WEBP"), "txt": "a boat"})
    rows = rows_of(tmp_path / "000000.tar")
    assert {key: row["label"] for key, row in rows.items()} == {"a": "3", "b/c": "monet", "b/d": "b"}
    assert (rows["b/c"]["width"], rows["b/c"]["height"]) == (40, 60)


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            url = f"http://example.org/{number}.jpg"
            for ending, data in (
                ("jpg", encoded(picture(seed=number), "JPEG")),
                ("txt", b"a caption"),
                ("json", json.dumps({"key": f"{number:09d}", "url": url, "status": "success"}).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    rows = rows_of(path)
    assert [row["source"] for row in rows.values()] == [
        f"http://example.org/{number}.jpg" for number in range(3)
    ]
    assert {row["label"] for row in rows.values()} == {"unlabelled"}


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
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    record = read_record("x", adopt_tar(str(path), "shards/x.tar").index)
    assert record.num_samples == 1
    assert {failure.source: failure.reason for failure in record.failures} == {
        "shards/x.tar:bad": "not_an_image",
        "shards/x.tar:cut": "truncated",
        "shards/x.tar:text": "no_image",
        "shards/x.tar:link": "unsupported",
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
