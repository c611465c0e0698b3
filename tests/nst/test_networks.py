from dataclasses import replace

import pytest
import torch

from nst.approaches import UniganModel
from nst.networks.blocks import (
    InstanceNorm,
    RunningStandardisation,
    channel_statistics,
    conv,
    record_statistics,
    replay_statistics,
)
from nst.networks.generator import Generator, soft_clip
from nst.networks.style_code import colour_statistics
from nst.networks.style_generator import pad_to_multiple
from nst.networks.wavelet_encoder import WaveletEncoder, tap_statistics

SMALL = UniganModel(content_widths=(4, 8, 8, 12), style_width=4, num_blocks=1, embedding_dim=16)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(SMALL).eval().requires_grad_(False)


def test_instance_norm_equals_pytorchs():
    features = torch.randn(2, 5, 7, 9) * 3 + 1
    expected = torch.nn.functional.instance_norm(features)
    torch.testing.assert_close(InstanceNorm()(features), expected, atol=1e-5, rtol=1e-4)


def test_instance_norm_takes_the_scale_and_shift_it_is_given():
    features, scale, shift = torch.randn(2, 3, 16, 16), torch.rand(2, 3) + 0.5, torch.randn(2, 3)
    drawn = InstanceNorm()(features, scale, shift)
    torch.testing.assert_close(drawn.mean(dim=(2, 3)), shift, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn.std(dim=(2, 3), correction=0), scale, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 1), (4, 2), (3, 2), (1, 1)])
def test_convolutions_keep_or_halve_the_size(kernel, stride):
    assert conv(3, 4, kernel, stride)(torch.randn(1, 3, 16, 16)).shape == (1, 4, 16 // stride, 16 // stride)


def test_replayed_statistics_make_a_tile_look_like_the_whole(generator):
    picture = torch.rand(1, 3, 32, 320) * 2 - 1
    picture[:, :, :, 128:] *= 0.1  # the right part alone has other statistics
    code = generator.encode_style(torch.rand(1, 3, 64, 64) * 2 - 1)
    with record_statistics(generator) as statistics:
        whole = generator(picture, code)
    tile = picture[:, :, :, 128:]
    alone = generator(tile, code)
    with replay_statistics(generator, statistics):
        replayed = generator(tile, code)
    inside = (..., slice(None), slice(120, None))  # out of sight of the cut, which the tile pads
    error_alone = (alone[inside] - whole[:, :, :, 128:][inside]).abs().mean()
    error_replayed = (replayed[inside] - whole[:, :, :, 128:][inside]).abs().mean()
    assert error_replayed < 0.2 * error_alone
    torch.testing.assert_close(generator(picture, code), whole)  # nothing stays switched on


def test_the_output_has_the_styles_colours(generator):
    style = torch.rand(1, 3, 64, 64) * 0.2 + torch.tensor([0.5, -0.2, -0.6]).reshape(1, 3, 1, 1)
    stylized = generator(torch.rand(1, 3, 64, 64) * 2 - 1, generator.encode_style(style))
    torch.testing.assert_close(stylized.mean(dim=(2, 3)), style.mean(dim=(2, 3)), atol=0.02, rtol=0)


def test_codes_are_encoded_once_and_mixed(generator):
    styles, content = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    codes = generator.encode_style(styles)
    assert len(codes) == 3
    alone = generator(content, generator.encode_style(styles[1:2]))
    torch.testing.assert_close(generator(content, codes[1]), alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(generator(content, codes.mix([0, 5, 0])), alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="3 styles need 3 weights"):
        codes.mix([1, 1])
    with pytest.raises(ValueError, match="not all 0"):
        codes.mix([0, 0, 0])


def test_direct_statistics_reach_the_norms_of_their_stride_as_they_are():
    torch.manual_seed(0)
    generator = Generator(replace(SMALL, content_widths=(4, 6, 8, 12), direct_statistics=True))
    style = torch.rand(2, 3, 64, 64) * 2 - 1
    taps = [channel_statistics(tap) for tap in generator.style_encoder(style)]
    parts = generator.encode_style(style).modulation.split(generator.decoder.splits, dim=1)
    for part, (tap, channels) in zip(parts, [(2, 12), (2, 12), (1, 8), (0, 6), (0, 4)], strict=True):
        scale, shift = part.chunk(2, dim=1)
        handed_out = torch.arange(channels) % taps[tap][0].shape[1]  # in turn, where the tap has fewer
        torch.testing.assert_close(shift, taps[tap][0][:, handed_out])
        torch.testing.assert_close(1 + scale, taps[tap][1][:, handed_out])


def test_a_picture_that_is_too_small_is_named(generator):
    with pytest.raises(ValueError, match="10x40 pixels is too small"):
        pad_to_multiple(torch.zeros(1, 3, 40, 10), 8)


def test_soft_clip_leaves_most_alone_and_never_passes_one():
    values = torch.linspace(-3, 3, 601)
    clipped = soft_clip(values)
    assert clipped.abs().max() <= 1
    inner = values.abs() <= 0.8
    torch.testing.assert_close(clipped[inner], values[inner])
    assert (clipped.diff() >= 0).all()


def test_taps_have_the_sizes_that_the_method_names():
    encoder = WaveletEncoder(32)
    taps = encoder(torch.randn(1, 3, 256, 256))
    assert [tuple(tap.shape[1:]) for tap in taps] == [
        (32, 128, 128), (64, 64, 64), (128, 32, 32), (128, 16, 16),
    ]  # fmt: skip
    assert tap_statistics(taps).shape == (1, 704)


def test_absolute_bands_forget_the_sign():
    torch.manual_seed(0)
    encoder = WaveletEncoder(4, absolute=True)
    picture = torch.randn(1, 3, 32, 32)
    first = encoder(picture)[0]
    # mirrored within each 2x2 block: details change sign, the low band does not
    flipped = picture.reshape(1, 3, 32, 16, 2).flip(4).reshape(1, 3, 32, 32)
    torch.testing.assert_close(encoder(flipped)[0], first)


def test_colour_statistics_by_numpy():
    pictures = torch.rand(2, 3, 20, 20)
    found = colour_statistics(pictures)
    pixels = pictures[0].flatten(1)
    covariance = torch.cov(pixels, correction=0)
    torch.testing.assert_close(found[0, :3], pixels.mean(1))
    torch.testing.assert_close(found[0, 3:6], (covariance.diagonal() + 1e-5).sqrt())
    torch.testing.assert_close(found[0, 6:], covariance[[0, 0, 1], [1, 2, 2]])


def test_running_standardisation_converges_to_what_it_sees():
    standardise = RunningStandardisation(3)
    spread = torch.tensor([1.0, 10.0, 0.1])
    for _ in range(200):
        standardise.update(torch.randn(64, 3) * spread + 5)
    seen = standardise(torch.randn(2000, 3) * spread + 5)
    torch.testing.assert_close(seen.std(dim=0), torch.ones(3), atol=0.1, rtol=0)
    torch.testing.assert_close(seen.mean(dim=0), torch.zeros(3), atol=0.15, rtol=0)
