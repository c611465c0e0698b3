"""Checkpoints in a store: complete or absent, verified, the newest few and the best kept; uploads that a slow
or refusing store does not stop."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from infra import storage
from pipelines import checkpoint_upload
from pipelines.checkpoint_store import CheckpointStore, Damaged
from pipelines.checkpoint_upload import CheckpointUpload
from pipelines.console import StageFailed

FILES = ("config.json", "model.safetensors", "state.json", "training.safetensors")


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "folder":
        return CheckpointStore(str(tmp_path / "checkpoints"))
    return CheckpointStore(f"{request.getfixturevalue('s3').create_bucket()}/first/checkpoints")


def written(folder: Path, content: str) -> str:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(f"{name} {content}")
    (folder / ".in-use").touch()  # as in every scratch folder
    return str(folder)


def publish(store: CheckpointStore, tmp_path: Path, *checkpoints: tuple[int, float | None]) -> None:
    for num_images, score in checkpoints:
        store.publish(written(tmp_path / "written" / str(num_images), str(num_images)), num_images, score)


def fresh(tmp_path: Path, name: str = "fetched") -> str:
    folder = tmp_path / name
    folder.mkdir()
    return str(folder)


def names_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_what_comes_back_is_what_was_written(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.fetch_newest(fresh(tmp_path, "empty")) is None
    publish(store, tmp_path, (16, None), (32, 0.5))
    folder = fresh(tmp_path)
    newest = store.fetch_newest(folder)
    assert newest is not None
    assert (newest.num_images_seen, newest.score) == (32, 0.5)
    assert names_in(folder) == sorted(FILES)
    assert (Path(folder) / "state.json").read_text() == "state.json 32"


def test_the_newest_few_and_the_best_are_kept(store: CheckpointStore, tmp_path: Path) -> None:
    publish(store, tmp_path, (16, 0.9), (32, 0.1), (48, 0.8), (64, None), (80, 0.7), (96, 0.6))
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [96, 80, 64, 32]
    best = store.best()
    assert best is not None
    assert best.num_images_seen == 32
    left = {found.key.partition("/")[0] for found in storage.list_objects(store.uri)}
    assert left == {"000000000032", "000000000064", "000000000080", "000000000096"}


@pytest.mark.parametrize("damage", ["altered", "cut", "missing", "checksums"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    store: CheckpointStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, tmp_path, (16, None), (32, None))
    victim = storage.join(store.uri, "000000000032", "training.safetensors")
    if damage == "missing":
        storage.delete(victim)
    elif damage == "checksums":
        storage.write_bytes(storage.join(store.uri, "000000000032", "checksums.json"), b'{"name": "0000')
    else:
        data = storage.read_bytes(victim)
        storage.write_bytes(victim, data[:-1] if damage == "cut" else b"x" + data[1:])
    folder = fresh(tmp_path)
    newest = store.fetch_newest(folder)
    assert newest is not None
    assert newest.num_images_seen == 16
    assert (Path(folder) / "training.safetensors").read_text() == "training.safetensors 16"
    assert "000000000032" in caplog.text
    # the training comes by again and replaces it
    store.publish(written(tmp_path / "again", "32"), 32, None)
    newest = store.fetch_newest(fresh(tmp_path, "mended"))
    assert newest is not None
    assert newest.num_images_seen == 32


def test_nobody_begins_anew_where_all_are_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (16, None))
    (tmp_path / "checkpoints/000000000016/model.safetensors").write_text("other")
    with pytest.raises(StageFailed, match=r"every checkpoint in .* is damaged"):
        store.fetch_newest(fresh(tmp_path))
    with pytest.raises(Damaged, match=r"model\.safetensors has other bytes"):
        store.fetch("000000000016", fresh(tmp_path, "chosen"))


def test_an_interrupted_write_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (16, None))

    def fail(*_: object, **__: object) -> None:
        raise OSError("the store went away")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", fail)
        with pytest.raises(OSError, match="went away"):
            store.publish(written(tmp_path / "second", "32"), 32, None)
    assert len(names_in(str(tmp_path / "checkpoints/000000000032"))) == len(FILES)
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [16]


def forge(folder: Path, **changes: object) -> None:
    path = folder / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": {"config.json": "0" * 64, "../../outside.json": "0" * 64}},
        {"sha256": {"config.json": "0" * 64, "/etc/passwd": "0" * 64}},
        {"sha256": {}},
        {"sha256": ["config.json"]},
        {"sha256": {"config.json": "0"}},
        {"name": "../elsewhere"},
        {"num_images_seen": None},
        {"num_images_seen": 17},
        {"score": "good"},
    ],
)
def test_who_can_write_to_the_store_does_not_choose_our_files(tmp_path: Path, changes: dict) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (8, None), (16, None))
    forge(tmp_path / "checkpoints/000000000016", **changes)
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [8]
    with pytest.raises(Damaged, match=r"checksums\.json"):
        store.fetch("000000000016", fresh(tmp_path))
    store.publish(written(tmp_path / "later", "24"), 24, None)  # is not stopped by it


def test_a_copy_under_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (16, None))
    shutil.copytree(tmp_path / "checkpoints/000000000016", tmp_path / "checkpoints/kept")
    assert [checkpoint.name for checkpoint in store.stored()] == ["000000000016"]


def test_damaged_ones_do_not_count_as_progress(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (16, None), (32, None))
    (tmp_path / "checkpoints/000000000032/model.safetensors").write_text("other")
    store.fetch_newest(fresh(tmp_path))
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [16]


def test_what_killed_uploads_left_is_tidied_away(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "checkpoints"))
    publish(store, tmp_path, (16, None))
    written(tmp_path / "checkpoints/000000000024", "half")
    publish(store, tmp_path, (32, None))
    assert names_in(str(tmp_path / "checkpoints/000000000024")) in ([], [".in-use"])


class SlowStore(CheckpointStore):
    """Takes a checkpoint only when told to; refuses the first `num_refusals`."""

    def __init__(self, uri: str, num_refusals: int = 0) -> None:
        super().__init__(uri)
        self.may_go_on, self.num_refusals = threading.Event(), num_refusals

    def publish(self, folder: str, num_images_seen: int, score: float | None):
        assert self.may_go_on.wait(20)
        if self.num_refusals > 0:
            self.num_refusals -= 1
            raise OSError("slow down")
        return super().publish(folder, num_images_seen, score)


def submit(upload: CheckpointUpload, num_images: int) -> None:
    def write(folder: str) -> None:
        for name in FILES:
            (Path(folder) / name).write_text(f"{name} {num_images}")

    upload.submit(write, num_images, None)


def test_a_slow_store_holds_nothing_up_and_gets_the_newest(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path / "checkpoints"))
    upload = CheckpointUpload(store)
    submit(upload, 16)
    while upload._waiting is not None:  # until the thread has taken the first
        threading.Event().wait(0.01)
    submit(upload, 32)
    submit(upload, 48)  # takes the place of 32
    assert not upload.flush(0.1)
    store.may_go_on.set()
    assert upload.flush(20)
    upload.close()
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [48, 16]


def test_a_refusal_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_upload, "SECONDS_BETWEEN_TRIES", 0.05)
    store = SlowStore(str(tmp_path / "checkpoints"), num_refusals=3)
    store.may_go_on.set()
    upload = CheckpointUpload(store)
    submit(upload, 16)
    assert upload.flush(20)
    upload.close()
    assert [checkpoint.num_images_seen for checkpoint in store.stored()] == [16]


def test_a_store_that_refuses_for_too_long_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_upload, "SECONDS_BETWEEN_TRIES", 0.05)
    monkeypatch.setattr(checkpoint_upload, "SECONDS_WITHOUT_STORE", 0.2)
    store = SlowStore(str(tmp_path / "checkpoints"), num_refusals=10**6)
    store.may_go_on.set()
    upload = CheckpointUpload(store)
    submit(upload, 16)
    with pytest.raises(OSError, match=r"checkpoints do not reach .*: slow down"):
        upload.flush(20)
    with pytest.raises(OSError, match=r"checkpoints do not reach .*: slow down"):
        submit(upload, 32)
    upload.close()
