import torch

from nst import augment
from nst.augment import change_look, diff_augment, draw_augmentation


def test_another_look_keeps_where_things_are():
    torch.manual_seed(0)
    content = torch.zeros(16, 3, 64, 64) - 0.5
    content[:, :, 16:48, 16:48] = 0.6
    changed = change_look(content, torch.rand(16, 3, 64, 64) * 2 - 1)
    assert changed.abs().max() <= 1
    assert (changed - content).abs().mean() > 0.1  # it does look different
    edges = (changed.mean(1).diff(dim=2).abs().mean(dim=(0, 1))).topk(2).indices.sort().values
    assert edges.tolist() == [15, 47]


def test_what_an_image_gets_does_not_depend_on_how_the_batch_is_cut(monkeypatch):
    content, art = torch.rand(8, 3, 32, 32) * 2 - 1, torch.rand(8, 3, 32, 32) * 2 - 1
    torch.manual_seed(3)
    whole = change_look(content, art)
    monkeypatch.setattr(augment, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(augment, "rank", lambda rank=rank: rank)
        mine = slice(4 * rank, 4 * rank + 4)
        torch.manual_seed(3)
        torch.testing.assert_close(change_look(content[mine], art[mine]), whole[mine])


def test_diff_augment_moves_and_cuts_but_never_recolours():
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    augmented = diff_augment(images, draw_augmentation(2))
    kept = augmented != 0
    assert 0.85 < kept.float().mean() < 0.96  # a hole of a quarter of each side
    assert set(augmented[kept].tolist()) <= set(images.flatten().tolist())
    augmented.sum().backward()
    assert images.grad is not None
    assert images.grad.sum() == kept.sum()


def test_every_image_is_augmented_by_itself_whatever_the_ranks(monkeypatch):
    images = torch.rand(1, 3, 32, 32).expand(4, -1, -1, -1)
    torch.manual_seed(3)
    draws = draw_augmentation(4)
    whole = diff_augment(images, draws)
    assert not torch.equal(whole[0], whole[1])
    torch.testing.assert_close(diff_augment(images[1:2], draws[1:2]), whole[1:2])
    monkeypatch.setattr(augment, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(augment, "rank", lambda rank=rank: rank)
        torch.manual_seed(3)
        assert torch.equal(draw_augmentation(2), draws[2 * rank : 2 * rank + 2])
