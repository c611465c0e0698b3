import hashlib
import json
from collections import Counter, deque

import numpy as np
import pytest
import torch

from nst.class_draws import BOUND, WINDOW
from nst.config import BatchConfig, from_dict, to_dict
from nst.sampling import DynamicBatchSampler, largest_world_size, mix_bits, permute

LABELS = np.repeat(np.arange(6), [2, 3, 8, 18, 32, 50])
MANY = np.repeat(np.arange(40), np.arange(2, 42))
SIZES = {"num_classes": 8, "labels": MANY, "size": 128, "sizes": (96, 128, 160)}


def sampler(num_classes=4, k=2, labels=LABELS, *, seed=7, num_content=100, world_size=1, **batch):
    config = BatchConfig(num_classes=num_classes, works_per_class=k, **batch)
    return DynamicBatchSampler(labels, num_content, config, seed, world_size)


def digest(plans, steps):
    known = hashlib.sha256()
    for step in steps:
        plan = plans.plan(step)
        for rows in (plan.content, plan.style, plan.labels):
            known.update(rows.astype("<i8").tobytes())
    return known.hexdigest()[:16]


def assert_same(first, second):
    assert (first.step, first.size) == (second.step, second.size)
    for name in ("content", "style", "labels"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=f"{first.step}")


def hard_for(hard, labels, step):
    """Losses as a training would report them: falling, noisy, and higher for some classes."""
    noise = np.random.default_rng(step).normal(scale=0.1, size=len(labels))
    return (np.isin(labels, hard) + 1.0 / (1 + step / 100) + noise).astype(np.float32)


def run(plans, steps, hard=(0,)):
    """Plans of these steps, with the losses of each observed behind it."""
    for step in steps:
        plan = plans.plan(step)
        yield plan
        plans.observe(step, plan.labels, hard_for(hard, plan.labels, step))


def shares(plans, num=6):
    drawn = Counter(int(label) for plan in plans for label in set(plan.labels.tolist()))
    return np.array([drawn[label] for label in range(num)]) / sum(drawn.values())


@pytest.mark.parametrize("num", [1, 2, 3, 10, 1000, 4097])
def test_permute_is_a_permutation(num):
    assert sorted(permute(np.arange(num), num, key=5)) == list(range(num))


def test_permute_costs_the_same_for_a_billion():
    values = permute(np.arange(16), 10**9, key=1)
    assert len(set(values.tolist())) == 16
    assert values.max() < 10**9


def test_permute_depends_on_its_key_and_looks_random():
    first, second = (permute(np.arange(1000), 1000, key) for key in (1, 2))
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1


def test_mix_bits_never_changes():
    # batches of a resumed training depend on these very numbers
    assert mix_bits(0) == 0xE220A8397B1DCDAF
    assert mix_bits(1, 2, 3) == mix_bits(1, 2, 3) != mix_bits(3, 2, 1)


def test_a_batch_holds_distinct_classes_with_distinct_works():
    plans = sampler()
    for step in range(200):
        plan = plans.plan(step)
        classes = plan.labels.reshape(4, 2)
        assert (classes[:, 0] == classes[:, 1]).all()
        assert len(set(classes[:, 0])) == 4
        assert len(set(plan.style)) == 8
        assert (LABELS[plan.style] == plan.labels).all()
        assert len(set(plan.content)) == 8


def test_a_step_is_a_pure_function_of_its_number():
    forwards = [sampler().plan(step) for step in range(50)]
    one = sampler()
    for step in reversed(range(50)):
        plan = one.plan(step)
        np.testing.assert_array_equal(plan.style, forwards[step].style)
        np.testing.assert_array_equal(plan.content, forwards[step].content)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size):
    whole = sampler().plan(11)
    parts = [sampler(world_size=world_size).plan(11).part(rank, world_size) for rank in range(world_size)]
    for name in ("style", "content", "labels"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


def test_classes_come_in_proportion_to_the_square_root_of_their_size():
    plans = sampler(num_classes=2)
    expected = np.sqrt(np.bincount(LABELS))
    share = shares(plans.plan(step) for step in range(3000))
    np.testing.assert_allclose(share, expected / expected.sum(), rtol=0.12)


def test_all_photos_are_seen_before_one_comes_again():
    plans = sampler()
    seen = np.concatenate([plans.plan(step).content for step in range(25)])  # 25 * 8 = two passes over 100
    assert sorted(seen[:100]) == list(range(100))
    assert sorted(seen[100:200]) == list(range(100))
    assert (seen[:100] != seen[100:200]).any()


def test_all_works_of_a_class_are_seen():
    plans = sampler()
    seen = {int(row) for step in range(400) for row in plans.plan(step).style}
    assert seen == set(range(len(LABELS)))


def test_unlabelled_art_makes_every_picture_its_own_class():
    plan = sampler(labels=np.zeros(30, dtype=int)).plan(3)
    works = plan.style.reshape(4, 2)
    assert (works[:, 0] == works[:, 1]).all()  # two crops of one picture
    assert len(set(works[:, 0])) == 4


def test_fewer_classes_than_asked_for():
    assert sampler(num_classes=64).num_classes == 6
    assert sampler(num_classes=64, world_size=3).num_classes == 6


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"takes 4 classes.*which 3 workers cannot share"):
        sampler(num_classes=4, world_size=3)
    with pytest.raises(ValueError, match=r"the corpus has 6.*which 4 workers cannot share"):
        sampler(num_classes=64, world_size=4)
    with pytest.raises(ValueError, match="needs samples of both kinds"):
        DynamicBatchSampler([], 10, BatchConfig(), 0)


@pytest.mark.parametrize(
    ("labels", "batch", "expected"),
    [
        (MANY, {"num_classes": 8}, [1, 2, 2, 4, 4, 4, 4, 8, 8]),
        (LABELS, {"num_classes": 64}, [1, 2, 3, 3, 3, 6, 6, 6, 6]),  # there are 6 classes
        (np.zeros(30, dtype=int), {"num_classes": 10}, [1, 2, 2, 2, 5, 5, 5, 5, 5]),  # a class a picture
        (MANY, {"num_classes": 8, "size": 128, "sizes": (96, 128, 160)}, [1, 2, 2, 4, 4, 4, 4, 4, 4]),
    ],
    ids=["labelled", "few classes", "unlabelled", "sizes"],
)
def test_as_many_workers_train_as_can_share_every_batch(labels, batch, expected):
    for number, largest in enumerate(expected, start=1):
        assert largest_world_size(labels, BatchConfig(**batch), number) == largest
        DynamicBatchSampler(labels, 100, BatchConfig(**batch), 7, largest)  # takes it
        for refused in range(largest + 1, number + 1):
            with pytest.raises(ValueError, match=f"which {refused} workers cannot share"):
                DynamicBatchSampler(labels, 100, BatchConfig(**batch), 7, refused)


# --- what a resumed training stands on: these very batches -------------------------------------------


def test_batches_never_change():
    steps = [0, 1, 2, 17, 63, 64, 1000, 123456]
    assert sampler().plan(17).style.tolist() == [17, 15, 70, 72, 42, 41, 6, 5]
    assert digest(sampler(), steps) == "aac3c9d2fdfdad4a"
    assert digest(sampler(labels=np.zeros(30, dtype=int)), steps) == "4ced50ae11e8f7be"
    assert digest(sampler(2, 3, seed=0, num_content=1000), range(300)) == "2252299b11a823e9"
    assert digest(sampler(64, seed=1), steps) == "a0b025c69c410e08"
    many = np.random.default_rng(0).zipf(1.5, 5000) % 700
    assert digest(sampler(16, 2, many, seed=3, num_content=10**6), range(400)) == "907fd9a11bea832e"


def test_one_size_is_no_schedule():
    for step in range(100):
        assert_same(sampler(size=64, sizes=(64,)).plan(step), sampler(size=64).plan(step))


# --- adaptive ------------------------------------------------------------------------------------------


def test_adaptive_batches_hold_distinct_classes_with_distinct_works():
    for plan in run(sampler(adaptive=2.0), range(3 * WINDOW)):
        classes = plan.labels.reshape(4, 2)
        assert (classes[:, 0] == classes[:, 1]).all()
        assert len(set(classes[:, 0])) == 4
        assert len(set(plan.style)) == 8
        assert (LABELS[plan.style] == plan.labels).all()


def test_hard_classes_come_more_often_and_no_class_is_lost():
    expected = np.sqrt(np.bincount(LABELS))
    for strength, hard in ((0.5, [1]), (100.0, [1, 3])):
        plans = list(run(sampler(num_classes=2, adaptive=strength), range(12 * WINDOW), hard))
        before = shares(plans[: 2 * WINDOW])  # nothing is known yet
        np.testing.assert_allclose(before, expected / expected.sum(), rtol=0.05)
        ratio = shares(plans[2 * WINDOW :]) / (expected / expected.sum())
        easy = np.setdiff1d(np.arange(6), hard)
        assert ratio[hard].min() > 1.3 * ratio[easy].max()
        assert ratio.min() > 0
        assert ratio.max() / ratio.min() < 1.1 * BOUND**2


def test_classes_that_are_equally_hard_come_as_they_would_anyway():
    plans = sampler(num_classes=2, adaptive=1.0)
    drawn = []
    for step in range(6 * WINDOW):
        drawn.append(plans.plan(step))
        plans.observe(step, drawn[-1].labels, np.full(4, 3.0 / (1 + step)))  # falls for all alike
    expected = np.sqrt(np.bincount(LABELS))
    np.testing.assert_allclose(shares(drawn), expected / expected.sum(), rtol=0.05)


def test_a_plan_depends_on_losses_of_two_windows_before_only():
    hard, other = sampler(adaptive=1.0), sampler(adaptive=1.0)
    first, second = list(run(hard, range(4 * WINDOW), [0])), list(run(other, range(4 * WINDOW), [5]))
    for step in range(2 * WINDOW):
        assert_same(first[step], second[step])
    assert any((a.labels != b.labels).any() for a, b in zip(first, second, strict=True))


def test_planning_a_window_ahead_changes_nothing():
    at_once = list(run(sampler(adaptive=1.0), range(4 * WINDOW)))
    plans = sampler(adaptive=1.0)
    assert plans.horizon == WINDOW
    ahead = deque(plans.plan(step) for step in range(WINDOW))
    for step in range(3 * WINDOW):
        ahead.append(plans.plan(step + WINDOW))
        plan = ahead.popleft()
        assert_same(plan, at_once[step])
        plans.observe(step, plan.labels, hard_for((0,), plan.labels, step))


def test_what_is_not_known_yet_is_not_planned():
    plans = sampler(adaptive=1.0)
    with pytest.raises(AssertionError, match="not to be planned yet"):
        plans.plan(2 * WINDOW)
    with pytest.raises(AssertionError, match="0 is next, not 1"):
        plans.observe(1, np.zeros(2, dtype=int), np.zeros(2))


def test_resuming_anywhere_gives_the_batches_of_an_uninterrupted_run():
    whole = sampler(**SIZES, adaptive=1.0)
    plans = list(run(whole, range(4 * WINDOW)))
    for stop in (1, WINDOW - 1, WINDOW, 2 * WINDOW + 30):
        before = sampler(**SIZES, adaptive=1.0)
        for _ in run(before, range(stop)):
            pass
        after = sampler(**SIZES, adaptive=1.0)
        after.recall(json.loads(json.dumps(before.memory())))
        assert after.memory() == before.memory()
        for step, plan in zip(range(stop, 4 * WINDOW), run(after, range(stop, 4 * WINDOW)), strict=True):
            assert_same(plan, plans[step])
        assert after.memory() == whole.memory()


def test_works_of_a_class_are_all_seen_before_one_comes_again():
    works = [
        plan.style[plan.labels == 5].tolist()
        for plan in run(sampler(num_classes=2, adaptive=1.0), range(4 * WINDOW))
        if 5 in plan.labels
    ]
    assert len(works) > 50
    for first in range(0, 50, 25):  # 50 works, two at a time
        assert len({row for rows in works[first : first + 25] for row in rows}) == 50


def test_observed_values_may_be_tensors_and_a_broken_loss_is_left_out():
    plans = sampler(adaptive=1.0)
    labels = torch.from_numpy(plans.plan(0).labels)
    losses = torch.arange(8.0, requires_grad=True, dtype=torch.bfloat16)
    plans.observe(0, labels, losses)
    plans.observe(1, labels, torch.full((8,), torch.nan))
    plans.observe(2, labels, torch.tensor([torch.inf, *range(7)]))
    assert np.isfinite(plans.memory()["losses"]).all()
    assert json.loads(json.dumps(plans.memory(), allow_nan=False)) == plans.memory()


def test_memory_of_another_training_is_refused():
    with pytest.raises(ValueError, match="follows 6 classes, the checkpoint remembers losses of 0"):
        sampler(adaptive=1.0).recall({})
    with pytest.raises(ValueError, match="losses of 30"):
        sampler(adaptive=1.0).recall(sampler(labels=np.zeros(30, dtype=int), adaptive=1.0).memory())


def test_without_adaptive_nothing_is_remembered():
    plans = sampler()
    plans.observe(0, plans.plan(0).labels, np.arange(8.0))
    assert plans.memory() == {}
    plans.recall({})
    assert plans.horizon is None


def test_unlabelled_art_can_be_adaptive():
    for plan in run(sampler(labels=np.zeros(30, dtype=int), adaptive=1.0), range(3 * WINDOW), [3]):
        works = plan.style.reshape(4, 2)
        assert (works[:, 0] == works[:, 1]).all()
        assert len(set(works[:, 0])) == 4


def test_no_class_waits_for_long_where_a_window_cannot_hold_all():
    labels = np.arange(3000) // 3  # a thousand artists; a window holds 256 draws
    last, longest = np.zeros(1000, dtype=int), np.zeros(1000, dtype=int)
    for plan in run(sampler(labels=labels, adaptive=3.0), range(40 * WINDOW)):
        longest[plan.labels] = np.maximum(longest[plan.labels], plan.step - last[plan.labels])
        last[plan.labels] = plan.step
    longest = np.maximum(longest, 40 * WINDOW - last)
    # at worst one third of its share, while others have three times theirs, and a window of waiting
    assert longest.max() < (BOUND**2 * 1000 / 256 + 1) * WINDOW
    assert np.median(longest) < 10 * WINDOW


# --- sizes ---------------------------------------------------------------------------------------------


def test_every_cycle_has_every_size_in_an_order_of_its_own():
    plans = sampler(**SIZES)
    sizes = np.array([plans.plan(step).size for step in range(60)]).reshape(20, 3)
    assert (np.sort(sizes, axis=1) == [96, 128, 160]).all()
    assert len({tuple(cycle) for cycle in sizes.tolist()}) > 3


def test_no_size_has_more_pixels_than_the_base_batch():
    plans, num_classes = sampler(**SIZES), {}
    for step in range(60):
        plan = plans.plan(step)
        assert len(plan.style) * plan.size**2 <= 8 * 2 * 128**2
        assert len(plan.style) == len(plan.content) == len(plan.labels)
        assert plans.images_before(step + 1) - plans.images_before(step) == len(plan.content)
        num_classes[plan.size] = len(plan.style) // 2
    assert num_classes == {96: 12, 128: 8, 160: 4}  # multiples of 4, since 8 would not fit at 160


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
def test_all_ranks_share_the_batches_of_varying_sizes(adaptive):
    whole = sampler(**SIZES, adaptive=adaptive)
    ranks = [sampler(**SIZES, adaptive=adaptive, world_size=4) for _ in range(4)]
    for step in range(3 * WINDOW):
        plan = whole.plan(step)
        parts = [plans.plan(step).part(rank, 4) for rank, plans in enumerate(ranks)]
        assert {part.size for part in parts} == {plan.size}
        assert {len(part.style) for part in parts} == {len(plan.style) // 4}
        for name in ("style", "content", "labels"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(plan, name))
        for plans in (whole, *ranks):
            plans.observe(step, plan.labels, hard_for([3], plan.labels, step))


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
def test_batches_of_every_size_hold_distinct_classes_in_proportion(adaptive):
    plans, drawn = sampler(**SIZES, adaptive=adaptive), []
    for step in range(1200):
        plan = plans.plan(step)
        assert len(set(plan.labels.tolist())) == len(plan.labels) // 2
        assert len(set(plan.style.tolist())) == len(plan.style)
        drawn.append(plan)
        plans.observe(step, plan.labels, np.zeros(len(plan.labels)))
    expected = np.sqrt(np.bincount(MANY))
    np.testing.assert_allclose(shares(drawn, 40), expected / expected.sum(), rtol=0.12)


@pytest.mark.parametrize("adaptive", [0.0, 1.0])
def test_all_photos_are_seen_before_one_comes_again_with_sizes(adaptive):
    plans = sampler(**SIZES, adaptive=adaptive)
    seen = np.concatenate([plan.content for plan in run(plans, range(30))])
    assert len(seen) > 300
    for first in range(0, 300, 100):
        assert sorted(seen[first : first + 100]) == list(range(100))


def test_a_step_with_sizes_is_a_pure_function_of_its_number():
    forwards = [sampler(**SIZES).plan(step) for step in range(50)]
    one = sampler(**SIZES)
    for step in reversed(range(50)):
        assert_same(one.plan(step), forwards[step])
    assert one.plan(10**7).step == 10**7


def test_small_sizes_take_no_more_classes_than_there_are():
    plans = sampler(size=128, sizes=(32, 128))
    assert {len(plans.plan(step).style) // 2 for step in range(4)} == {4}  # 6 classes, in fours
    with pytest.raises(ValueError, match=r"a batch at 96 px takes 12 classes .*which 8 workers cannot share"):
        sampler(**SIZES, world_size=8)


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="multiples of 16 from 32 up; 100 is none"):
        BatchConfig(sizes=(96, 100))
    with pytest.raises(ValueError, match="512 px leaves room for fewer than 2 classes"):
        BatchConfig(num_classes=4, size=256, sizes=(256, 512))
    with pytest.raises(ValueError, match="adaptive must be 0 or more"):
        BatchConfig(adaptive=-1.0)
    with pytest.raises(ValueError, match="set one of them back"):
        BatchConfig(adaptive=1.0, sampling="random")
    config = BatchConfig(sizes=(192, 256), adaptive=0.5)
    assert from_dict(BatchConfig, json.loads(json.dumps(to_dict(config)))) == config


# --- random --------------------------------------------------------------------------------------------


def test_random_batches_come_from_the_whole_corpus_whoever_made_them():
    plans = sampler(sampling="random")
    drawn = [plans.plan(step) for step in range(2000)]
    for plan in drawn:
        assert len(set(plan.style.tolist())) == len(plan.style) == 8
        assert (LABELS[plan.style] == plan.labels).all()
    works = np.bincount(np.concatenate([plan.style for plan in drawn]), minlength=len(LABELS))
    assert abs(works / works.mean() - 1).max() < 0.35  # each work alike: 142 draws, deviation 8%
    np.testing.assert_array_equal(drawn[9].content, sampler().plan(9).content)
    assert_same(sampler(sampling="random").plan(77), drawn[77])


def test_random_batches_larger_than_the_corpus():
    plan = sampler(sampling="random", k=30, num_classes=6).plan(0)
    assert len(plan.style) == 180
    assert set(Counter(plan.style.tolist()).values()) == {1, 2}
