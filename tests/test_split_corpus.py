"""The split of a labelled corpus: nothing that is measured with was seen in training."""

import pytest

from benchmarks.split_corpus import is_held_out, split


def rows(num_works: int) -> list[dict[str, str]]:
    """Every work twice, as a whole and as a detail."""
    paths = [
        (f"{folder}/{work}_{view}.jpg", f"{folder}-{work}")
        for folder in ("content/photos", "style/monet", "style/hokusai")
        for work in range(num_works)
        for view in ("whole", "detail")
    ]
    return [{"path": path, "work_id": work_id} for path, work_id in paths]


def test_views_of_a_work_stay_on_one_side():
    given = rows(200)
    group_of_work: dict[str, set[str]] = {}
    for row, entry in zip(given, split(given, classes=("hokusai",)), strict=True):
        assert entry.path == row["path"]
        group_of_work.setdefault(row["work_id"], set()).add(entry.group)
    assert all(len(groups) == 1 for groups in group_of_work.values())


def test_a_tenth_of_the_works_and_whole_classes_are_held_out():
    entries = split(rows(500), classes=("hokusai",))
    groups = [entry.group for entry in entries]
    assert {entry.label for entry in entries if entry.group == "classes"} == {"hokusai"}
    assert groups.count("classes") == 1000
    assert 60 < groups.count("content") < 140
    assert 60 < groups.count("works") < 140
    assert all(entry.label != "hokusai" for entry in entries if entry.group == "train")


def test_a_corpus_that_grows_keeps_its_split():
    before = {entry.path: entry.group for entry in split(rows(50), classes=("hokusai",))}
    after = {entry.path: entry.group for entry in split(rows(80), classes=("hokusai",))}
    assert before.items() <= after.items()
    assert is_held_out("a work", 1.0)
    assert not is_held_out("a work", 0.0)


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no class 'hokusay'"):
        split(rows(2), classes=("hokusay",))
