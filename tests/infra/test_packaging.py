"""What travels with a job, and what does not."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from infra import packaging


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_package_has_the_code_and_no_data_caches_or_secrets(tmp_path: Path) -> None:
    make_files(
        tmp_path,
        "labels.csv",
        "inputs/list.txt",
        ".git/config",
        ".env",
        ".nst/mlflow.db",
        ".venv-s3/bin/python",
        "nst-demo/photo.jpg",
        "corpora/style/corpus.json",
        "corpora/style/shards/000000.tar",
        "runs/first/run.json",
        "painted/_nst/run.json",
        "painted/cat.jpg",
        "inputs/__pycache__/x.pyc",
        "server.pem",
        "trial.env",
        "infra/deploy/secrets/ray_token",
        "nst.egg-info/PKG-INFO",
    )
    names = set(packaging.files_to_pack(str(tmp_path)))
    assert {name for name in names if not name.startswith(packaging.OUR_PACKAGES)} == {
        "labels.csv",
        "inputs/list.txt",
    }
    assert {"nst/__init__.py", "infra/jobs.py", "pipelines/cli.py"} <= names  # none there, so ours travel
    assert not any("/secrets/" in name for name in names)


def test_a_folder_with_our_packages_sends_its_own(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"{package}/__init__.py" for package in packaging.OUR_PACKAGES))
    files = packaging.files_to_pack(str(tmp_path))
    assert sorted(files) == ["infra/__init__.py", "nst/__init__.py", "pipelines/__init__.py"]


def test_the_same_files_give_the_same_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_files(source, "b.txt", "a/c.txt")
    first = packaging.pack(str(source), tmp_path / "1.zip")
    os.utime(source / "b.txt", (1, 1))
    second = packaging.pack(str(source), tmp_path / "2.zip")
    assert first == second
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    assert zipfile.ZipFile(tmp_path / "1.zip").read("a/c.txt") == b"a/c.txt"
    (source / "b.txt").write_text("other")
    assert packaging.pack(str(source), tmp_path / "3.zip") != first


def test_too_much_is_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "photos.tar").open("wb") as file:
        file.truncate(packaging.MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"photos\.tar \(64\.0 MiB\)"):
        packaging.files_to_pack(str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        packaging.files_to_pack(str(tmp_path / "nowhere"))
