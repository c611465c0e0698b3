"""Locality: random orders that keep to a moving window of shards, and the batches made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nst.class_draws import WINDOW
from nst.config import BatchConfig, from_dict, to_dict
from nst.label_runs import ClassLayout, LabelRuns
from nst.sampling import BatchPlan, DynamicBatchSampler
from nst.windowed_order import WindowedOrder

SHARDS = np.array([50] * 38 + [7, 1, 0, 93])  # growth and adopted tars bring uneven ones
ENDS = np.cumsum(SHARDS)
NUM = int(ENDS[-1])
LABELS = np.repeat(np.arange(8), [40, 160, 200, 200, 300, 300, 400, NUM - 1600])


def sampler(
    window: int = 3,
    *,
    labels: np.ndarray = LABELS,
    num_classes: int = 4,
    world_size: int = 1,
    seed: int = 7,
    **batch,
) -> DynamicBatchSampler:
    config = BatchConfig(num_classes=num_classes, works_per_class=2, window_shards=window, **batch)
    cuts = np.repeat(np.arange(len(SHARDS)), SHARDS)
    firsts = np.flatnonzero(np.diff(labels * 1000 + cuts, prepend=-1))
    runs = LabelRuns(labels[firsts], np.diff(firsts, append=len(labels)))
    return DynamicBatchSampler(
        runs, NUM, config, seed, world_size, content_shards=SHARDS, style_shards=SHARDS
    )


def shards_of(rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(ENDS, rows, side="right")


def assert_same(first: BatchPlan, second: BatchPlan) -> None:
    assert (first.step, first.size) == (second.step, second.size)
    for name in ("content", "style", "labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("window", [1, 2, 3, 8, 41, 42, 100])
def test_every_sample_comes_once_in_a_pass(window: int) -> None:
    order = WindowedOrder(SHARDS, window)
    for key in range(6):  # more passes than are kept
        assert sorted(order.at(np.arange(NUM), key)) == list(range(NUM))
    again, fresh = np.random.default_rng(0).permutation(NUM), WindowedOrder(SHARDS, window)
    np.testing.assert_array_equal(order.at(again, 2), fresh.at(np.arange(NUM), 2)[again])


@pytest.mark.parametrize("window", [1, 2, 4])
def test_few_shards_are_open_at_once_and_each_is_opened_once(window: int) -> None:
    seen = shards_of(WindowedOrder(SHARDS, window).at(np.arange(NUM), key=3))
    firsts = {shard: int(np.flatnonzero(seen == shard)[0]) for shard in np.unique(seen)}
    lasts = {shard: int(np.flatnonzero(seen == shard)[-1]) for shard in np.unique(seen)}
    # what is left of the last shards comes first: those are opened twice in a pass
    twice = {shard for shard in firsts if lasts[shard] - firsts[shard] > NUM // 2}
    assert len(twice) <= window - 1
    for place in range(NUM):
        is_open = [s for s in firsts if s not in twice and firsts[s] <= place <= lasts[s]]
        assert len(is_open) <= 2 * window  # where one block ends, its last shard and the next one's overlap


def test_a_window_mixes_its_shards_and_passes_differ() -> None:
    order = WindowedOrder(np.full(40, 48), 4)
    first, second = (order.at(np.arange(1920), key) for key in (1, 2))
    assert (first == second).mean() < 0.01
    blocks = (first // 48).reshape(40, 48)
    for block in blocks:
        assert set(np.unique(block, return_counts=True)[1]) == {12}  # of each of four shards
        assert len(np.unique(block[:12])) > 1  # not one behind the other


def test_no_window_is_todays_order() -> None:
    assert BatchConfig().window_shards == 0
    plain = DynamicBatchSampler(LABELS, NUM, BatchConfig(num_classes=4), 7)
    cut = sampler(0)
    for step in range(300):
        assert_same(plain.plan(step), cut.plan(step))


def test_a_wide_window_is_a_permutation_of_everything_for_classes() -> None:
    wide, plain = sampler(len(SHARDS)), sampler(0)
    for step in range(300):
        np.testing.assert_array_equal(wide.plan(step).style, plain.plan(step).style)


MODES = {
    "labelled": {},
    "random": {"sampling": "random"},
    "unlabelled": {"labels": np.zeros(NUM, dtype=int)},
    "sizes": {"num_classes": 8, "size": 128, "sizes": (96, 128, 160)},
    "adaptive": {"adaptive": 1.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_a_window_are_pure_functions_that_ranks_share(mode: str) -> None:
    whole, backwards = sampler(**MODES[mode]), sampler(**MODES[mode])
    plans = [whole.plan(step) for step in range(WINDOW)]
    for step in reversed(range(WINDOW)):
        assert_same(backwards.plan(step), plans[step])
    for world_size in (2, 4):
        ranks = [sampler(**MODES[mode], world_size=world_size) for _ in range(world_size)]
        for plan in plans[::5]:
            parts = [one.plan(plan.step).part(rank, world_size) for rank, one in enumerate(ranks)]
            assert {(len(part.content), len(part.style), part.size) for part in parts} == {
                (len(plan.content) // world_size, len(plan.style) // world_size, plan.size)
            }
            for name in ("content", "style", "labels"):
                joined = np.concatenate([getattr(part, name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(plan, name))


@pytest.mark.parametrize("mode", ["labelled", "sizes"])
def test_classes_and_their_shares_are_those_without_a_window(mode: str) -> None:
    local, plain = sampler(**MODES[mode]), sampler(0, **MODES[mode])
    for step in range(200):
        plan = local.plan(step)
        np.testing.assert_array_equal(plan.labels, plain.plan(step).labels)
        assert (LABELS[plan.style] == plan.labels).all()
        assert len(set(plan.style.tolist())) == len(plan.style)


@pytest.mark.parametrize("mode", ["labelled", "sizes"])
def test_photos_of_a_window_come_once_in_a_pass(mode: str) -> None:
    plans = sampler(**MODES[mode])
    seen: list[int] = []
    step = 0
    while len(seen) < NUM + 100:
        seen += plans.plan(step).content.tolist()
        step += 1
    num_a_pass = plans.images_before(step) - (len(seen) - NUM // 4 * 4)
    one_pass = seen[:num_a_pass]
    if mode == "labelled":  # else a batch lies across the end of the pass
        assert len(set(one_pass)) == len(one_pass) >= NUM - 3
    assert len(set(seen)) >= NUM - 3


def test_unlabelled_art_of_a_window_comes_once_in_a_pass() -> None:
    plans = sampler(**MODES["unlabelled"])
    drawn = [plans.plan(step) for step in range(NUM // 4)]
    for plan in drawn:
        pictures = plan.style.reshape(4, 2)
        assert (pictures[:, 0] == pictures[:, 1]).all()
        assert len(set(pictures[:, 0].tolist())) == 4
    assert len({int(row) for plan in drawn for row in plan.style}) == NUM // 4 * 4


def test_works_of_a_class_come_from_a_moving_window_and_each_once_in_a_pass() -> None:
    plans, rows = sampler(window=1, adaptive=1.0), []
    for step in range(6 * WINDOW):
        plan = plans.plan(step)
        rows.append(plan.style[plan.labels == 6])
        plans.observe(step, plan.labels, np.zeros(len(plan.labels)))
    one_pass = np.concatenate(rows)[:400]  # of the 400 works of class 6, in 8 shards
    assert sorted(one_pass) == sorted(np.flatnonzero(LABELS == 6))
    assert len(np.unique(shards_of(one_pass))) == 8
    for start in range(0, 400, 50):
        assert len(np.unique(shards_of(one_pass[start : start + 50]))) == 1


def test_neighbouring_steps_touch_few_shards() -> None:
    def num_shards(plans: DynamicBatchSampler, name: str) -> int:
        rows = np.concatenate([getattr(plans.plan(step), name) for step in range(500, 512)])
        return len(np.unique(shards_of(rows)))

    for mode in ("labelled", "unlabelled", "random"):
        local, everywhere = sampler(1, **MODES[mode]), sampler(0, **MODES[mode])
        assert num_shards(everywhere, "content") > 30
        assert num_shards(local, "content") <= 4 * 2  # 4 tracks, each in one shard or between two
        assert num_shards(local, "style") <= (2 * 8 if mode == "labelled" else 4 * 2)


def test_a_rank_keeps_to_shards_of_its_own() -> None:
    plans, steps = sampler(1), range(60)
    touched = [
        set(shards_of(np.concatenate([plans.plan(step).part(rank, 4).content for step in steps])).tolist())
        for rank in range(4)
    ]
    assert sum(map(len, touched)) <= len(set.union(*touched)) + 3  # neighbours share a shard at most


def test_adaptive_classes_of_a_window_resume_exactly() -> None:
    def run(plans: DynamicBatchSampler, steps: range) -> list[BatchPlan]:
        drawn = []
        for step in steps:
            drawn.append(plans.plan(step))
            plans.observe(step, drawn[-1].labels, np.random.default_rng(step).random(len(drawn[-1].labels)))
        return drawn

    whole = run(sampler(adaptive=1.0), range(3 * WINDOW))
    before, after = sampler(adaptive=1.0), sampler(adaptive=1.0)
    run(before, range(WINDOW + 9))
    after.recall(json.loads(json.dumps(before.memory())))
    for one, other in zip(run(after, range(WINDOW + 9, 3 * WINDOW)), whole[WINDOW + 9 :], strict=True):
        assert_same(one, other)


def test_what_a_window_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="window_shards must be 0"):
        BatchConfig(window_shards=-1)
    with pytest.raises(ValueError, match="set one of them back"):
        sampler(adaptive=1.0, **MODES["unlabelled"])
    config = BatchConfig(window_shards=4)
    assert from_dict(BatchConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_corpus_smaller_than_a_batch() -> None:
    config = BatchConfig(num_classes=4, window_shards=2)
    plan = DynamicBatchSampler(LABELS, 3, config, 7, content_shards=[1, 2]).plan(5)
    assert set(plan.content.tolist()) == {0, 1, 2}


def test_runs_find_what_sorting_all_labels_would() -> None:
    labels = np.random.default_rng(0).zipf(1.5, 3000) % 90
    runs, order = LabelRuns.of(labels), np.argsort(labels, kind="stable")
    layout = ClassLayout(runs)
    places = np.arange(3000)
    np.testing.assert_array_equal(layout.rows(places), order)
    names = np.unique(labels)
    np.testing.assert_array_equal(names[layout.classes(places)], labels[order])
    np.testing.assert_array_equal(names[layout.classes_of_rows(places)], labels)
    np.testing.assert_array_equal(layout.counts, np.bincount(labels)[names])
    np.testing.assert_array_equal(runs.per_sample(), labels)
    np.testing.assert_array_equal(runs.rows_of(7), np.flatnonzero(labels == 7))
    np.testing.assert_array_equal(runs.counts(90), np.bincount(labels, minlength=90))
    assert LabelRuns.join([runs, runs]).num_samples == 6000
    assert LabelRuns.of([]).num_samples == 0
