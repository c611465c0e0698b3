import math

import pytest
import torch
import torch.nn.functional as F

from nst import losses


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=1)


def test_pairwise_margin_by_hand():
    distances = torch.tensor([0.25, 0.25, 3.0, 3.0])
    same = torch.tensor([1, 0, 1, 0])
    # 0.25, 1 - 0.25, 3, max(0, 1 - 3)
    assert losses.pairwise_margin(distances, same).item() == pytest.approx((0.25 + 0.75 + 3.0 + 0.0) / 4)


def test_matrix_loss_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss = losses.matrix_loss(rows, rows, torch.tensor([0, 1]), temperature=0.5)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)))


def test_a_collapsed_encoder_scores_the_logarithm_of_the_columns():
    rows = torch.ones(4, 8) / 8**0.5
    loss = losses.matrix_loss(rows, rows.repeat(3, 1), torch.arange(4), temperature=0.2)
    assert loss.item() == pytest.approx(math.log(12), rel=1e-5)


def test_masked_columns_do_not_count_but_the_positive_always_does():
    rows, columns = unit(3, 8).float(), unit(5, 8).float()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = True
    mask[0, 0] = True  # the positive of row 0: stays
    positives = torch.tensor([0, 1, 2])
    expected = losses.matrix_loss(rows, columns[:3], positives, 0.2)
    torch.testing.assert_close(losses.matrix_loss(rows, columns, positives, 0.2, mask), expected)


def test_patch_nce_is_low_only_where_places_correspond():
    maps = F.normalize(torch.randn(2, 64, 6, 6), dim=1)
    right = losses.patch_nce(maps, maps, 0.07, num_patches=36)
    wrong = losses.patch_nce(maps, maps.flip(2), 0.07, num_patches=36)
    assert right < 0.1 < 1 < wrong


def test_hinge_by_hand():
    real, fake = [torch.tensor([[[[2.0, 0.0]]]])], [torch.tensor([[[[-2.0, 0.5]]]])]
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(0.5 + 0.75)
    assert losses.hinge_generator(fake).item() == pytest.approx(0.75)


def test_r1_of_a_linear_critic_is_half_its_squared_slope():
    images = torch.randn(4, 3, 5, 5, requires_grad=True)
    weights = torch.randn(3)
    logits = torch.einsum("nchw,c->nhw", images, weights)[:, None]
    # each of the 25 logits has the slope w / 25 at its own pixel
    expected = 0.5 * weights.square().sum().item() / 25
    assert losses.r1_penalty([logits], images).item() == pytest.approx(expected, rel=1e-5)


def test_structure_ignores_brightness_and_contrast():
    torch.manual_seed(0)
    content = F.interpolate(torch.rand(2, 3, 8, 8), (64, 64), mode="bicubic") * 2 - 1
    darker = content * 0.6 - 0.3
    assert losses.low_band_structure(darker, content) < 0.01
    assert losses.low_band_structure(content.flip(3), content) > 0.5


def test_band_distance_orders_styles():
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 4, 4), (128, 128), mode="bilinear") * 2 - 1
    rough = (smooth + 0.5 * torch.randn(1, 3, 128, 128)).clamp(-1, 1)
    rough_too = (smooth + 0.5 * torch.randn(1, 3, 128, 128)).clamp(-1, 1)
    assert losses.sliced_band_distance(smooth, smooth).item() == pytest.approx(0, abs=1e-6)
    assert losses.sliced_band_distance(rough_too, rough) < 0.5 * losses.sliced_band_distance(smooth, rough)


@pytest.mark.parametrize("size", [33, 64])
def test_band_distance_has_gradients_at_any_size(size):
    stylized = torch.rand(1, 3, size, size, requires_grad=True)
    losses.sliced_band_distance(stylized, torch.rand(1, 3, size, size)).backward()
    assert stylized.grad is not None
    assert stylized.grad.abs().sum() > 0


def test_gradients_by_finite_differences():
    rows, columns = unit(3, 4).requires_grad_(), unit(5, 4)
    maps, keys = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True), torch.randn(1, 4, 2, 2)

    def difference(function, tensor):
        tensor.grad = None
        function(tensor).backward()
        direction = torch.randn_like(tensor)
        assert tensor.grad is not None
        step = 1e-3
        with torch.no_grad():
            numeric = (function(tensor + step * direction) - function(tensor - step * direction)) / (2 * step)
        torch.testing.assert_close(
            (tensor.grad * direction).sum().float(), numeric.float(), rtol=2e-2, atol=1e-3
        )

    positives = torch.tensor([0, 2, 4])
    difference(lambda r: losses.matrix_loss(r, columns, positives, 0.2), rows)
    difference(lambda r: losses.squared_distance(r, columns[:3]).mean(), rows)
    torch.manual_seed(1)
    difference(lambda m: losses.patch_nce(m, keys, 0.5, num_patches=4) * 1.0, maps)


def test_cosine_tells_collapse():
    assert losses.off_diagonal_cosine(torch.ones(5, 3) / 3**0.5).item() == pytest.approx(1, abs=1e-6)
    assert losses.off_diagonal_cosine(torch.eye(5)).item() == pytest.approx(0, abs=1e-6)
