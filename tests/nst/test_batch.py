import pytest
import torch

from nst.batch import Batch


def batch(labels, works_per_class=2):
    labels = torch.tensor(labels)
    images = torch.zeros(len(labels), 3, 4, 4)
    return Batch(content=images, style=images, labels=labels, works_per_class=works_per_class, step=0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_partner_of_a_work_is_the_next_one_of_its_artist(k):
    classes = torch.tensor([7, 2, 9, 0]).repeat_interleave(k)
    index = torch.arange(4 * k)
    found = batch(classes.tolist(), k)
    assert torch.equal(found.partner, index - index % k + (index + 1) % k)
    assert found.has_partner.all()


def test_partners_come_from_the_labels_alone():
    found = batch([5, 1, 5, 3, 1, 5])
    assert found.partner.tolist() == [2, 4, 5, 3, 1, 0]
    assert found.has_partner.tolist() == [True, True, True, False, True, True]
    assert found.partner.dtype == torch.int64
    # each work is the partner of exactly one
    assert sorted(found.partner.tolist()) == list(range(6))


def test_one_work_alone_has_no_partner():
    assert batch([4]).partner.tolist() == [0]
    assert batch([4]).has_partner.tolist() == [False]
