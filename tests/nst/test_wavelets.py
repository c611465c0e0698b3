import numpy as np
import pytest
import pywt
import torch

from nst.wavelets import haar_analysis, haar_pyramid, haar_synthesis


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 5), (1, 3)])
def test_analysis_equals_pywavelets(size):
    images = torch.randn(2, 3, *size)
    low, high = haar_analysis(images)
    expected_low, details = pywt.dwt2(images.numpy(), "haar", mode="symmetric")
    np.testing.assert_allclose(low.numpy(), expected_low, atol=1e-6)
    for band, expected in enumerate(details):
        np.testing.assert_allclose(high.numpy()[:, band::3], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (33, 17)])
def test_synthesis_inverts_analysis(size):
    images = torch.randn(2, 3, *size)
    restored = haar_synthesis(*haar_analysis(images), size)
    torch.testing.assert_close(restored, images, atol=1e-6, rtol=0)


def test_energy_is_kept():
    images = torch.randn(1, 3, 16, 16)
    low, high = haar_analysis(images)
    torch.testing.assert_close(low.square().sum() + high.square().sum(), images.square().sum())


def test_pyramid_keeps_the_range_of_a_constant_image():
    levels = haar_pyramid(torch.full((1, 3, 32, 32), 0.7), 4)
    assert [tuple(level.shape) for level in levels] == [(1, 12, 32 >> k, 32 >> k) for k in (1, 2, 3, 4)]
    for level in levels:
        torch.testing.assert_close(level[:, :3], torch.full_like(level[:, :3], 0.7))
        assert level[:, 3:].abs().max() < 1e-6


def test_wavelets_stay_in_fp32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = haar_analysis(torch.randn(1, 3, 8, 8))
        restored = haar_synthesis(low, high)
    assert low.dtype == high.dtype == restored.dtype == torch.float32
