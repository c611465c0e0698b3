"""Many pictures through one model at once: each has its own report, and little is held at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra import storage
from infra.storage import ObjectInfo
from pipelines import workshop as workshop_module
from pipelines.stylize_plan import Item, single_looks
from pipelines.stylize_worker import StylizeSettings, decode, stylizer_of
from pipelines.workshop import Workshop
from tests.bad_images import encoded, picture
from tests.checkpoints import tiny_checkpoint

(LOOK,) = single_looks(["style"], ["d"])
SETTINGS = StylizeSettings(format="png")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two sizes, with one that is none, one with alpha, and one that is gone."""
    folder = tmp_path_factory.mktemp("in")
    for number in range(12):
        size = (48, 32) if number % 3 else (40, 40)
        (folder / f"{number:02d}.png").write_bytes(encoded(picture(*size, seed=number), "PNG"))
    (folder / "03.png").write_bytes(b"no picture")
    picture(48, 32).convert("RGBA").resize((50, 30)).save(folder / "alpha.png")
    return folder


def items(source: Path) -> list[Item]:
    found = [*storage.list_objects(str(source))]
    found.append(ObjectInfo(uri=str(source / "gone.png"), key="gone.png", num_bytes=5, etag=""))
    huge = ObjectInfo(uri=str(source / "huge.png"), key="huge.png", num_bytes=1 << 40, etag="")
    return [Item(source=one, look=LOOK, output=one.key) for one in [*found, huge]]


@pytest.fixture
def workshop(source: Path, tmp_path: Path) -> Iterator[Workshop]:
    stylizer = stylizer_of(tiny_checkpoint(tmp_path / "model"), SETTINGS)
    opened = Workshop(
        stylizer,
        lambda _: np.asarray(picture(64, 48, seed=50)),
        SETTINGS,
        source_uri=str(source),
        out_uri=str(tmp_path / "out"),
        num_threads=1,
    )
    yield opened
    opened.close()


@pytest.mark.parametrize("max_in_a_batch", [1, 3])
def test_each_item_has_its_report(
    workshop: Workshop, source: Path, tmp_path: Path, max_in_a_batch: int
) -> None:
    workshop._max_in_a_batch = max_in_a_batch  # as on a GPU
    todo = items(source)
    reports = workshop.do(todo)
    reasons = {item.source.key: report.reason for item, report in zip(todo, reports, strict=True)}
    failures = {"03.png": "not_an_image", "gone.png": "storage", "huge.png": "too_many_bytes"}
    assert {key: reason for key, reason in reasons.items() if reason} == failures
    stylizer, code = workshop._stylizer, workshop._code(LOOK)
    for item, report in zip(todo, reports, strict=True):
        if not report.reason:
            before, _ = decode(Path(item.source.uri).read_bytes(), SETTINGS)
            with Image.open(tmp_path / "out" / item.output) as image:
                after = np.asarray(image)
            assert (report.width, report.height) == (before.shape[1], before.shape[0])
            assert np.abs(after.astype(int) - stylizer(before, code)).max() <= (
                0 if max_in_a_batch == 1 else 1
            )


def test_little_is_held_at_a_time(workshop: Workshop, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks at once, with room for two small pictures, and none of the larger ones."""
    room = workshop_module._Room(3_500)
    monkeypatch.setattr(workshop, "_room", room)
    most, lock, original = 0, threading.Lock(), room.take

    def take(num: int) -> None:
        nonlocal most
        original(num)
        with lock:
            most = max(most, room._all - room._free)

    monkeypatch.setattr(room, "take", take)
    larger = source / "larger.png"
    larger.write_bytes(encoded(picture(100, 80), "PNG"))
    todo = items(source)
    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(sum(not one.reason for one in workshop.do(todo))), daemon=True
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    larger.unlink()
    assert found == [13, 13]
    assert most == 8_000, "the larger one alone"
    assert room._free == room._all
