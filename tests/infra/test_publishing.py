"""Registrations that are cut off, and what a version's files are held against, on a real MLflow store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from infra import registry, tracking_server
from infra.model_files import check_files, write_manifest
from infra.publishing import MAX_DESCRIPTION_CHARACTERS
from tests.registered_models import register

pytestmark = pytest.mark.usefixtures("mlflow_store")

WRITES = (
    "create_run",
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "log_outputs",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("write", WRITES)
def test_a_registration_that_is_cut_off_leaves_no_half_version(
    write: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(MlflowClient, write)

    def cut_off(*args: object, **options: object) -> None:
        if when == "after":
            original(*args, **options)
        raise ConnectionError("the line is dead")

    name = f"cut-{write}-{when}"
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, write, cut_off)
        with pytest.raises(ConnectionError):
            register(tmp_path, "weights", name=name)
    for version in registry.list_versions(name, missing_ok=True):
        registry.download(version, tmp_path / "whole")  # raises if it is not

    version = register(tmp_path, "weights", name=name)
    assert version.aliases == ("challenger",)
    assert [known.version for known in registry.list_versions(name)] == [1]
    checkpoint = Path(registry.download(version, tmp_path / "downloaded"))
    assert (checkpoint / "model.safetensors").read_text() == "weights"


def test_more_artifacts_and_the_card_travel_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/one.txt").write_text("1")
    card = "# A model\n" + "It is like this.\n" * 400
    version = register(
        tmp_path,
        "more",
        name="more",
        artifacts={"samples": tmp_path / "samples"},
        model_config={"kind": "little"},
        card=card,
    )
    checkpoint = Path(registry.download(version, tmp_path / "downloaded"))
    assert (checkpoint.with_name("samples") / "one.txt").read_text() == "1"
    assert (checkpoint.parent.parent / "README.md").read_text() == card
    assert "kind: little" in (checkpoint.parent.parent / "MLmodel").read_text()
    description = tracking_server.client().get_model_version("more", "1").description or ""
    assert description.startswith("# A model\nIt is like this.\n")
    assert description.endswith("is like this.\n\n(The rest is in README.md, beside the model.)")
    assert len(description) <= MAX_DESCRIPTION_CHARACTERS


def test_every_file_is_held_against_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "code").mkdir(parents=True)
    for name in ("MLmodel", "code/run.py", "code/empty.py"):
        (folder / name).write_text(name if "empty" not in name else "")
    digest = write_manifest(folder)
    check_files(folder, digest)

    (folder / "code/__pycache__").mkdir()
    (folder / "code/__pycache__/run.pyc").write_text("made when it was loaded")
    (folder / "registered_model_meta").write_text("made by MLflow when it was loaded")
    check_files(folder, digest)

    def altered(change: str, reason: str) -> None:
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        path, _, text = change.partition("=")
        (other / path).write_text(text) if text else (other / path).unlink()
        with pytest.raises(OSError, match=reason):
            check_files(other, digest)
        shutil.rmtree(other)

    altered("code/run.py=changed", r"code/run\.py was altered after it was registered")
    altered("code/empty.py", r"code/empty\.py is missing")
    altered("code/torch.py=shadows", r"code/torch\.py was added after it was registered")
    altered("files.json={}", r"files\.json was altered")
    altered("files.json", r"files\.json is missing")
