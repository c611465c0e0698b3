"""What travels with a job, and what does not."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from infra import packaging

A_FEW_SECRETS = (
    "server.pem",
    "trial.env",
    "credentials.json",
    "aws_credentials",
    "inputs/Service-Account.json",
    "client_secret_12.json",
    "deploy/id_rsa",
    "deploy/id_ed25519.pub",
    "secrets.yaml",
    "infra/deploy/secrets/ray_token",
)


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
        "runs/plain/corpora.json",
        "runs/plain/checkpoint/model.safetensors",
        "kept/training.safetensors",
        "report/evaluation.json",
        "report/report.html",
        "nst.egg-info/PKG-INFO",
        *A_FEW_SECRETS,
    )
    names = set(packaging.files_to_pack(str(tmp_path)))
    assert {name for name in names if not name.startswith(packaging.OUR_PACKAGES)} == {
        "labels.csv",
        "inputs/list.txt",
    }
    assert {"nst/__init__.py", "infra/jobs.py", "pipelines/cli.py"} <= names  # none there, so ours travel
    assert not any("/secrets/" in name for name in names)


def test_in_a_work_tree_of_git_what_it_ignores_stays_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(
        tmp_path,
        *(f"{package}/__init__.py" for package in packaging.OUR_PACKAGES),
        *("new.txt", "gone.txt", "späße.txt", "scratch/large.bin", "inner/kept.txt", "inner/left.log"),
        *A_FEW_SECRETS,
    )
    (tmp_path / ".gitignore").write_text("scratch/\n")
    for folder in (tmp_path, tmp_path / "inner"):  # the inner one is a repository of its own
        subprocess.run(["git", "init", "--quiet", folder], check=True)
    (tmp_path / "inner" / ".gitignore").write_text("*.log\n")
    added = ["add", "--force", "gone.txt", *A_FEW_SECRETS]  # even these do not travel
    subprocess.run(["git", "-C", tmp_path, *added], check=True)
    (tmp_path / "gone.txt").unlink()
    code = {f"{package}/__init__.py" for package in packaging.OUR_PACKAGES}
    kept = code | {"new.txt", "späße.txt", "inner/kept.txt"}
    assert set(packaging.files_to_pack(str(tmp_path))) == kept
    # as a whole ignored, and yet asked for
    names = set(packaging.files_to_pack(str(tmp_path / "scratch")))
    assert {name for name in names if not name.startswith(packaging.OUR_PACKAGES)} == {"large.bin"}
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    patterns_alone = kept | {"scratch/large.bin", "inner/left.log"}
    assert set(packaging.files_to_pack(str(tmp_path))) == patterns_alone


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
