"""What the Ray tasks of `nst shard` do with inputs that are repeated, broken, or kill the worker."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from infra import cluster
from nst.images import encode_jpeg
from nst.near_duplicates import MAX_DISTANCE
from nst.planning import SourceImage
from pipelines.shard_tasks import hash_some
from tests.bad_images import bad_files, encoded
from tests.corpora import photographs, pieces

# Read by every Python that starts with its folder on the path: a decoder that one picture crashes.
CRASHING_DECODER = """
import os, signal
from PIL import JpegImagePlugin

load = JpegImagePlugin.JpegImageFile.load
def load_or_crash(self):
    if self.info.get("comment") == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    return load(self)
JpegImagePlugin.JpegImageFile.load = load_or_crash
"""


def test_inputs_are_hashed(ray_here: None, tmp_path: Path) -> None:
    china = Image.fromarray(photographs()[0])
    files = {
        "china.jpg": encoded(china, "JPEG"),
        "copy.png": encoded(china.resize((320, 213)), "PNG"),
        "cut.jpg": bad_files()["broken/cut.jpg"][0],
        "flat.png": encoded(Image.new("RGB", (64, 64), (90, 90, 200)), "PNG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    images = [SourceImage(source=name, label="", num_bytes=len(data)) for name, data in files.items()]
    images += [
        SourceImage(source="gone.jpg", label="", num_bytes=1),
        SourceImage(source="china.jpg", label="", num_bytes=1 << 40),
    ]
    rows = ray.get(hash_some.remote(images, str(tmp_path), True))
    digests = [hashlib.sha256(data).hexdigest() for data in files.values()]
    assert [row[:2] for row in rows] == [
        *zip(files, digests, strict=True),
        ("gone.jpg", None),
        ("china.jpg", None),
    ]
    (_, _, china_look), (_, _, copy_look), *others = rows
    assert china_look is not None
    assert copy_look is not None
    assert (china_look ^ copy_look).bit_count() <= MAX_DISTANCE
    assert [look for *_, look in others] == [None] * 4
    assert [row[2] for row in ray.get(hash_some.remote(images[:2], str(tmp_path), False))] == [None, None]


@pytest.mark.faults
def test_a_picture_that_kills_the_worker_is_one_failure(tmp_path: Path) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(CRASHING_DECODER)
    (tmp_path / "source").mkdir()
    for number, piece in enumerate(pieces()["flower"][:6]):
        (tmp_path / f"source/{number}.jpg").write_bytes(encode_jpeg(piece))
    killer = encoded(Image.fromarray(pieces()["flower"][7]), "JPEG", comment=b"crash")
    (tmp_path / "source/killer.jpg").write_bytes(killer)
    command = [sys.executable, "-m", "pipelines.shard_corpus", str(tmp_path / "source")]
    command += [str(tmp_path / "corpus"), "--role", "content", "--size", "64", "--dedupe", "near", "--json"]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "hooks")},
        cwd=cluster.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (
        json.loads(run.stdout.splitlines()[-1])["num_samples"] == 6
    )  # Ray has a word of its own on the death
    failures = pq.read_table(tmp_path / "corpus/failures.parquet").to_pylist()
    assert [(failure["source"], failure["reason"]) for failure in failures] == [("killer.jpg", "crash")]
