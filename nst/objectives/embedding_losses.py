"""What the encoders of approach 2 are told of artists and contents, over the batches of all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nst import losses
from nst.approaches import UniganLoss
from nst.batch import Batch
from nst.distributed import gather, gather_labels, mean_over_ranks, rank


def artist_losses(
    weights: UniganLoss, rows: Tensor, works: Tensor, batch: Batch, fakes: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """How badly each row is told to be by its artist: [N], and what guessing would score.

    `matrix`: the row against all ranks' works and fakes, where the positive is another work by the artist
    and the artist's remaining works are left out (paper, matrix loss). `pairs`: one positive, one
    negative (paper, pairwise margin loss).

    Args:
        rows: [N, D] embeddings of this rank's artworks, or of pictures in their styles.
        works: [N, D] embeddings of this rank's artworks.
        fakes: [N, D] embeddings that are nobody's.
    """
    num = len(rows)
    if not weights.fakes_as_negatives:
        fakes = None
    if weights.metric == "pairs":
        others = works[_next_of_another(batch.labels)] if fakes is None else fakes
        loss = losses.pair_loss(
            rows, works[batch.partner], others, weights.margin, batch.has_partner, reduction="none"
        )
        return loss, None
    columns, labels = gather(works), gather_labels(batch.labels)
    positives = batch.partner + num * rank()
    left_out = batch.labels[:, None] == labels[None, :]
    if fakes is not None:
        columns = torch.cat([columns, gather(fakes)])
        left_out = F.pad(left_out, (0, len(columns) - len(labels)))
    num_columns = (~left_out).sum(dim=1) + 1  # the positive counts too
    loss = losses.matrix_loss(rows, columns, positives, weights.temperature, left_out, reduction="none")
    return loss, num_columns.float().log().mean()


def content_margin(rows: Tensor, columns: Tensor, margin: float) -> Tensor:
    """(c, T(c)) belong together, (c_i, c_j) do not; both kinds weigh the same (paper, pairwise margin loss).

    Args:
        rows: [N, D] embeddings *h* of this rank's contents; columns: of all ranks' other looks of them.
    """
    own = torch.arange(len(rows), device=rows.device) + len(rows) * rank()
    same = F.one_hot(own, len(columns)).bool()
    distances = (2 - 2 * rows @ columns.T).clamp(min=0)  # squared, of unit vectors
    together = losses.pairwise_margin(distances[same], torch.ones_like(distances[same]), margin)
    apart = losses.pairwise_margin(distances[~same], torch.zeros_like(distances[~same]), margin)
    return 0.5 * (together + apart)


def mean_over_valid(values: Tensor, valid: Tensor) -> Tensor:
    """This rank's part of the mean over the valid rows of all ranks: DDP's mean over ranks makes it whole."""
    count = mean_over_ranks(valid.sum().float()).clamp(min=1e-6)
    return torch.where(valid, values, 0.0).sum() / count


def _next_of_another(labels: Tensor) -> Tensor:
    """[N] for each row the next one, cyclically, with another label; row 0 where there is none."""
    num = len(labels)
    places = torch.arange(num, device=labels.device)
    ahead = (places[None, :] - places[:, None]) % num
    return ahead.where(labels[:, None] != labels[None, :], num).argmin(dim=1)
