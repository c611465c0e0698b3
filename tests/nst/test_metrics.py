"""Measures against what is known of them: identities, baselines on real pictures, independent references."""

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from sklearn.datasets import load_sample_image

from nst import metrics
from nst.images import resize_shorter_side


def picture(rgb: np.ndarray, size: int = 256) -> torch.Tensor:
    """uint8 [H, W, 3] -> float [1, 3, size, size] in [0, 1], cut from the top left."""
    cut = resize_shorter_side(rgb, size)[:size, :size]
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def contents() -> torch.Tensor:
    return torch.cat(
        [picture(rgb) for rgb in (data.astronaut(), data.chelsea(), load_sample_image("china.jpg"))]
    )


@pytest.fixture(scope="module")
def styles() -> torch.Tensor:
    return torch.cat(
        [picture(rgb) for rgb in (load_sample_image("flower.jpg"), data.retina(), data.coffee())]
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_baselines_bracket_every_model(contents: torch.Tensor, styles: torch.Tensor) -> None:
    found = {
        name: metrics.pair_measures(pictures, contents, styles)
        for name, pictures in metrics.baselines(contents, styles).items()
    }
    unchanged, copied, moved = found["content"], found["style"], found["color_transfer"]
    assert max(unchanged["content_distance"]) < 1e-5
    assert min(unchanged["ssim"]) > 0.999
    assert max(unchanged["hist_content"]) == pytest.approx(0, abs=1e-3)
    assert max(unchanged["border_error"]) == pytest.approx(1)
    assert max(copied["style_distance"]) < 1e-3
    assert min(copied["content_distance"]) > 0.7
    assert mean(copied["edge_ssim"]) < 0.5
    # a model has to beat the transfer of colours on style without losing the content
    assert mean(moved["style_distance"]) < 0.75 * mean(unchanged["style_distance"])
    assert mean(moved["content_distance"]) < 0.1
    assert {*found["content"], "style_sensitivity", "shift_consistency"} == set(metrics.LOWER_IS_BETTER)


def test_the_styles_own_shapes_show_in_a_double_exposure_only(
    contents: torch.Tensor, styles: torch.Tensor
) -> None:
    both = (contents + metrics.style_copy(contents, styles)) / 2
    assert float(metrics.structure_copied(contents, styles).max()) < 0.15
    assert float(metrics.structure_copied(metrics.color_transfer(contents, styles), styles).max()) < 0.15
    assert float(metrics.structure_copied(both, styles).min()) > 0.3
    assert float(metrics.structure_copied(metrics.style_copy(contents, styles), styles).min()) > 0.999


def test_texture_counts_as_style_where_colours_agree(contents: torch.Tensor, styles: torch.Tensor) -> None:
    moved = metrics.color_transfer(contents, styles)
    textured = (moved + 0.05 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )
    grainy = (styles + 0.05 * torch.randn(moved.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    assert bool((metrics.style_distance(textured, grainy) < metrics.style_distance(moved, grainy)).all())


def test_a_brighter_content_keeps_its_structure(contents: torch.Tensor) -> None:
    assert float(metrics.content_distance(contents * 0.6 + 0.2, contents).max()) < 0.01
    assert float(metrics.content_distance(contents.flip(3), contents).min()) > 0.3


def test_style_distance_takes_other_sizes(contents: torch.Tensor, styles: torch.Tensor) -> None:
    same, cut = (
        metrics.style_distance(contents, styles),
        metrics.style_distance(contents, styles[:, :, :255, :201]),
    )
    assert float((same - cut).abs().max()) < 0.05


def test_ssim_agrees_with_scikit_image(contents: torch.Tensor) -> None:
    noise = torch.randn(contents.shape, generator=torch.Generator().manual_seed(0))
    noisy = (contents + 0.1 * noise).clamp(0, 1)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for ours, one, other in zip(metrics.ssim(noisy, contents), noisy, contents, strict=True):
        lights = [metrics.luminance(part[None])[0, 0].numpy() for part in (one, other)]
        assert float(ours) == pytest.approx(structural_similarity(*lights, **options), abs=0.005)


def test_checkerboard_sees_a_grid_that_the_eye_hardly_does(contents: torch.Tensor) -> None:
    before = metrics.checkerboard(contents)
    marked = contents.clone()
    marked[:, :, ::2, ::2] = (marked[:, :, ::2, ::2] + 6 / 255).clamp(0, 1)
    assert float((metrics.checkerboard(marked) - before).min()) > 0.25


def test_border_error_sees_a_spoiled_border(contents: torch.Tensor) -> None:
    spoiled = contents.clone()
    spoiled[:, :, :6] = 0.5
    assert float(metrics.border_error(spoiled, contents).min()) > 2


def test_sensitivity_is_zero_if_the_style_is_ignored(contents: torch.Tensor) -> None:
    assert metrics.style_sensitivity(contents[:1].expand(3, -1, -1, -1)) == pytest.approx(0, abs=1e-6)
    assert metrics.style_sensitivity(contents) > 0.1
    parts = metrics.sensitivity_parts(contents)
    assert len(parts) == len(contents)
    assert np.mean(parts) == pytest.approx(metrics.style_sensitivity(contents), rel=1e-5)


def test_histograms_of_black_and_white_share_nothing() -> None:
    black, white = torch.zeros(1, 3, 40, 40), torch.ones(1, 3, 64, 33)
    assert float(metrics.histogram_distance(black, white)) == 1
    assert float(metrics.histogram_distance(white, white)) == 0


def test_color_transfer_reaches_the_styles_statistics() -> None:
    generator = torch.Generator().manual_seed(0)
    content = torch.rand(2, 3, 64, 64, generator=generator) * 0.3 + 0.1
    style = torch.rand(2, 3, 64, 64, generator=generator) * 0.2 + 0.4
    moved = metrics.color_transfer(content, style)
    assert torch.allclose(moved.mean(dim=(2, 3)), style.mean(dim=(2, 3)), atol=1e-4)
    assert torch.allclose(moved.std(dim=(2, 3)), style.std(dim=(2, 3)), atol=1e-3)


def same(pictures: torch.Tensor) -> torch.Tensor:
    return pictures


def test_what_looks_at_single_pixels_is_consistent_under_shifts(contents: torch.Tensor) -> None:
    for stylize in (same, lambda pictures: 1 - pictures, lambda pictures: pictures.sqrt()):
        assert metrics.shift_consistency(stylize, contents).tolist() == [0, 0, 0]


def test_shift_consistency_is_the_strength_of_a_pattern_that_stays_where_it_is() -> None:
    def striped(pictures: torch.Tensor) -> torch.Tensor:
        """Every other column lighter by a tenth, wherever the content is."""
        marked = pictures.clone()
        marked[..., ::2] += 0.1
        return marked

    content = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0)) * 0.8
    assert metrics.shift_consistency(striped, content).tolist() == pytest.approx([0.1, 0.1])
    # a shift by the period does not show it, which is why (3, 5) is usual
    assert metrics.shift_consistency(striped, content, (3, 4)).tolist() == pytest.approx([0, 0])


def test_blocks_show_as_inconsistency(contents: torch.Tensor) -> None:
    def blocks(pictures: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(pictures, 8)
        return torch.nn.functional.interpolate(means, scale_factor=8, mode="nearest")

    def blurred(pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pictures, 9, stride=1, padding=4, count_include_pad=False)

    rough, smooth = (metrics.shift_consistency(kind, contents) for kind in (blocks, blurred))
    assert bool((rough > 3 * smooth).all())


def test_stylized_windows_are_multiples_of_the_networks_stride() -> None:
    sizes = []

    def stylize(pictures: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(pictures.shape[2:]))
        return pictures

    metrics.shift_consistency(stylize, torch.zeros(1, 3, 67, 100))
    assert sizes == [(64, 80), (64, 80)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.ssim(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 65)), "same size"),
        (
            lambda: metrics.style_distance(torch.full((1, 3, 64, 64), -1.0), torch.zeros(1, 3, 64, 64)),
            r"\[0, 1\]",
        ),
        (lambda: metrics.checkerboard(torch.full((1, 3, 64, 64), float("nan"))), r"\[0, 1\]"),
        (lambda: metrics.checkerboard(torch.zeros(1, 3, 16, 64)), "64x16 px"),
        (lambda: metrics.checkerboard(torch.zeros(3, 64, 64)), "floats"),
        (lambda: metrics.style_sensitivity(torch.zeros(1, 3, 64, 64)), "2 styles"),
        (lambda: metrics.shift_consistency(same, torch.zeros(1, 3, 64, 64), (0, 0)), "moves nothing"),
        (lambda: metrics.shift_consistency(same, torch.zeros(1, 3, 64, 64), (-1, 2)), "down and right"),
        (lambda: metrics.shift_consistency(same, torch.zeros(1, 3, 34, 64)), "64x34 px leaves no 32 px"),
        (lambda: metrics.shift_consistency(lambda p: p[:, :, 1:], torch.zeros(1, 3, 64, 64)), "same size"),
        (lambda: metrics.shift_consistency(lambda p: p - 1, torch.zeros(1, 3, 64, 64)), r"\[0, 1\]"),
    ],
)
def test_mistakes_say_what_to_do(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
