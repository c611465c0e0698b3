"""What one training step sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's part of a global batch: P artists x K works, and as many photos.

    P and the size may differ from step to step. Where batches are drawn without regard to artists, an artist
    may have any number of works here, anywhere.

    Attributes:
        content: [N, 3, H, W] in [-1, 1], photos.
        style: [N, 3, H, W] in [-1, 1], artworks; the K works of an artist are neighbours.
        labels: [N] int64, the artist (or class) of each artwork.
        works_per_class: K.
        step: which step of the training this batch is for.
    """

    content: Tensor
    style: Tensor
    labels: Tensor
    works_per_class: int
    step: int

    @property
    def num_images(self) -> int:
        return len(self.content)

    @property
    def partner(self) -> Tensor:
        """[N] int64: for each artwork another work by the same artist, itself a reference elsewhere: the next
        one, behind the last the first. The artwork itself if the artist has no other one here."""
        order = torch.argsort(self.labels, stable=True)
        ordered = self.labels[order]
        first = torch.searchsorted(ordered, ordered)
        end = torch.searchsorted(ordered, ordered, right=True)
        following = torch.arange(1, len(order) + 1, device=order.device)
        following = torch.where(following < end, following, first)
        return torch.empty_like(order).scatter_(0, order, order[following])

    @property
    def has_partner(self) -> Tensor:
        """[N] bool: whether there is another work by the same artist in this rank's part."""
        return self.partner != torch.arange(len(self.labels), device=self.labels.device)

    def to(self, device: torch.device | str) -> Batch:
        content, style = (
            part.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
            for part in (self.content, self.style)
        )
        return replace(self, content=content, style=style, labels=self.labels.to(device, non_blocking=True))
