"""The losses: tensors in, scalar out, in fp32. P is the paper that `nst` implements, arXiv 2302.03875.

Embeddings are unit vectors. "Rows" are this rank's, "columns" all ranks' (`nst.distributed.gather`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nst.wavelets import haar_analysis, haar_pyramid

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """Squared Euclidean distance of unit vectors, row by row: [N, D], [N, D] -> [N] in [0, 4]."""
    return (first.float() - second.float()).square().sum(dim=1)


def pairwise_margin(distances: Tensor, same: Tensor, margin: float = 1.0) -> Tensor:
    """P, pairwise margin loss: y·d + (1 - y)·max(0, m - d), mean over pairs (Hadsell et al. 2006).

    Args:
        distances: squared distances, any shape.
        same: 1 where the pair belongs together, 0 where not; same shape.
    """
    same = same.to(distances.dtype)
    return (same * distances + (1 - same) * F.relu(margin - distances)).mean()


def matrix_loss(
    rows: Tensor, columns: Tensor, positives: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """P, matrix loss: S = A·Bᵀ/tau, cross-entropy of each row onto its positive column (Sohn 2016, N-pair;
    van den Oord et al. 2018, InfoNCE).

    A collapsed encoder scores exactly ln(number of columns).

    Args:
        rows: [n, D] anchors; columns: [m, D] candidates.
        positives: [n] int64, the column of each row's positive.
        mask: [n, m] bool, True where a column is to be left out (other works by the same artist).
    """
    similarity = rows.float() @ columns.float().T / temperature
    if mask is not None:
        mask = mask.scatter(1, positives[:, None], False)
        similarity = similarity.masked_fill(mask, float("-inf"))
    return F.cross_entropy(similarity, positives)


def patch_nce(queries: Tensor, keys: Tensor, temperature: float, num_patches: int = 64) -> Tensor:
    """PatchNCE (Park et al. 2020): a place in one map must know the same place in the other among other
    places of the same image.

    Args:
        queries, keys: [N, d, h, w], unit norm along d; keys are detached.
        num_patches: places drawn at random, the same in all images.
    """
    num, _, height, width = queries.shape
    places = torch.randperm(height * width, device=queries.device)[:num_patches]
    queries = queries.float().flatten(2)[:, :, places].transpose(1, 2)  # [N, p, d]
    keys = keys.detach().float().flatten(2)[:, :, places]  # [N, d, p]
    similarity = torch.bmm(queries, keys) / temperature  # [N, p, p]
    target = torch.arange(len(places), device=queries.device).expand(num, -1)
    return F.cross_entropy(similarity.flatten(0, 1), target.flatten())


def hinge_discriminator(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Hinge loss of a discriminator (Lim and Ye 2017), mean over its maps of logits."""
    terms = [
        F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def hinge_generator(fake: Sequence[Tensor]) -> Tensor:
    """The generator's side of the hinge loss."""
    return torch.stack([-logits.float().mean() for logits in fake]).mean()


def r1_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """½·E|∇ D(x)|² at real images (Mescheder et al. 2018); `images` must require grad."""
    score = torch.stack([part.float().mean(dim=(1, 2, 3)) for part in logits]).sum()
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    return 0.5 * gradient.float().square().sum(dim=(1, 2, 3)).mean()


def luminance(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W], same range."""
    weights = torch.tensor(LUMINANCE, dtype=torch.float32, device=images.device)
    return torch.einsum("nchw,c->nhw", images.float(), weights)[:, None]


def low_band_structure(stylized: Tensor, content: Tensor, num_levels: int = 3) -> Tensor:
    """Mean absolute difference of low-band luminance, each standardised over its image: where light and
    dark are must stay; how light and how dark is the style's."""

    def structure(images: Tensor) -> Tensor:
        band = luminance(images)
        for _ in range(num_levels):
            band = haar_analysis(band)[0] / 2
        centred = band - band.mean(dim=(2, 3), keepdim=True)
        return centred / (centred.square().mean(dim=(2, 3), keepdim=True) + 1e-4).sqrt()

    return (structure(stylized) - structure(content)).abs().mean()


def sliced_band_distance(
    stylized: Tensor, style: Tensor, num_levels: int = 4, num_slices: int = 32, patch: int = 3
) -> Tensor:
    """Sliced Wasserstein distance of patches of Haar bands (Rabin et al. 2011; Heitz et al. 2021).

    At each level the distribution of `patch` x `patch` neighbourhoods over all bands is compared along
    random directions, in units of the style's own spread along that direction.

    Args:
        stylized, style: [N, 3, H, W], same size.
    """
    terms = []
    for mine, theirs in zip(haar_pyramid(stylized, num_levels), haar_pyramid(style, num_levels), strict=True):
        kernel = min(patch, *mine.shape[2:])
        directions = torch.randn(num_slices, mine.shape[1], kernel, kernel, device=mine.device)
        directions = directions / directions.flatten(1).norm(dim=1)[:, None, None, None]
        with torch.autocast(mine.device.type, enabled=False):
            # details are small beside the low band: bring all bands to the style's scale first
            scale = theirs.square().mean(dim=(2, 3), keepdim=True).sqrt() + 1e-2
            first = F.conv2d(mine / scale, directions).flatten(2).sort(dim=2).values
            second = F.conv2d(theirs / scale, directions).flatten(2).sort(dim=2).values
        terms.append((first - second).abs().mean())
    return torch.stack(terms).mean()


def statistics_distance(first: Tensor, second: Tensor, spread: Tensor) -> Tensor:
    """Mean absolute difference of channel statistics [N, F], in units of their spread [F] over pictures."""
    return ((first.float() - second.float()).abs() / spread).clamp(max=10).mean()


def off_diagonal_cosine(embeddings: Tensor) -> Tensor:
    """Mean cosine between different rows of [N, D]: near 1 means that the encoder has collapsed."""
    similarity = embeddings.float() @ embeddings.float().T
    num = len(similarity)
    return (similarity.sum() - similarity.diagonal().sum()) / max(num * (num - 1), 1)
