"""The losses: by hand, against pytorch-metric-learning, their gradients, and what precision does to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, NPairsLoss, NTXentLoss
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor

from nst import losses


def unit(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors along dimension 1, float64."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=1)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """In [-1, 1], float64."""
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def value(loss: Tensor) -> float:
    return loss.item()


# --- pairs ----------------------------------------------------------------------------------------------


def test_squared_distance_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    second = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.8, 0.6]])
    torch.testing.assert_close(losses.squared_distance(first, second), torch.tensor([0.0, 4.0, 0.08]))


def test_pairwise_margin_by_hand() -> None:
    distances = torch.tensor([0.25, 0.25, 3.0, 3.0])
    same = torch.tensor([1, 0, 1, 0])
    # 0.25, 1 - 0.25, 3, max(0, 1 - 3)
    assert value(losses.pairwise_margin(distances, same)) == pytest.approx((0.25 + 0.75 + 3.0 + 0.0) / 4)
    # 0.25, 4 - 0.25, 3, 4 - 3
    assert value(losses.pairwise_margin(distances, same, margin=4.0)) == pytest.approx(8 / 4)


def test_pair_loss_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    positives = torch.tensor([[0.6, 0.8], [1.0, 0.0], [1.0, 0.0]])  # distances .8, 0, 2
    negatives = torch.tensor([[0.8, 0.6], [-1.0, 0.0], [0.0, 1.0]])  # distances .4, 4, 0
    expected = torch.tensor([(0.8 + 0.6) / 2, 0.0, (2.0 + 1.0) / 2])
    pairs = (rows, positives, negatives)
    torch.testing.assert_close(losses.pair_loss(*pairs, reduction="none"), expected)
    assert value(losses.pair_loss(*pairs)) == pytest.approx(2.2 / 3)
    valid = torch.tensor([True, True, False])
    assert value(losses.pair_loss(*pairs, valid=valid)) == pytest.approx(0.7 / 2)
    assert losses.pair_loss(*pairs, valid=valid, reduction="none")[2] == 0


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_margin_losses_agree_with_pytorch_metric_learning(margin: float) -> None:
    rows, positives, negatives = (unit(6, 5, seed=seed) for seed in (1, 2, 3))
    reference = ContrastiveLoss(
        pos_margin=0,
        neg_margin=margin,  # pyright: ignore[reportArgumentType]
        distance=LpDistance(power=2),
        reducer=MeanReducer(),
    )
    own = torch.arange(6)
    # it adds the means of its two kinds of pairs
    columns = torch.cat([positives, negatives])
    expected = reference(
        rows, ref_emb=columns, ref_labels=torch.zeros(12), indices_tuple=(own, own, own, own + 6)
    )
    found = losses.pair_loss(rows, positives, negatives, margin)
    assert value(found) == pytest.approx(value(expected) / 2, abs=1e-9)
    distances = losses.squared_distance(torch.cat([rows, rows]), columns)
    same = torch.cat([torch.ones(6), torch.zeros(6)])
    assert value(losses.pairwise_margin(distances, same, margin)) == pytest.approx(value(expected) / 2)


# --- matrices -------------------------------------------------------------------------------------------


def test_matrix_loss_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = losses.matrix_loss(rows, rows, torch.tensor([0, 1]), temperature=0.5)
    assert value(loss) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))


def test_a_collapsed_encoder_scores_the_logarithm_of_the_columns() -> None:
    rows = torch.ones(4, 8) / 8**0.5
    loss = losses.matrix_loss(rows, rows.repeat(3, 1), torch.arange(4), temperature=0.2)
    assert value(loss) == pytest.approx(math.log(12), rel=1e-5)


def test_masked_columns_do_not_count_but_the_positive_always_does() -> None:
    rows, columns = unit(3, 8), unit(5, 8, seed=1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = True
    mask[0, 0] = True  # the positive of row 0: stays
    positives = torch.tensor([0, 1, 2])
    expected = losses.matrix_loss(rows, columns[:3], positives, 0.2)
    torch.testing.assert_close(losses.matrix_loss(rows, columns, positives, 0.2, mask), expected)


def test_rows_without_a_positive_are_left_out() -> None:
    rows, columns = unit(4, 8).requires_grad_(), unit(6, 8, seed=1)
    positives, valid = torch.tensor([3, -1, 0, 99]), torch.tensor([True, False, True, False])
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1] = True  # nothing is left of this row
    each = losses.matrix_loss(rows, columns, positives, 0.2, mask, valid=valid, reduction="none")
    expected = losses.matrix_loss(rows[[0, 2]], columns, positives[[0, 2]], 0.2, reduction="none")
    torch.testing.assert_close(each, torch.stack([expected[0], each[1] * 0, expected[1], each[3] * 0]))
    loss = losses.matrix_loss(rows, columns, positives, 0.2, mask, valid=valid)
    torch.testing.assert_close(loss, expected.mean())
    (gradient,) = torch.autograd.grad(loss, rows)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[[1, 3]] == 0).all())
    none = losses.matrix_loss(rows, columns, positives, 0.2, valid=torch.zeros(4, dtype=torch.bool))
    assert value(none) == 0


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("fakes", [0, 3])
def test_matrix_loss_agrees_with_ntxent(temperature: float, fakes: int) -> None:
    """3 artists with 2 works each against works, other works and fakes: NT-Xent too compares a pair with the
    negatives alone, the artist's remaining works left out."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    rows = unit(6, 8)
    columns = torch.cat([rows, unit(fakes, 8, seed=1)])
    column_labels = torch.cat([labels, -1 - torch.arange(fakes)])
    positives = torch.tensor([1, 0, 3, 2, 5, 4])
    others = labels[:, None] != column_labels[None, :]
    pairs = (torch.arange(6), positives, *torch.nonzero(others, as_tuple=True))
    expected = NTXentLoss(temperature)(
        rows, labels, indices_tuple=pairs, ref_emb=columns, ref_labels=column_labels
    )
    found = losses.matrix_loss(rows, columns, positives, temperature, mask=~others)
    assert value(found) == pytest.approx(value(expected), rel=1e-6)
    # the same by labels alone: with 2 works a class the only other one is the positive
    if not fakes:
        assert value(found) == pytest.approx(value(NTXentLoss(temperature)(rows, labels)), rel=1e-6)


def test_without_a_mask_every_other_column_is_a_negative() -> None:
    rows, columns = unit(4, 8), unit(7, 8, seed=1)
    positives = torch.tensor([6, 2, 0, 2])
    negatives = torch.ones(4, 7).scatter(1, positives[:, None], 0)
    pairs = (torch.arange(4), positives, *torch.nonzero(negatives, as_tuple=True))
    expected = NTXentLoss(0.2)(rows, indices_tuple=pairs, ref_emb=columns, ref_labels=torch.zeros(7))
    found = losses.matrix_loss(rows, columns, positives, 0.2)
    assert value(found) == pytest.approx(value(expected), rel=1e-6)


def test_n_pairs_is_the_matrix_loss_at_temperature_one() -> None:
    """S = A·Pᵀ with each class's positive on the diagonal (Sohn 2016)."""
    embeddings, labels = unit(8, 5), torch.arange(4).repeat(2)
    pairs = (torch.arange(4), torch.arange(4, 8), torch.zeros(0, dtype=torch.long))
    expected = NPairsLoss()(embeddings, labels, indices_tuple=(*pairs, pairs[2]))
    found = losses.matrix_loss(embeddings[:4], embeddings[4:], torch.arange(4), temperature=1.0)
    assert value(found) == pytest.approx(value(expected), rel=1e-6)


def test_patch_nce_is_low_only_where_places_correspond() -> None:
    maps = unit(2, 64, 6, 6)
    right = losses.patch_nce(maps, maps, 0.07, num_patches=36)
    wrong = losses.patch_nce(maps, maps.flip(2), 0.07, num_patches=36)
    assert right < 0.1 < 1 < wrong


def test_patch_nce_is_a_matrix_loss_within_each_image() -> None:
    queries, keys = unit(2, 8, 3, 4), unit(2, 8, 3, 4, seed=1)
    parts = [
        losses.matrix_loss(query.flatten(1).T, key.flatten(1).T, torch.arange(12), 0.07)
        for query, key in zip(queries, keys, strict=True)
    ]
    torch.testing.assert_close(losses.patch_nce(queries, keys, 0.07), torch.stack(parts).mean())


def test_patch_nce_gives_keys_no_gradient() -> None:
    keys = unit(1, 8, 3, 3).requires_grad_()
    loss = losses.patch_nce(keys, keys, 0.07)
    (gradient,) = torch.autograd.grad(loss, keys)
    torch.manual_seed(0)
    other = keys.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses.patch_nce(other, keys.detach(), 0.07), other)
    torch.testing.assert_close(gradient, expected)


def test_cosine_tells_collapse() -> None:
    assert value(losses.off_diagonal_cosine(torch.ones(5, 3) / 3**0.5)) == pytest.approx(1, abs=1e-6)
    assert value(losses.off_diagonal_cosine(torch.eye(5))) == pytest.approx(0, abs=1e-6)
    assert value(losses.off_diagonal_cosine(torch.eye(1))) == 0


# --- adversarial ----------------------------------------------------------------------------------------


def test_hinge_by_hand() -> None:
    real, fake = [torch.tensor([[[[2.0, 0.0]]]])], [torch.tensor([[[[-2.0, 0.5]]]])]
    assert value(losses.hinge_discriminator(real, fake)) == pytest.approx(0.5 + 0.75)
    assert value(losses.hinge_generator(fake)) == pytest.approx(0.75)


def test_bce_by_hand_and_against_torch() -> None:
    undecided = [torch.zeros(2, 1, 3, 3)]
    assert value(losses.bce_discriminator(undecided, undecided)) == pytest.approx(2 * math.log(2))
    assert value(losses.bce_generator(undecided)) == pytest.approx(math.log(2))
    real, fake = [torch.tensor([[[[2.0]]]])], [torch.tensor([[[[-1.0]]]])]
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert value(losses.bce_discriminator(real, fake)) == pytest.approx(expected)
    assert value(losses.bce_generator(fake)) == pytest.approx(math.log(1 + math.e))
    for logits in (torch.randn(2, 1, 4, 4), torch.tensor([[[[200.0, -200.0]]]])):
        expected = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
        torch.testing.assert_close(losses.bce_generator([logits]), expected)


def test_maps_weigh_the_same_whatever_their_size() -> None:
    small, large = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 8, 8), -1.0)
    assert value(losses.hinge_generator([small, large])) == pytest.approx(-1)
    for loss in (losses.hinge_discriminator, losses.bce_discriminator):
        both = loss([small, large], [large, small])
        torch.testing.assert_close(both, (loss([small], [large]) + loss([large], [small])) / 2)
    with pytest.raises(ValueError, match="shorter"):
        losses.bce_discriminator([small, large], [small])


def test_r1_of_a_linear_critic_is_half_its_squared_slope() -> None:
    images = torch.randn(4, 3, 5, 5, requires_grad=True)
    weights = torch.randn(3)
    logits = torch.einsum("nchw,c->nhw", images, weights)[:, None]
    # each of the 25 logits has the slope w / 25 at its own pixel
    expected = 0.5 * value(weights.square().sum()) / 25
    assert value(losses.r1_penalty([logits], images)) == pytest.approx(expected, rel=1e-5)


# --- pictures -------------------------------------------------------------------------------------------


def test_structure_ignores_brightness_and_contrast() -> None:
    content = F.interpolate(pictures(2, 3, 8, 8), (64, 64), mode="bicubic")
    assert losses.low_band_structure(content * 0.6 - 0.3, content) < 0.01
    assert losses.low_band_structure(content.flip(3), content) > 0.5
    assert losses.low_band_structure(-content, content) > 1


def test_structure_by_hand() -> None:
    """Left half dark, right half light: at mean 0 and deviation 1 they are -1 and 1; mirrored 2 apart."""
    content = torch.ones(1, 3, 16, 16)
    content[..., :8] = -1
    expected = 2 / (1 + 1e-4) ** 0.5
    assert value(losses.low_band_structure(content.flip(3), content)) == pytest.approx(expected)


def test_band_distance_orders_styles() -> None:
    smooth = F.interpolate(pictures(1, 3, 4, 4), (128, 128), mode="bilinear")
    rough = (smooth + 0.5 * torch.randn(1, 3, 128, 128)).clamp(-1, 1)
    rough_too = (smooth + 0.5 * torch.randn(1, 3, 128, 128)).clamp(-1, 1)
    assert value(losses.sliced_band_distance(smooth, smooth)) == pytest.approx(0, abs=1e-6)
    assert losses.sliced_band_distance(rough_too, rough) < 0.5 * losses.sliced_band_distance(smooth, rough)


def test_band_distance_does_not_see_where_things_are() -> None:
    """A distribution has no places: a picture turned round within itself has the same patches."""
    style = pictures(1, 3, 64, 64)
    moved = losses.sliced_band_distance(style.roll((32, 32), (2, 3)), style, num_levels=2, patch=1)
    assert value(moved) == pytest.approx(0, abs=1e-12)


def test_band_distance_of_flat_pictures_is_their_difference_in_units_of_the_style() -> None:
    """Only the low bands differ, by .5 each; along a direction u of one pixel that is .5·|u1 + u2 + u3|."""
    stylized, style = torch.full((1, 3, 16, 16), 0.75), torch.full((1, 3, 16, 16), 0.25)
    torch.manual_seed(0)
    found = losses.sliced_band_distance(stylized, style, num_levels=1, num_slices=16, patch=1)
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(16, 12, 1, 1).flatten(1), dim=1)
    expected = (0.5 / (0.25 + 1e-2) * directions[:, :3].sum(dim=1)).abs().mean()
    torch.testing.assert_close(found, expected)


def test_band_distance_is_that_of_sorted_projections() -> None:
    """As defined: the k-th smallest against the k-th smallest."""
    stylized, style = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32, seed=1)
    torch.manual_seed(0)
    found = losses.sliced_band_distance(stylized, style, num_levels=1, num_slices=8)
    torch.manual_seed(0)
    directions = torch.randn(8, 12, 3, 3, dtype=torch.float64)
    directions = directions / directions.flatten(1).norm(dim=1)[:, None, None, None]
    (mine,), (theirs,) = losses.haar_pyramid(stylized, 1), losses.haar_pyramid(style, 1)
    scale = theirs.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-2
    sides = [F.conv2d(bands / scale, directions).flatten(2).sort(dim=2).values for bands in (mine, theirs)]
    torch.testing.assert_close(found, (sides[0] - sides[1]).abs().mean())


def test_a_batch_in_parts_has_the_mean_of_its_parts() -> None:
    """As ranks cut it: what is drawn at random must not depend on the number of images."""
    stylized, style = pictures(4, 3, 32, 32), pictures(4, 3, 32, 32, seed=1)
    queries, keys = unit(4, 8, 12, 12), unit(4, 8, 12, 12, seed=1)

    def both(rows: slice) -> Tensor:
        torch.manual_seed(0)
        bands = losses.sliced_band_distance(stylized[rows], style[rows])
        return torch.stack([bands, losses.patch_nce(queries[rows], keys[rows], 0.07)])

    torch.testing.assert_close((both(slice(0, 2)) + both(slice(2, 4))) / 2, both(slice(0, 4)))


@pytest.mark.parametrize("size", [33, 64])
def test_band_distance_has_gradients_at_any_size(size: int) -> None:
    stylized = torch.rand(1, 3, size, size, requires_grad=True)
    losses.sliced_band_distance(stylized, torch.rand(1, 3, size, size)).backward()
    assert stylized.grad is not None
    assert stylized.grad.abs().sum() > 0


def test_statistics_distance_by_hand() -> None:
    first, second = torch.tensor([[1.0, 5.0, 0.0]]), torch.tensor([[2.0, 1.0, 99.0]])
    spread = torch.tensor([0.5, 2.0, 1.0])
    assert value(losses.statistics_distance(first, second, spread)) == pytest.approx((2 + 2 + 10) / 3)


# --- gradients and precision of all ---------------------------------------------------------------------

POSITIVES = torch.tensor([0, 2, 4])
MASK = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
VALID = torch.tensor([True, True, False])
SPREAD = torch.full((4,), 0.3, dtype=torch.float64)
KERNEL = pictures(2, 3, 3, 3, seed=4)

# A loss as a function of tensors of the same shape and kind that it is given in training.
LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "squared_distance": (losses.squared_distance, (unit(3, 4), unit(3, 4, seed=1))),
    "pairwise_margin": (
        lambda a, b: losses.pairwise_margin(losses.squared_distance(a, b), torch.tensor([1, 0, 0]), 1.3),
        (unit(3, 4), unit(3, 4, seed=1)),
    ),
    "pairs": (
        lambda a, b, c: losses.pair_loss(a, b, c, 1.7, valid=VALID),
        tuple(unit(3, 4, seed=seed) for seed in (0, 1, 2)),
    ),
    "matrix": (lambda a, b: losses.matrix_loss(a, b, POSITIVES, 0.2), (unit(3, 4), unit(5, 4, seed=1))),
    "matrix_masked": (
        lambda a, b: losses.matrix_loss(a, b, POSITIVES, 0.2, MASK, VALID),
        (unit(3, 4), unit(5, 4, seed=1)),
    ),
    "patch_nce": (lambda q: losses.patch_nce(q, unit(2, 4, 3, 3, seed=1), 0.5, 5), (unit(2, 4, 3, 3),)),
    "cosine": (losses.off_diagonal_cosine, (unit(3, 4),)),
    "hinge_discriminator": (
        lambda r, f: losses.hinge_discriminator([r, r[:, :, :1]], [f, f[:, :, 1:]]),
        (2 * pictures(2, 1, 3, 3), 2 * pictures(2, 1, 3, 3, seed=1)),
    ),
    "hinge_generator": (lambda f: losses.hinge_generator([f, f[:, :, :1]]), (pictures(2, 1, 3, 3),)),
    "bce_discriminator": (
        lambda r, f: losses.bce_discriminator([r, r[:, :, :1]], [f, f[:, :, 1:]]),
        (2 * pictures(2, 1, 3, 3), 2 * pictures(2, 1, 3, 3, seed=1)),
    ),
    "bce_generator": (lambda f: losses.bce_generator([f, f[:, :, :1]]), (pictures(2, 1, 3, 3),)),
    "structure": (
        lambda a: losses.low_band_structure(a, pictures(1, 3, 16, 16, seed=1)),
        (pictures(1, 3, 16, 16),),
    ),
    "bands": (
        lambda a: losses.sliced_band_distance(a, pictures(2, 3, 9, 8, seed=1), 2, 4),
        (pictures(2, 3, 9, 8),),
    ),
    "statistics": (
        lambda a, b: losses.statistics_distance(a, b, SPREAD.to(a.dtype)),
        (unit(3, 4), unit(3, 4, seed=1)),
    ),
}


def r1_of(weights: Tensor) -> Tensor:
    """The penalty of a small critic, as a function of its weights."""
    images = pictures(2, 3, 6, 6).to(weights.dtype).requires_grad_()
    with torch.autocast("cpu", enabled=False):
        hidden = torch.tanh(F.conv2d(images, weights))
    return losses.r1_penalty([hidden[:, :1], hidden[:, 1:, ::2]], images)


@pytest.mark.parametrize("name", [*LOSSES, "r1"])
def test_gradients_by_finite_differences(name: str) -> None:
    loss, tensors = LOSSES.get(name, (r1_of, (KERNEL,)))

    def seeded(*arguments: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss(*arguments)

    assert torch.autograd.gradcheck(seeded, [tensor.clone().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("name", [*LOSSES, "r1"])
def test_autocast_changes_nothing(name: str) -> None:
    """All but convolutions of r1's critic, which are the caller's."""
    loss, tensors = LOSSES.get(name, (r1_of, (KERNEL,)))
    if name == "patch_nce":
        keys = unit(2, 4, 3, 3, seed=1).float()
        loss = lambda q: losses.patch_nce(q, keys, 0.5, 5)  # noqa: E731
    if name in ("structure", "bands"):
        other = pictures(*tensors[0].shape, seed=1).float()
        kind = losses.low_band_structure if name == "structure" else losses.sliced_band_distance
        loss = lambda a: kind(a, other)  # noqa: E731
    for dtype in (torch.float32, torch.bfloat16):
        found = []
        for enabled in (False, True):
            inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                made = loss(*inputs)
            assert made.dtype == torch.float32
            found.append((made, torch.autograd.grad(made.sum(), inputs)))
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_off_autocast_a_matrix_in_half_precision_is_computed_in_full() -> None:
    rows, columns = unit(8, 64).bfloat16(), unit(8, 64, seed=1).bfloat16()
    expected = losses.matrix_loss(rows.double(), columns.double(), torch.arange(8), 0.2)
    found = losses.matrix_loss(rows, columns, torch.arange(8), 0.2)
    assert value(found) == pytest.approx(value(expected), rel=1e-5)


def test_grid_pattern_sees_the_period_and_nothing_else():
    torch.manual_seed(0)
    grain = torch.randn(2, 3, 64, 96) * 0.1
    assert losses.grid_pattern(grain).abs().mean() < 0.3
    columns = grain + 0.1 * (torch.arange(96) % 2)
    found, before = losses.grid_pattern(columns), losses.grid_pattern(grain)
    at_half = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (0, 0)].index((0, 2))
    assert (found - before)[:, at_half].min() > 0.5
    others = [place for place in range(8) if place != at_half]
    torch.testing.assert_close(found[:, others], before[:, others], atol=0.05, rtol=0)
    torch.testing.assert_close(losses.grid_pattern(3 * grain + 0.2), before, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("period", "side"), [(2, 64), (4, 64), (8, 96)])
def test_the_grid_loss_takes_the_grid_out(period, side):
    torch.manual_seed(0)
    grid = 0.2 * (torch.arange(side) % period < period / 2)
    images = (torch.randn(1, 3, side, side) * 0.1 + grid).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.005)
    before = losses.grid_pattern(images, period).max().item()
    for _ in range(250):
        optimizer.zero_grad()
        losses.grid_loss(images).backward()
        optimizer.step()
    assert before > 1.5
    assert losses.grid_pattern(images, period).max() < 0.2
