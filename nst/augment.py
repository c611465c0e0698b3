"""Augmentations on the batch: of content (its look changes, what is in it does not) and of what a
discriminator judges. They draw from PyTorch's generator, which the training loop seeds at every step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nst.distributed import rank, world_size
from nst.networks.blocks import channel_statistics
from nst.wavelets import haar_analysis, haar_synthesis


def change_look(content: Tensor, artworks: Tensor) -> Tensor:
    """T(c): another rendering of the same content (method: encoder step, E_c margin).

    Random colour matrix, gamma, posterisation, blur and noise; half of the images also take the statistics
    of an artwork's Haar bands. No gradients. What is drawn for an image does not depend on how the global
    batch is cut into ranks.

    Args:
        content, artworks: [N, 3, H, W] in [-1, 1].

    Returns:
        [N, 3, H, W] in [-1, 1].
    """
    with torch.no_grad():
        draws = _draw_for_each(len(content), 17).to(content.device)[:, :, None, None]
        normal, coins = draws[:, :13], draws[:, 13:].mul(0.5**0.5).erf().add(1).div(2)  # normal -> uniform

        images = torch.where(coins[:, :1] < 0.5, _take_band_statistics(content, artworks), content)
        matrix = torch.eye(3, device=content.device) + 0.25 * normal[:, :9].reshape(-1, 3, 3)
        images = torch.einsum("nij,njhw->nihw", matrix, images) + 0.1 * normal[:, 9:12]
        gamma = torch.exp(0.4 * normal[:, 12:13])
        images = ((images.clamp(-1, 1) + 1) / 2).clamp(min=1e-4).pow(gamma) * 2 - 1
        steps = 4 + (12 * coins[:, 1:2]).floor()
        images = torch.where(coins[:, 1:2] < 0.3, (images * steps).round() / steps, images)
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.where(coins[:, 2:3] < 0.3, blurred, images)
        noise = torch.randn(1, *images.shape[1:], device=images.device)  # one for all: see above
        return (images + 0.05 * coins[:, 3:4] * noise).clamp(-1, 1)


def _draw_for_each(num: int, num_draws: int) -> Tensor:
    """[num, num_draws] normal numbers for this rank's images, drawn for the whole global batch."""
    return torch.randn(num * world_size(), num_draws)[rank() * num : (rank() + 1) * num]


def _take_band_statistics(content: Tensor, artworks: Tensor) -> Tensor:
    """AdaIN of one Haar level: content's bands with the artworks' means and deviations."""
    low_c, high_c = haar_analysis(content)
    low_a, high_a = haar_analysis(artworks)
    return haar_synthesis(_match(low_c, low_a), _match(high_c, high_a), (content.shape[2], content.shape[3]))


def _match(features: Tensor, target: Tensor) -> Tensor:
    (mean, std), (mean_t, std_t) = channel_statistics(features), channel_statistics(target)
    gain = (std_t / std.clamp(min=1e-3))[:, :, None, None]
    return (features - mean[:, :, None, None]) * gain + mean_t[:, :, None, None]


def draw_augmentation(num: int) -> Tensor:
    """What `diff_augment` does with each of this rank's `num` images: [num, 4] in [0, 1), on the CPU. Drawn
    for the whole global batch, so that the number of ranks changes nothing."""
    return torch.rand(num * world_size(), 4)[rank() * num : (rank() + 1) * num]


def diff_augment(images: Tensor, draws: Tensor, max_shift: float = 0.125, cutout: float = 0.25) -> Tensor:
    """DiffAugment (Zhao et al. 2020) by translation and cutout, each image its own; never by colour, since
    colour is style. Differentiable; what leaves at one border comes back at the other.

    Args:
        images: [N, 3, H, W].
        draws: [N, 4] in [0, 1), from `draw_augmentation`.
        max_shift, cutout: shares of the side.
    """
    height, width = images.shape[2:]
    sides = (height, width)
    moved, mask = [], torch.ones(len(images), 1, height, width)
    for number, (image, draw) in enumerate(zip(images.unbind(), draws.tolist(), strict=True)):
        shifts = [round((2 * d - 1) * max_shift * side) for d, side in zip(draw[:2], sides, strict=True)]
        moved.append(torch.roll(image, shifts, dims=(1, 2)))
        cuts = [int(side * cutout) for side in sides]
        starts = [int(d * (side - cut + 1)) for d, side, cut in zip(draw[2:], sides, cuts, strict=True)]
        mask[number, :, starts[0] : starts[0] + cuts[0], starts[1] : starts[1] + cuts[1]] = 0
    stacked = torch.stack(moved).contiguous(memory_format=torch.channels_last)
    return stacked * mask.to(stacked)
