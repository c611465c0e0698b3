"""The Haar transform against PyWavelets, its inverse, and what compilers make of it."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from nst.wavelets import haar_analysis, haar_pyramid, haar_synthesis


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 5), (1, 3)])
def test_analysis_equals_pywavelets(size: tuple[int, int], channels: int) -> None:
    images = torch.randn(2, channels, *size)
    low, high = haar_analysis(images)
    expected_low, details = pywt.dwt2(images.numpy(), "haar", mode="symmetric")
    np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-6)
    for band, expected in enumerate(details):
        np.testing.assert_allclose(high.numpy()[:, band::3], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(6, 8), (7, 10)])
def test_synthesis_equals_pywavelets(size: tuple[int, int]) -> None:
    low, high = torch.randn(2, 3, *size), torch.randn(2, 9, *size)
    details = tuple(high.numpy()[:, band::3] for band in range(3))
    expected = pywt.idwt2((low.numpy(), details), "haar")
    np.testing.assert_allclose(haar_synthesis(low, high).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("num_levels", [1, 4])
@pytest.mark.parametrize("size", [(32, 32), (33, 50)])
def test_pyramid_equals_pywavelets_level_by_level(size: tuple[int, int], num_levels: int) -> None:
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    low = images.numpy()
    for level in haar_pyramid(images, num_levels):
        low, details = pywt.dwt2(low, "haar", mode="symmetric")
        low, details = low / 2, [detail / 2 for detail in details]
        np.testing.assert_allclose(level[:, :3].numpy(), low, atol=1e-12)
        for band, expected in enumerate(details):
            np.testing.assert_allclose(level[:, 3 + band :: 3].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (33, 17), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_synthesis_inverts_analysis(size: tuple[int, int], memory_format: torch.memory_format) -> None:
    images = torch.randn(2, 3, *size).contiguous(memory_format=memory_format)
    restored = haar_synthesis(*haar_analysis(images), size)
    torch.testing.assert_close(restored, images, atol=1e-6, rtol=0, check_stride=False)


def test_energy_is_kept() -> None:
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    low, high = haar_analysis(images)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), images.square().sum())


def test_pyramid_keeps_the_range_of_a_constant_image() -> None:
    levels = haar_pyramid(torch.full((1, 3, 32, 32), 0.7), 4)
    assert [tuple(level.shape) for level in levels] == [(1, 12, 32 >> k, 32 >> k) for k in (1, 2, 3, 4)]
    for level in levels:
        torch.testing.assert_close(level[:, :3], torch.full_like(level[:, :3], 0.7))
        assert level[:, 3:].abs().max() < 1e-6


def test_wavelets_stay_in_fp32_under_autocast() -> None:
    images = torch.randn(1, 3, 8, 8)
    expected = haar_analysis(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = haar_analysis(images)
        restored = haar_synthesis(low, high)
        (level,) = haar_pyramid(images.bfloat16(), 1)
    assert low.dtype == high.dtype == restored.dtype == level.dtype == torch.float32
    assert torch.equal(low, expected[0])
    assert torch.equal(high, expected[1])


def test_float64_stays_and_gradients_are_exact() -> None:
    images = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert all(part.dtype == torch.float64 for part in haar_analysis(images))
    assert torch.autograd.gradcheck(lambda x: haar_synthesis(*haar_analysis(x), (5, 6)), images)
    assert torch.autograd.gradcheck(lambda x: tuple(haar_pyramid(x, 2)), images)


class RoundTrip(nn.Module):
    """Bands of two levels, and the picture put together again."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return haar_pyramid(images, 2)[1], haar_synthesis(*haar_analysis(images))


def test_the_transform_can_be_exported_for_any_size() -> None:
    # sides that are multiples of 4, as the networks want them: an odd one is another program
    shapes = {"images": {0: Dim("num", min=1), 2: 4 * Dim("height", min=1), 3: 4 * Dim("width", min=1)}}
    program = export(RoundTrip(), (torch.randn(2, 3, 16, 24),), dynamic_shapes=shapes).module()
    images = torch.randn(5, 3, 36, 8)
    torch.testing.assert_close(program(images), RoundTrip()(images))
    # exporting leaves nothing behind
    torch.testing.assert_close(haar_synthesis(*haar_analysis(images)), images)


@pytest.mark.faults  # half a minute of compiling, where the cache is cold
@pytest.mark.parametrize("size", [(16, 24), (9, 14)])
def test_the_transform_compiles_in_one_piece(size: tuple[int, int]) -> None:
    torch.compiler.reset()
    images = torch.randn(2, 3, *size, requires_grad=True)
    found = torch.compile(RoundTrip(), fullgraph=True, dynamic=False)(images)
    expected = RoundTrip()(images)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(bands.square().sum() + picture.sum(), images)[0]
        for bands, picture in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.faults  # as above
def test_one_compiled_pyramid_serves_all_sizes() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda images: haar_pyramid(images, 2), fullgraph=True, dynamic=True)
    for size in [(16, 24), (32, 16)]:
        images = torch.randn(2, 3, *size, requires_grad=True)
        found, expected = compiled(images), haar_pyramid(images, 2)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(levels[1].square().sum(), images)[0] for levels in (found, expected)]
        torch.testing.assert_close(*gradients)
