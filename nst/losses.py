"""The losses: tensors in, scalar out. P is the paper that `nst` implements, arXiv 2302.03875.

Embeddings are unit vectors, images lie in [-1, 1]. "Rows" are this rank's, "columns" all ranks'
(`nst.distributed.gather`). Half types are computed in fp32, and an autocast around a loss changes nothing;
float64 stays. What is drawn at random comes from torch's generator and does not depend on the number of
images, so that a batch cut into parts of one size has the mean of its parts' losses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nst.wavelets import full_precision, haar_analysis, haar_pyramid

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601

Reduction = Literal["mean", "none"]


def _without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast lets products of fp32 matrices run in bf16; none may in here."""
    return torch.autocast(tensor.device.type, enabled=False)


def _reduced(values: Tensor, valid: Tensor | None, reduction: Reduction) -> Tensor:
    """[n] -> the mean over valid rows (0 if there are none), or [n] with zeros at the others."""
    if valid is not None:
        values = values.where(valid, 0)
    if reduction == "none":
        return values
    return values.mean() if valid is None else values.sum() / valid.sum().clamp(min=1)


# --- between embeddings -------------------------------------------------------------------------------


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Euclidean distance of unit vectors, row by row: [N, D], [N, D] -> [N] in [0, 4]."""
    return (full_precision(first) - full_precision(second)).square().sum(dim=1)


def pairwise_margin(distances: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
    """P, pairwise margin loss: y·d + (1 - y)·max(0, m - d), mean over pairs. Hadsell et al. 2006, eq. 4,
    without its halves and with d in place of both squares.

    Args:
        distances: squared distances, any shape.
        same: 1 where the pair belongs together, 0 where not; same shape.
    """
    distances = full_precision(distances)
    same = same.to(distances.dtype)
    return (same * distances + (1 - same) * F.relu(margin - distances)).mean()


def pair_loss(
    rows: Tensor,
    positives: Tensor,
    negatives: Tensor,
    margin: float = 1.0,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """The pairwise margin loss on fixed pairs: each row with one positive and one negative, both halves
    weighing the same: ½·d(row, positive) + ½·max(0, m - d(row, negative)).

    Args:
        rows, positives, negatives: [n, D] unit vectors.
        valid: [n] bool; rows without a positive are left out.
        reduction: `mean` over the valid rows, 0 if there are none; `none` gives [n], zeros at the others.
    """
    near, far = squared_distance(rows, positives), squared_distance(rows, negatives)
    return _reduced(0.5 * (near + F.relu(margin - far)), valid, reduction)


def matrix_loss(
    rows: Tensor,
    columns: Tensor,
    positives: Tensor,
    temperature: float,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """P, matrix loss: S = A·Bᵀ/tau, cross-entropy of each row onto its positive column (Sohn 2016,
    N-pair; van den Oord et al. 2018, eq. 4, InfoNCE).

    A collapsed encoder scores exactly ln(number of columns that are not left out).

    Args:
        rows: [n, D] anchors; columns: [m, D] candidates.
        positives: [n] int64, the column of each row's positive; of no account where the row is not valid.
        mask: [n, m] bool, True where a column is to be left out (the row itself, other works by the same
            artist). The positive always counts.
        valid: [n] bool; rows without a positive are left out.
        reduction: `mean` over the valid rows, 0 if there are none; `none` gives [n], zeros at the others.
    """
    if valid is not None:
        positives = positives.where(valid, 0)
    with _without_autocast(rows):
        similarity = full_precision(rows) @ full_precision(columns).T / temperature
    if mask is not None:
        mask = mask.scatter(1, positives[:, None], False)
        similarity = similarity.masked_fill(mask, float("-inf"))
    return _reduced(F.cross_entropy(similarity, positives, reduction="none"), valid, reduction)


def patch_nce(queries: Tensor, keys: Tensor, temperature: float, num_patches: int = 64) -> Tensor:
    """PatchNCE (Park et al. 2020, eq. 3): a place in one map must know the same place in the other among
    other places of the same image.

    Args:
        queries, keys: [N, d, h, w], unit norm along d; keys are detached.
        num_patches: places drawn at random, the same in all images.
    """
    num, _, height, width = queries.shape
    places = torch.randperm(height * width, device=queries.device)[:num_patches]
    queries = full_precision(queries).flatten(2)[:, :, places].transpose(1, 2)  # [N, p, d]
    keys = full_precision(keys.detach()).flatten(2)[:, :, places]  # [N, d, p]
    with _without_autocast(queries):
        similarity = torch.bmm(queries, keys) / temperature  # [N, p, p]
    target = torch.arange(len(places), device=queries.device).expand(num, -1)
    return F.cross_entropy(similarity.flatten(0, 1), target.flatten())


def off_diagonal_cosine(embeddings: Tensor) -> Tensor:
    """Mean cosine between different rows of [N, D]: near 1 means that the encoder has collapsed."""
    with _without_autocast(embeddings):
        similarity = full_precision(embeddings) @ full_precision(embeddings).T
    num = len(similarity)
    return (similarity.sum() - similarity.diagonal().sum()) / max(num * (num - 1), 1)


# --- adversarial --------------------------------------------------------------------------------------


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """E max(0, 1 - D(real)) + E max(0, 1 + D(fake)) (Lim and Ye 2017), mean over the discriminator's
    maps of logits, any shapes."""
    terms = [
        F.relu(1 - full_precision(r)).mean() + F.relu(1 + full_precision(f)).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """The generator's side of the hinge loss: -E D(fake)."""
    return torch.stack([-full_precision(logits).mean() for logits in fake]).mean()


def bce_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """-E log σ(D(real)) - E log(1 - σ(D(fake))) (Goodfellow et al. 2014, eq. 1; P, content discriminator),
    mean over the maps of logits, any shapes. Undecided logits score 2 ln 2."""
    terms = [
        F.softplus(-full_precision(r)).mean() + F.softplus(full_precision(f)).mean()
        for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def bce_generator(fake: Sequence[Tensor]) -> Tensor:
    """The generator's side in the form that does not saturate: -E log σ(D(fake)) (Goodfellow et al. 2014,
    section 3)."""
    return torch.stack([F.softplus(-full_precision(logits)).mean() for logits in fake]).mean()


def r1_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """½·E|∇ D(x)|² at real images, D being the sum of the means of its maps (Mescheder et al. 2018,
    section 4.1, gamma = 1).

    Args:
        logits: maps [N, 1, h, w] made from `images`.
        images: [N, C, H, W]; must require grad.
    """
    score = torch.stack([full_precision(part).mean(dim=(1, 2, 3)) for part in logits]).sum()
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    return 0.5 * full_precision(gradient).square().sum(dim=(1, 2, 3)).mean()


# --- between pictures ---------------------------------------------------------------------------------


def luminance(images: Tensor) -> Tensor:
    """ITU-R BT.601 luma: [N, 3, H, W] -> [N, 1, H, W], same range."""
    red, green, blue = (weight * full_precision(images[:, place]) for place, weight in enumerate(LUMINANCE))
    return (red + green + blue)[:, None]


def low_band_structure(stylized: Tensor, content: Tensor, num_levels: int = 3) -> Tensor:
    """Mean absolute difference of low-band luminance, each standardised over its image: where light and
    dark are must stay; how light and how dark is the style's.

    Args:
        stylized, content: [N, 3, H, W], same size.
        num_levels: Haar levels; the band that counts has 1/2^num_levels of the size.
    """

    def structure(images: Tensor) -> Tensor:
        band = luminance(images)
        for _ in range(num_levels):
            band = haar_analysis(band)[0] / 2
        centred = band - band.mean(dim=(2, 3), keepdim=True)
        return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-4).sqrt()

    return (structure(stylized) - structure(content)).abs().mean()


def grid_pattern(images: Tensor, longest: int = 4) -> Tensor:
    """Grids of periods 2, 4 and so on up to `longest` px, as upsampling networks leave them: [N, F], about 0
    without, 1 for ten times the energy of the frequencies around.

    log10 of the luminance's power at the multiples of 1 / `longest` from 0 to 1/2, along both axes but at
    (0, 0), each over the mean power in a ring of 5 to 10 bins around it. A Hann window keeps the picture's
    borders out. JPEG files score a little above 0: their blocks are 8 px.

    Args:
        images: [N, 3, H, W], 12 px times `longest` or more a side, or the rings hold the grids beside them;
            scale and offset make no difference.
    """
    light = luminance(images)[:, 0]
    height, width = (side - side % longest for side in light.shape[1:])
    light = light[:, :height, :width]
    window = torch.outer(
        torch.hann_window(height, device=light.device), torch.hann_window(width, device=light.device)
    )
    power = torch.fft.fft2((light - light.mean(dim=(1, 2), keepdim=True)) * window).abs().square()
    offsets = torch.arange(-10, 11, device=light.device)
    radius = torch.hypot(offsets[:, None].float(), offsets[None, :].float())
    peak, ring = (shape.float() for shape in (radius < 1.5, (radius >= 5) & (radius <= 10)))
    ratios = []
    for row, column in itertools.product(range(longest // 2 + 1), repeat=2):
        if row == column == 0:
            continue
        rows = (row * height // longest + offsets) % height
        columns = (column * width // longest + offsets) % width
        patch = power[:, rows][:, :, columns]
        at, around = ((patch * shape).sum(dim=(1, 2)) / shape.sum() for shape in (peak, ring))
        ratios.append(torch.log10((at + 1e-8) / (around + 1e-8)))
    return torch.stack(ratios, dim=1)


def grid_loss(images: Tensor) -> Tensor:
    """How much stronger grids of period 2 to 8 px are than the frequencies around them, where they are: 0 in
    most photographs. [N, 3, H, W], 96 px or more a side; smaller ones are asked for periods up to 4 px."""
    longest = 8 if min(images.shape[2:]) >= 96 else 4
    return grid_pattern(images, longest).clamp(min=0).mean()


def sliced_band_distance(
    stylized: Tensor, style: Tensor, num_levels: int = 4, num_slices: int = 32, patch: int = 3
) -> Tensor:
    """Sliced Wasserstein distance of patches of Haar bands (Rabin et al. 2011; Heitz et al. 2021).

    At each level the distribution of `patch` x `patch` neighbourhoods over all bands is compared along
    random directions, in units of the style's own spread along that direction.

    Args:
        stylized, style: [N, 3, H, W], same size. The style gets no gradient.
        num_slices: directions a level, the same for all images.
    """
    terms = []
    for mine, theirs in zip(
        haar_pyramid(stylized, num_levels), haar_pyramid(style.detach(), num_levels), strict=True
    ):
        kernel = min(patch, *mine.shape[2:])
        directions = torch.randn(
            num_slices, mine.shape[1], kernel, kernel, device=mine.device, dtype=mine.dtype
        )
        directions = directions / directions.flatten(1).norm(dim=1)[:, None, None, None]
        # details are small beside the low band: bring all bands to the style's scale first
        scale = theirs.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-2
        with _without_autocast(mine):
            first = F.conv2d(mine / scale, directions).flatten(2)
            second = F.conv2d(theirs / scale, directions).flatten(2)
        terms.append((first - _transported(first, second)).abs().mean())
    return torch.stack(terms).mean()


@torch.no_grad()
def _transported(source: Tensor, target: Tensor) -> Tensor:
    """The values of `target` in the order of `source`, along the last dimension: the k-th smallest of one
    where the other has its k-th smallest, which is the optimal transport of one dimension."""
    if source.device.type == "cpu":
        # NumPy's vectorised sorts are 5 to 20 times as fast as torch.sort on a CPU
        order = torch.from_numpy(np.argsort(source.detach().numpy(), axis=-1))
        values = torch.from_numpy(np.sort(target.numpy(), axis=-1))
    else:
        order, values = source.argsort(dim=-1), target.sort(dim=-1).values
    return torch.empty_like(values).scatter_(-1, order, values)


def statistics_distance(first: Tensor, second: Tensor, spread: Tensor) -> Tensor:
    """Mean absolute difference of channel statistics [N, F], in units of their spread [F] over pictures; a
    difference counts as 10 spreads at most."""
    return ((full_precision(first) - full_precision(second)).abs() / spread).clamp(max=10).mean()
