"""The ablation's arithmetic: what is held out, what each variant changes, what is trained again and what is
not."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.ablation import pairs, report, summary
from benchmarks.ablation.corpora import ROLES, Corpora, make_corpora, read_pictures, split_pictures
from benchmarks.ablation.own_encoder import matrix_over_guessing, retrieval
from benchmarks.ablation.run import METRICS_FILE, Run, is_finished, plan_runs, read_metrics, train_all
from benchmarks.ablation.variants import (
    ABLATIONS,
    BASE,
    OTHERS,
    VARIANTS,
    differences,
    resolve,
    variants_named,
)
from nst.config import to_dict
from nst.images import encode_jpeg

NUM_LABELS, NUM_WORKS, NUM_PHOTOS = 8, 4, 20


@pytest.fixture(scope="module")
def pictures_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight artists with four works each, of which every second has two details, and twenty photos."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_PHOTOS):
        rows.append((f"content/photos/{number:02d}.jpg", "", "full view", f"photo{number}"))
    for label in range(NUM_LABELS):
        for work in range(NUM_WORKS):
            views = ["full view", "detail 1", "detail 2"] if work % 2 else ["full view"]
            for turn, view in enumerate(views):
                path = f"style/artist{label}/{work}_{turn}.jpg"
                rows.append((path, f"artist{label}", view, f"{label}-{work}"))
    for path, *_ in rows:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encode_jpeg(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)))
    with (folder / "LABELS.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "artist", "view", "work_id"))
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def corpora(pictures_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return make_corpora(pictures_dir, tmp_path_factory.mktemp("work") / "corpora", image_size=48)


# --- the split ---------------------------------------------------------------------------------------


def test_no_work_is_on_both_sides(pictures_dir: Path):
    pictures = read_pictures(pictures_dir)
    sets = split_pictures(pictures, seed=0)
    assert sum(len(chosen) for chosen in sets.values()) == len(pictures)
    works = {name: {picture.work_id for picture in chosen} for name, chosen in sets.items()}
    names = list(ROLES)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            assert not works[first] & works[second], (first, second)


def test_held_out_artists_are_absent_from_the_training(pictures_dir: Path):
    sets = split_pictures(read_pictures(pictures_dir), seed=0)
    trained = {picture.label for picture in sets["works"]}
    assert len({picture.label for picture in sets["unseen_artists"]}) == 4
    assert not trained & {picture.label for picture in sets["unseen_artists"]}
    # a work of every trained label is held out, and two or more are left
    assert {picture.label for picture in sets["unseen_works"]} == trained
    for label in trained:
        assert len({picture.work_id for picture in sets["works"] if picture.label == label}) >= 2
    assert len(sets["unseen_photos"]) == NUM_PHOTOS // 10


def test_the_split_follows_from_the_seed(pictures_dir: Path):
    pictures = read_pictures(pictures_dir)
    assert split_pictures(pictures, seed=1) == split_pictures(list(pictures), seed=1)
    assert split_pictures(pictures, seed=1) != split_pictures(pictures, seed=2)


def test_corpora_hold_their_sets_and_are_made_once(corpora: Corpora, pictures_dir: Path):
    sets = split_pictures(read_pictures(pictures_dir), seed=0)
    for name, role in ROLES.items():
        corpus = corpora.open(name)
        assert corpus.manifest.role == role
        sources = {corpus.sample(row).source for row in range(len(corpus))}
        assert sources == {picture.source for picture in sets[name]}
        assert corpora.counts[name]["pictures"] == len(corpus)
    times = [path.stat().st_mtime_ns for path in sorted(corpora.folder.rglob("*.tar"))]
    assert make_corpora(pictures_dir, corpora.folder, image_size=48) == corpora
    assert [path.stat().st_mtime_ns for path in sorted(corpora.folder.rglob("*.tar"))] == times
    with pytest.raises(ValueError, match="another split"):
        make_corpora(pictures_dir, corpora.folder, image_size=48, seed=5)


def test_a_folder_without_labels_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no LABELS\.csv"):
        read_pictures(tmp_path)


def test_pairs_are_of_held_out_pictures(corpora: Corpora):
    evaluation = pairs.load_evaluation(corpora, side=32, num_contents=12)
    assert evaluation.digest == pairs.load_evaluation(corpora, side=32, num_contents=12).digest
    assert evaluation.digest != pairs.load_evaluation(corpora, side=32, num_contents=12, seed=1).digest
    trained_works = {
        corpora.works[corpora.open("works").sample(row).source] for row in range(len(corpora.open("works")))
    }
    for name in (pairs.UNSEEN_WORKS, pairs.UNSEEN_ARTISTS):
        group = evaluation.groups[name]
        assert group.contents.shape == (2, 32, 32, 3)  # all that are held out
        assert not trained_works & set(group.styles.work_ids)
        assert (set(group.styles.labels) <= set(corpora.unseen_artists)) == (name == pairs.UNSEEN_ARTISTS)
    for group in evaluation.groups.values():
        assert group.same_artist.labels == group.styles.labels
        others = (group.same_artist.work_ids, group.other_artist.labels)
        for found, own in zip(others, (group.styles.work_ids, group.styles.labels), strict=True):
            assert all(one != other for one, other in zip(found, own, strict=True))
    seen = evaluation.groups[pairs.SEEN]
    assert len(seen) == 12
    assert set(seen.styles.labels) == set(evaluation.works.labels)  # labels take turns


# --- variants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ABLATIONS, ids=lambda variant: variant.name)
def test_an_ablation_differs_from_the_base_in_what_it_names(variant):
    changed = differences(resolve(BASE, 0, 1000), resolve(variant, 0, 1000))
    assert changed == set(variant.changes)
    assert len(changed) == 1


@pytest.mark.parametrize("variant", OTHERS, ids=lambda variant: variant.name)
def test_other_rows_have_the_budget_of_the_base(variant):
    base, other = resolve(BASE, 2, 1000), resolve(variant, 2, 1000)
    assert (other.batch, other.num_images, other.seed) == (base.batch, base.num_images, base.seed)
    changed = {path for path in differences(base, other) if not path.startswith(("model.", "loss."))}
    assert changed <= {"optim.success_gate"}  # the paper has none


def test_a_seed_changes_the_seed_alone():
    assert differences(resolve(BASE, 0, 1000), resolve(BASE, 1, 1000)) == {"seed"}


def test_variants_by_name():
    assert [variant.name for variant in variants_named("")] == ["base", *(one.name for one in ABLATIONS)]
    assert len(variants_named("all")) == len(VARIANTS)
    with pytest.raises(ValueError, match="no variant 'bose'"):
        variants_named("base,bose")


# --- runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeRun(Run):
    """A run that a few lines of Python stand for."""

    program: str = ""

    def command(self, corpora: Corpora) -> list[str]:
        return [sys.executable, "-c", self.program]


def write_checkpoint(run: Run, num_images: int) -> None:
    """As much of a checkpoint as tells how far a run is."""
    folder = run.folder / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"format_version": 2, "config": to_dict(run.config)}))
    (folder / "state.json").write_text(json.dumps({"num_images_seen": num_images}))


def test_seeds_come_outermost_and_other_rows_last(tmp_path: Path):
    runs = plan_runs([VARIANTS["rgan"], BASE, VARIANTS["fixed_pairs"]], [0, 1], 320, tmp_path)
    assert [run.name for run in runs] == [
        "base/seed0",
        "fixed_pairs/seed0",
        "base/seed1",
        "fixed_pairs/seed1",
        "rgan/seed0",
        "rgan/seed1",
    ]
    assert len({run.folder for run in runs}) == len(runs)


def test_a_finished_run_is_skipped(tmp_path: Path, corpora: Corpora, monkeypatch: pytest.MonkeyPatch):
    runs = plan_runs([BASE], [0], 320, tmp_path)
    assert not is_finished(runs[0])
    write_checkpoint(runs[0], 160)
    assert not is_finished(runs[0])
    write_checkpoint(runs[0], 320)
    assert is_finished(runs[0])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a finished run was started"))
    assert train_all(runs, corpora) == []


def test_an_unfinished_run_is_started_and_a_failure_does_not_stop_the_others(
    tmp_path: Path, corpora: Corpora
):
    good = FakeRun(BASE, 0, 320, tmp_path / "good", program="print('trained')")
    bad = FakeRun(BASE, 1, 320, tmp_path / "bad", program="raise SystemExit(3)")
    write_checkpoint(good, 160)
    assert train_all([bad, good], corpora) == [bad]
    assert (good.folder / "train.log").read_text() == "trained\n"
    record = json.loads((good.folder / "run.json").read_text())
    assert record["images"] == 0
    assert record["cpu_seconds"] > 0


def test_another_configuration_in_a_runs_folder_is_refused(tmp_path: Path):
    run = plan_runs([BASE], [0], 320, tmp_path)[0]
    write_checkpoint(Run(VARIANTS["fixed_pairs"], 0, 320, run.folder), 320)
    with pytest.raises(ValueError, match="another configuration"):
        is_finished(run)


def test_steps_trained_twice_count_once(tmp_path: Path):
    run = Run(BASE, 0, 320, tmp_path)
    lines = [(1, 0.5), (2, 0.4), (3, 0.3), (2, 0.45), (3, 0.35)]
    text = "".join(
        json.dumps({"step": step, "num_images_seen": 16 * step, "a": a}) + "\n" for step, a in lines
    )
    (tmp_path / METRICS_FILE).write_text(text + '{"step": 4, "num_')
    assert [(line["step"], line["a"]) for line in read_metrics(run)] == [(1, 0.5), (2, 0.45), (3, 0.35)]


# --- measures ----------------------------------------------------------------------------------------


def test_retrieval_leaves_the_own_work_out():
    pictures = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    z = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [1.0, 0.6]]), dim=1)
    works = pairs.Works(pictures, ["a", "a", "b", "b"], ["1", "2", "3", "4"])
    assert retrieval(z, works, z, works) == 0.75  # the last is nearer to those of a
    one_work = pairs.Works(pictures, ["a", "a", "b", "b"], ["1", "1", "3", "4"])
    assert retrieval(z, one_work, z, one_work) == 0.25  # two views of one work do not find each other


def test_a_collapsed_encoder_scores_as_guessing():
    labels = [label for label in "abcdefgh" for _ in range(3)]
    assert matrix_over_guessing(torch.ones(24, 4) / 2, labels) == pytest.approx(1)
    apart = torch.eye(8).repeat_interleave(3, dim=0)
    assert matrix_over_guessing(apart, labels) < 0.2
    assert math.isnan(matrix_over_guessing(torch.ones(2, 4), ["a", "b"]))


def fake_measures(shift: float) -> dict:
    values = {name: [shift, shift + 0.2] for name in (*report.QUALITY, *report.ARTEFACTS, *report.MANNER)}
    return {
        "groups": dict.fromkeys(pairs.GROUPS, values),
        "scalars": dict.fromkeys((*report.OWN_ENCODER, *report.COLLAPSE), shift),
        "cost": dict.fromkeys(
            ("trained", "generator", "cpu_seconds_per_step", "seconds_per_step", "seconds"), 2.0
        ),
    }


def test_differences_are_paired_by_seed():
    base = {seed: fake_measures(10.0 * seed) for seed in range(3)}
    worse = {seed: fake_measures(10.0 * seed + 1 + 0.1 * seed) for seed in (2, 1, 0)}
    found = summary.difference(worse, base, "unseen", "style_distance")
    assert found.mean == pytest.approx(1.1)
    assert found.high - found.mean == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert (found.num_worse, found.num, found.is_clear) == (3, 3, True)
    assert summary.difference(worse, base, "unseen", "artist_found").num_worse == 0
    alone = summary.difference({0: worse[0]}, base, "scalars", "diversity")
    assert alone.num == 1
    assert not alone.is_clear


def test_the_page_has_every_row_and_every_claim(tmp_path: Path):
    by_variant = {
        "base": {0: fake_measures(0.1), 1: fake_measures(0.2)},
        "fixed_pairs": {0: fake_measures(0.3)},
    }
    by_variant["fixed_pairs"][0]["scalars"]["guessing"] = math.nan
    baselines = {kind: fake_measures(0.5)["groups"] for kind in ("content", "style", "color_transfer")}
    counts = {name: {"pictures": 2, "works": 2, "labels": 1} for name in ROLES}
    facts = {"command": "python -m ...", "machine": "m", "num_images": 320, "seeds": [0, 1], "batch": 16}
    facts |= {
        "size": 64,
        "side": 128,
        "num_pairs": 2,
        "counts": counts,
        "unseen_artists": ["x"],
        "split_seed": 0,
    }
    facts |= {"judge": {"unseen_works": 0.5}, "code": ["a", "b"]}
    report.write_report(by_variant, baselines, facts, tmp_path)
    page = (tmp_path / "ablation.md").read_text()
    assert "| `fixed_pairs` |" in page
    assert "| colour transfer |" in page
    assert "the code changed" in page.lower()
    assert all(f"\n{number}. **" in page for number in range(1, 8))
    content = json.loads((tmp_path / "ablation.json").read_text())
    assert content["runs"]["fixed_pairs"]["0"]["scalars"]["guessing"] is None
    assert content["differences_to_base"]["fixed_pairs"]["unseen"]["style_distance"]["num"] == 1
