from collections import Counter

import numpy as np
import pytest

from nst.config import BatchConfig
from nst.sampling import DynamicBatchSampler, mix_bits, permute

LABELS = np.repeat(np.arange(6), [2, 3, 8, 18, 32, 50])


def sampler(num_classes=4, k=2, labels=LABELS, **kwargs):
    return DynamicBatchSampler(
        labels, 100, BatchConfig(num_classes=num_classes, works_per_class=k), 7, **kwargs
    )


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
    drawn = Counter(int(label) for step in range(3000) for label in set(plans.plan(step).labels.tolist()))
    share = np.array([drawn[c] for c in range(6)]) / sum(drawn.values())
    expected = np.sqrt(np.bincount(LABELS))
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
