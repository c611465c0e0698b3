"""How good a stylization is: measures that need no pretrained weights, and baselines to read them beside.
Features of a VGG-19 can be added (`nst.vgg`), and whether the artist is recognised (`nst.retrieval`). LPIPS
needs weights that no package brings along: the distance of relu features stands for it.

Every measure takes float pictures [N, 3, H, W] in [0, 1] and returns one figure a picture, [N]. Measures
against the content need its very size; measures against the style take any size, but should compare pictures
of about the same scale. Read content and style figures together: a single one can prefer the unchanged
content or the copied style.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nst.losses import grid_pattern, luminance
from nst.wavelets import haar_analysis

# To be raised by hand when any measure gives other figures than before for the same pictures: these, those
# of `nst.vgg` and `nst.retrieval`, and what `pipelines.measure_models` makes of them. Figures of different
# versions are not compared.
MEASURES_VERSION = 1

MIN_SIDE = 32  # px
STRIDE = 16  # px, of the networks; no shift should be a multiple of it
NUM_LEVELS = 4
QUANTISATION = 1 / 255
LOWER_IS_BETTER = {
    "content_distance": True,
    "edge_ssim": False,
    "ssim": False,
    "hist_content": True,
    "style_distance": True,
    "hist_style": True,
    "structure_copied": True,
    "checkerboard": True,
    "border_error": True,
    "style_sensitivity": False,
    "shift_consistency": True,
}

# Orthonormal axes of colour: light, blue-yellow, green-magenta. Natural pictures vary most along the first,
# so that the spread along each says something of its own.
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
_OPPONENT = _OPPONENT / _OPPONENT.norm(dim=1, keepdim=True)
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4


def check_pictures(pictures: Tensor, name: str = "pictures") -> Tensor:
    """The pictures in fp32; ValueError unless they are float [N, 3, H, W] in [0, 1], 32 px or more a side."""
    if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.is_floating_point():
        found = f"{pictures.dtype} {list(pictures.shape)}"
        raise ValueError(f"{name} are {found}; give floats [N, 3, H, W] in [0, 1]")
    if min(pictures.shape[2:]) < MIN_SIDE:
        size = f"{pictures.shape[3]}x{pictures.shape[2]}"
        raise ValueError(f"{name} are {size} px; measures need {MIN_SIDE} px or more a side")
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(f"{name} hold values from {low:.3g} to {high:.3g}; give values in [0, 1]")
    return pictures.float().clamp(0, 1)


def _check_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape != second.shape:
        raise ValueError(
            f"stylized is {list(first.shape)}, content {list(second.shape)}; give pictures of the same size"
        )
    return check_pictures(first, "stylized"), check_pictures(second, "content")


def band_statistics(pictures: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of the bands of a full Haar wavelet packet tree, level by level.

    Level 0 is the picture on three opponent colour axes; at level k each of the 4^(k-1) bands before is
    split into four. Bands are halved at each split, which keeps low bands in the range of the picture.

    Returns:
        Levels 0..4 as (mean, std), each [N, 3 * 4^k].
    """
    pictures = check_pictures(pictures)
    bands = torch.einsum("oc,nchw->nohw", _OPPONENT.to(pictures.device), pictures)
    levels = []
    for level in range(NUM_LEVELS + 1):
        if level:
            low, high = haar_analysis(bands)
            bands = torch.cat([low, high], dim=1) / 2
        variance, mean = torch.var_mean(bands, dim=(2, 3), correction=0)
        levels.append((mean, variance.sqrt()))
    return levels


def style_distance(stylized: Tensor, style: Tensor) -> Tensor:
    """How far colours and textures are from the style's: 0 the same statistics, 1 nothing in common.

    Each band of `band_statistics` is taken as a normal distribution with its mean and standard deviation
    (widened by one step of 8-bit quantisation). The distance is the Hellinger distance of the two, the root
    of `1 - sqrt(2 s t / (s² + t²)) exp(-(m - n)² / 4(s² + t²))`, averaged over bands, then over levels.
    """
    distances = []
    for (mean, std), (other_mean, other_std) in zip(
        band_statistics(stylized), band_statistics(style), strict=True
    ):
        variance, other_variance = std**2 + QUANTISATION**2, other_std**2 + QUANTISATION**2
        total = variance + other_variance
        overlap = (2 * (variance * other_variance).sqrt() / total).sqrt()
        overlap = overlap * torch.exp(-((mean - other_mean) ** 2) / (4 * total))
        distances.append((1 - overlap).clamp(min=0).sqrt().mean(dim=1))
    return torch.stack(distances).mean(dim=0)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's, of [N, 1, H, W] pairs -> [N]. Two flat pictures agree."""
    first, second = first.flatten(1), second.flatten(1)
    first, second = first - first.mean(dim=1, keepdim=True), second - second.mean(dim=1, keepdim=True)
    floor = QUANTISATION**2
    covariance = (first * second).mean(dim=1) + floor
    spread = ((first**2).mean(dim=1) + floor) * ((second**2).mean(dim=1) + floor)
    return covariance / spread.sqrt()


def content_distance(stylized: Tensor, content: Tensor) -> Tensor:
    """How far the structure is from the content's: 0 the same, about 1 unrelated, up to 2.

    `1 - r`, averaged over Haar levels 2, 3 and 4 and over two maps of the luminance: its low band (where is
    it light) and the root of the energy of its detail bands (where are edges). r is Pearson's correlation,
    so that a change of brightness or contrast, which a style may well ask for, costs nothing.
    """
    stylized, content = _check_pair(stylized, content)
    lows = [luminance(stylized), luminance(content)]
    distances = []
    for level in range(1, NUM_LEVELS + 1):
        split = [haar_analysis(low) for low in lows]
        lows = [low / 2 for low, _ in split]
        edges = [(high**2).sum(dim=1, keepdim=True).sqrt() / 2 for _, high in split]
        if level >= 2:
            distances += [1 - _correlation(*lows), 1 - _correlation(*edges)]
    return torch.stack(distances).mean(dim=0).clamp(min=0)


def structure_copied(stylized: Tensor, style: Tensor) -> Tensor:
    """How much of the style picture's own structure shows in the result: about 0 none, 1 a copy. A double
    exposure of content and style has it, which statistics of colours and textures take for style.

    `1 - content_distance` to the style, which may be of another size.
    """
    return 1 - content_distance(stylized, style_copy(stylized, check_pictures(style, "style")))


def _gaussian(maps: Tensor) -> Tensor:
    """An 11-tap Gaussian of sigma 1.5 over [N, 1, H, W], without borders."""
    taps = torch.arange(-5, 6, device=maps.device, dtype=maps.dtype)
    taps = torch.exp(-(taps**2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    return F.conv2d(F.conv2d(maps, taps.view(1, 1, 1, 11)), taps.view(1, 1, 11, 1))


def _ssim_of_maps(first: Tensor, second: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of [N, 1, H, W] pairs of data range 1: 11x11 Gaussian, sigma 1.5."""
    mean, other = _gaussian(first), _gaussian(second)
    variance = _gaussian(first**2) - mean**2
    other_variance = _gaussian(second**2) - other**2
    covariance = _gaussian(first * second) - mean * other
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean * other + c1) / (mean**2 + other**2 + c1)
    structure = (2 * covariance + c2) / (variance + other_variance + c2)
    return (light * structure).mean(dim=(1, 2, 3))


def ssim(stylized: Tensor, content: Tensor) -> Tensor:
    """SSIM of the luminances: 1 the same picture, about 0 unrelated."""
    stylized, content = _check_pair(stylized, content)
    return _ssim_of_maps(luminance(stylized), luminance(content))


def sobel_magnitude(pictures: Tensor) -> Tensor:
    """Length of the luminance gradient, [N, 3, H, W] -> [N, 1, H, W]; 1 at a step from black to white."""
    kernel = _SOBEL.to(pictures.device, pictures.dtype)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    gradient = F.conv2d(F.pad(luminance(pictures), (1, 1, 1, 1), mode="replicate"), kernels)
    return gradient.norm(dim=1, keepdim=True)


def edge_ssim(stylized: Tensor, content: Tensor) -> Tensor:
    """SSIM of the Sobel magnitudes of the luminances: are edges where they were, and as strong."""
    stylized, content = _check_pair(stylized, content)
    return _ssim_of_maps(sobel_magnitude(stylized), sobel_magnitude(content))


def histogram_distance(first: Tensor, second: Tensor) -> Tensor:
    """Hellinger distance `sqrt(1 - sum sqrt(p q))` of 8x8x8 RGB histograms: 0 the same colours, 1 none
    shared. The sizes of the two may differ."""
    histograms = []
    for pictures in (check_pictures(first), check_pictures(second)):
        cells = (pictures * 8).long().clamp(max=7)
        cells = (cells[:, 0] * 64 + cells[:, 1] * 8 + cells[:, 2]).flatten(1)
        counts = torch.stack([torch.bincount(row, minlength=512) for row in cells])
        histograms.append(counts / cells.shape[1])
    overlap = (histograms[0] * histograms[1]).sqrt().sum(dim=1)
    return (1 - overlap).clamp(min=0).sqrt()


def checkerboard(pictures: Tensor) -> Tensor:
    """Grids of period 2 and 4 px, as upsampling networks leave them: about 0 without, 1 for ten times the
    energy of the frequencies around (`nst.losses.grid_pattern`, averaged over its frequencies)."""
    return grid_pattern(check_pictures(pictures)).mean(dim=1)


def border_error(stylized: Tensor, content: Tensor) -> Tensor:
    """Change near the border over change in the middle: 1 where borders are as good as the rest.

    The change is the absolute difference of luminances, each at mean 0 and standard deviation 1; the border
    is a sixteenth of the shorter side. Unchanged content gives 1.
    """
    stylized, content = _check_pair(stylized, content)
    standard = []
    for pictures in (stylized, content):
        variance, mean = torch.var_mean(luminance(pictures), dim=(1, 2, 3), keepdim=True, correction=0)
        standard.append((luminance(pictures) - mean) / (variance.sqrt() + QUANTISATION))
    change = (standard[0] - standard[1]).abs()[:, 0]
    band = max(2, min(change.shape[1:]) // 16)
    inside = change[:, band:-band, band:-band]
    num_border = change[0].numel() - inside[0].numel()
    border = (change.sum(dim=(1, 2)) - inside.sum(dim=(1, 2))) / num_border
    floor = 1e-3
    return (border + floor) / (inside.mean(dim=(1, 2)) + floor)


def style_sensitivity(outputs: Tensor) -> float:
    """How much the style matters: the standard deviation over styles of one content's outputs [S, 3, H, W],
    averaged over pixels and channels. 0 says that the style is ignored."""
    outputs = check_pictures(outputs, "outputs")
    if len(outputs) < 2:
        raise ValueError(f"style_sensitivity got {len(outputs)} output; give one content in 2 styles or more")
    return float(outputs.std(dim=0, correction=0).mean())


def sensitivity_parts(outputs: Tensor) -> list[float]:
    """`style_sensitivity` style by style, for intervals over styles: [S], whose mean it is.

    A style's part is `(s + d² / s) / 2`, averaged over pixels and channels, with `d` its difference to the
    mean of all styles and `s` their deviation: `s` and what the style moves it by (the influence function of
    a standard deviation; the infinitesimal jackknife of Jaeckel 1972).
    """
    outputs = check_pictures(outputs, "outputs")
    deviation, mean = torch.std_mean(outputs, dim=0, correction=0)
    moves = (outputs - mean) ** 2 / deviation.clamp(min=1e-12)
    return ((deviation + moves) / 2).mean(dim=(1, 2, 3)).tolist()


@torch.inference_mode()
def shift_consistency(
    stylize: Callable[[Tensor], Tensor], content: Tensor, shift: tuple[int, int] = (3, 5)
) -> Tensor:
    """How much a picture changes where the content is only moved: [N], the mean absolute difference in the
    overlap, 0 if none (as EQ-T of Karras et al. 2021 asks of generators). Textures that hang on
    the pixel grid rather than on the content, as aliasing leaves them, show here.

    Two windows of the content are stylized, of one size that is a multiple of 16 px, the second `shift`
    below and to the right of the first. Borders count: they too should not depend on where they are.

    Args:
        stylize: [N, 3, h, w] in [0, 1] -> pictures of the same size, in the same style each time.
        content: [N, 3, H, W] in [0, 1], at least `shift` larger than 32 px.
        shift: px down and to the right; 1 or more together, no multiples of the network's stride.

    Raises:
        ValueError: the content is too small, a shift is negative or none at all, or `stylize` gives other
            sizes or values.
    """
    content = check_pictures(content, "content")
    down, right = shift
    if min(shift) < 0 or max(shift) == 0:
        raise ValueError(f"shift {shift} moves nothing, or not down and right; (3, 5) is usual")
    height, width = (
        (side - move) // STRIDE * STRIDE for side, move in zip(content.shape[2:], shift, strict=True)
    )
    if min(height, width) < MIN_SIDE:
        size = f"{content.shape[3]}x{content.shape[2]}"
        raise ValueError(f"content of {size} px leaves no {MIN_SIDE} px beside a shift of {shift}")
    drawn = []
    for top, left in ((0, 0), shift):
        window = content[:, :, top : top + height, left : left + width]
        made = check_pictures(stylize(window), "stylized")
        if made.shape != window.shape:
            raise ValueError(f"stylize made {list(made.shape)} of {list(window.shape)}; give the same size")
        drawn.append(made)
    first, second = drawn[0][:, :, down:, right:], drawn[1][:, :, : height - down, : width - right]
    return (first - second).abs().mean(dim=(1, 2, 3))


def pair_measures(stylized: Tensor, content: Tensor, style: Tensor) -> dict[str, list[float]]:
    """Every measure of N stylized pictures beside their contents and styles: name -> N figures.

    Args:
        stylized, content: [N, 3, H, W] in [0, 1]. style: [N, 3, h, w] in [0, 1].

    Raises:
        ValueError: sizes, numbers or ranges do not fit.
    """
    if len(stylized) != len(style):
        raise ValueError(f"{len(stylized)} stylized and {len(style)} style pictures; give as many of each")
    measures = {
        "content_distance": content_distance(stylized, content),
        "edge_ssim": edge_ssim(stylized, content),
        "ssim": ssim(stylized, content),
        "hist_content": histogram_distance(stylized, content),
        "style_distance": style_distance(stylized, style),
        "hist_style": histogram_distance(stylized, style),
        "structure_copied": structure_copied(stylized, style),
        "checkerboard": checkerboard(stylized),
        "border_error": border_error(stylized, content),
    }
    return {name: values.tolist() for name, values in measures.items()}


def style_copy(content: Tensor, style: Tensor) -> Tensor:
    """Baseline: the style picture itself, resized to the content's size."""
    return F.interpolate(style, size=content.shape[2:], mode="bilinear", antialias=True).clamp(0, 1)


def color_transfer(content: Tensor, style: Tensor) -> Tensor:
    """Baseline: each RGB channel of the content moved to the style's mean and standard deviation, as
    Reinhard et al. (2001) do on other axes; cut to [0, 1]."""
    variance, mean = torch.var_mean(content, dim=(2, 3), keepdim=True, correction=0)
    style_variance, style_mean = torch.var_mean(style, dim=(2, 3), keepdim=True, correction=0)
    gain = (style_variance / variance.clamp(min=QUANTISATION**2)).sqrt()
    return ((content - mean) * gain + style_mean).clamp(0, 1)


def baselines(content: Tensor, style: Tensor) -> dict[str, Tensor]:
    """What every model is read beside: doing nothing, copying the style, moving the colours."""
    return {
        "content": content,
        "style": style_copy(content, style),
        "color_transfer": color_transfer(content, style),
    }
