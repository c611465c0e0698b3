"""Measures against what is known of them: identities, baselines on real pictures, independent references."""

import os

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from sklearn.datasets import load_sample_image

from nst import metrics
from nst.images import resize_shorter_side
from nst.vgg import VGGFeatures


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
    assert {*found["content"], "style_sensitivity"} == set(metrics.LOWER_IS_BETTER)


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


def test_bootstrap_interval_covers_the_mean_and_repeats() -> None:
    values = np.random.default_rng(0).normal(3, 1, 200).tolist()
    interval = metrics.bootstrap_interval(values)
    assert interval == metrics.bootstrap_interval(values)
    assert interval.low < interval.mean < interval.high
    half_width = 1.96 * float(np.std(values)) / 200**0.5
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)


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
        (lambda: metrics.bootstrap_interval([]), "no values"),
    ],
)
def test_mistakes_say_what_to_do(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.skipif("NST_VGG_WEIGHTS" not in os.environ, reason="NST_VGG_WEIGHTS names no file")
def test_vgg_measures_agree_with_the_baselines(contents: torch.Tensor, styles: torch.Tensor) -> None:
    vgg = VGGFeatures.load(os.environ["NST_VGG_WEIGHTS"])
    copies = metrics.baselines(contents, styles)
    unchanged = vgg.pair_measures(copies["content"], contents, styles)
    copied = vgg.pair_measures(copies["style"], contents, styles)
    moved = vgg.pair_measures(copies["color_transfer"], contents, styles)
    assert max(unchanged["content_r31"]) == 0
    assert max(copied["gram"] + copied["style_r11"] + copied["style_r31"]) < 1e-4
    assert mean(copied["content_r31"]) > 1
    assert mean(moved["style_r11"]) < mean(unchanged["style_r11"])
    assert set(moved) == {"content_r31", "style_r11", "style_r21", "style_r31", "gram"}
    assert all(len(values) == 3 for values in moved.values())


def test_vgg_weights_that_are_none(tmp_path) -> None:
    (tmp_path / "vgg.safetensors").write_bytes(b"no weights")
    for path in ("vgg.safetensors", "missing.safetensors"):
        with pytest.raises(ValueError, match=path):
            VGGFeatures.load(str(tmp_path / path))
