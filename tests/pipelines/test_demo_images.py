"""The demo's photographs: real ones, credited, the same every time, and some kept out of the training."""

from __future__ import annotations

import socket
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import demo_images
from pipelines.demo_images import CREDITS_NAME, PHOTOGRAPHS, View, write_photographs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[View]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, write_photographs(folder)


def test_views_for_training_and_whole_photographs_for_the_end(written: tuple[Path, list[View]]) -> None:
    folder, views = written
    training = {path.name for path in (folder / "photos").iterdir()}
    whole = {path.name for path in (folder / "evaluation").iterdir()}
    assert 30 <= len(training) <= 80
    assert whole == {"china.jpg", "chelsea.jpg"}
    assert {view.path.name for view in views} == training | whole
    assert not any(name.startswith(("china", "chelsea")) for name in training)


def test_every_view_is_a_colour_photograph_of_its_box(written: tuple[Path, list[View]]) -> None:
    for view in written[1]:
        left, top, right, bottom = view.box
        with Image.open(view.path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (right - left, bottom - top))
            assert min(image.size) >= 288
            pixels = np.asarray(image, np.float32)
        assert left >= 0, view.path
        assert top >= 0, view.path
        assert np.ptp(pixels, axis=2).mean() > 5, f"{view.path.name} has no colour"
        assert pixels[-1].any(), f"{view.path.name} reaches beyond its photograph"


def test_no_two_views_of_a_photograph_show_nearly_the_same(written: tuple[Path, list[View]]) -> None:
    for one, other in combinations(written[1], 2):
        if one.photograph is other.photograph:
            assert overlap(one.box, other.box) < 0.8, (one.path.name, other.path.name)


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Shared area over joint area, 0 to 1."""
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return shared / (area_a + area_b - shared)


def test_the_credits_name_every_photograph_with_author_and_licence(written: tuple[Path, list[View]]) -> None:
    text = (written[0] / CREDITS_NAME).read_text(encoding="utf-8")
    for photograph in PHOTOGRAPHS:
        for said in (photograph.title, photograph.author, photograph.licence, photograph.source):
            assert said, photograph.name
            assert said in text


def test_written_again_without_a_network_the_bytes_are_the_same(
    written: tuple[Path, list[View]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the photographs must not come from the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    again = write_photographs(tmp_path)
    assert [view.path.read_bytes() for view in again] == [view.path.read_bytes() for view in written[1]]


@pytest.mark.parametrize("missing", [{"package": "no_such_package"}, {"path": "data/no_such_picture.png"}])
def test_a_missing_photograph_is_named_with_its_remedy(
    missing: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_images, "PHOTOGRAPHS", (replace(PHOTOGRAPHS[0], **missing),))
    with pytest.raises(ValueError, match=r"no_such_.*pip install 'nst\[demo\]'"):
        write_photographs(tmp_path)
