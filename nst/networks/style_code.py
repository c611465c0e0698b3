"""From a picture's statistics to the code that drives every AdaIN of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.networks.blocks import RunningStandardisation
from nst.wavelets import full_precision

NUM_COLOUR_STATISTICS = 9


@dataclass(frozen=True)
class StyleCode:
    """The styles of M pictures, as the decoder takes them. Codes mix linearly.

    Attributes:
        modulation: [M, D], scale and shift of every AdaIN, side by side; or [M, 3, S, S], the style picture
            itself, for a generator that takes it beside the content.
        colour_mean: [M, 3], mean RGB in [-1, 1].
        colour_std: [M, 3], its standard deviation.
    """

    modulation: Tensor
    colour_mean: Tensor
    colour_std: Tensor

    def _map(self, function) -> StyleCode:
        return StyleCode(function(self.modulation), function(self.colour_mean), function(self.colour_std))

    def __len__(self) -> int:
        return len(self.modulation)

    def __getitem__(self, index: int | slice | Tensor) -> StyleCode:
        """The code of one style (as a batch of one) or of several."""
        chosen = slice(index, index + 1) if isinstance(index, int) else index
        return self._map(lambda part: part[chosen])

    def expand(self, num: int) -> StyleCode:
        """One style for `num` images."""
        assert len(self) in (1, num), (len(self), num)
        return self._map(lambda part: part.expand(num, *part.shape[1:]))

    def mix(self, weights: Sequence[float] | Tensor) -> StyleCode:
        """A weighted mean of the M styles, as a batch of one. Weights are normalised to sum 1.

        Raises:
            ValueError: as many weights as styles are needed, none negative, not all zero.
        """
        shares = torch.as_tensor(weights, dtype=torch.float32, device=self.modulation.device)
        if shares.shape != (len(self),) or bool((shares < 0).any()) or float(shares.sum()) <= 0:
            raise ValueError(
                f"{len(self)} styles need {len(self)} weights of 0 or more, not all 0; got {shares.tolist()}"
            )
        shares = shares / shares.sum()
        return self._map(lambda part: torch.tensordot(shares, part, dims=1)[None])

    def to(self, *args, **kwargs) -> StyleCode:
        return self._map(lambda part: part.to(*args, **kwargs))


def colour_statistics(images: Tensor) -> Tensor:
    """RGB mean (3), standard deviation (3) and covariances (3) of images [N, 3, H, W]: [N, 9], fp32."""
    pixels = full_precision(images).flatten(2)
    mean = pixels.mean(dim=2)
    centred = pixels - mean[:, :, None]
    covariance = centred @ centred.transpose(1, 2) / pixels.shape[2]
    variance = covariance.diagonal(dim1=1, dim2=2)
    off_diagonal = torch.stack([covariance[:, 0, 1], covariance[:, 0, 2], covariance[:, 1, 2]], dim=1)
    return torch.cat([mean, (variance + 1e-5).sqrt(), off_diagonal], dim=1)


class Modulator(nn.Module):
    """Tap and colour statistics -> 128-d code *m* -> scale and shift of every AdaIN.

    A linear path beside the two-layer one lets the statistics reach the decoder from the first step.

    Args:
        num_statistics: length of the tap statistics.
        num_outputs: AdaIN parameters needed, summed over the decoder.
    """

    def __init__(self, num_statistics: int, num_outputs: int, hidden: int = 256, code_dim: int = 128) -> None:
        super().__init__()
        num_features = num_statistics + NUM_COLOUR_STATISTICS
        self.standardise = RunningStandardisation(num_features)
        self.hidden = nn.Linear(num_features, hidden)
        self.code = nn.Linear(hidden, code_dim)
        self.direct = nn.Linear(NUM_COLOUR_STATISTICS, code_dim, bias=False)
        self.outputs = _small_linear(code_dim, num_outputs)

    def observe(self, statistics: Tensor, colours: Tensor) -> None:
        """Takes this rank's batch into the running statistics; once a step, every rank."""
        self.standardise.update(torch.cat([statistics, colours], dim=1))

    def forward(self, statistics: Tensor, colours: Tensor) -> StyleCode:
        """statistics [N, F] of the taps, colours [N, 9]."""
        features = self.standardise(torch.cat([statistics, colours], dim=1))
        code = self.code(F.leaky_relu(self.hidden(features), 0.2))
        code = code + self.direct(features[:, -NUM_COLOUR_STATISTICS:])
        return StyleCode(full_precision(self.outputs(code)), colours[:, :3], colours[:, 3:6])


class StatisticsModulator(nn.Module):
    """The style encoder's own channel statistics -> scale and shift of every AdaIN at the same stride (Huang
    and Belongie 2017, eq. 8, with a linear map between).

    The maps begin as the identity, so that every style draws another picture from the first step on; through
    a code that is learned from nothing all styles draw nearly the same one for hundreds of steps.

    Args:
        tap_channels: channels of the encoder's taps, in the order of `tap_statistics`.
        norms: of every AdaIN of the decoder, in order: the taps that drive it, and its own channels. At first
            only the first of the taps counts; where it has fewer channels, they are handed out in turn.
    """

    def __init__(self, tap_channels: Sequence[int], norms: Sequence[tuple[Sequence[int], int]]) -> None:
        super().__init__()
        self.splits = [2 * channels for channels in tap_channels]
        self.taps = [list(taps) for taps, _ in norms]
        self.outputs = nn.ModuleList(
            [_handed_on([tap_channels[tap] for tap in taps], channels) for taps, channels in norms]
        )

    def observe(self, statistics: Tensor, colours: Tensor) -> None:
        """Nothing to take in."""

    def forward(self, statistics: Tensor, colours: Tensor) -> StyleCode:
        """statistics [N, F] of the taps, colours [N, 9]."""
        parts = statistics.split(self.splits, dim=1)
        outputs = [
            full_precision(output(torch.cat([*(parts[tap] for tap in taps), colours], dim=1)))
            for taps, output in zip(self.taps, self.outputs, strict=True)
        ]
        return StyleCode(torch.cat(outputs, dim=1), colours[:, :3], colours[:, 3:6])


class EmbeddingModulator(nn.Module):
    """The style embedding *z* -> scale and shift of every AdaIN, as the paper has it: no statistics."""

    def __init__(self, embedding_dim: int, num_outputs: int) -> None:
        super().__init__()
        self.outputs = _small_linear(embedding_dim, num_outputs)
        # unit vectors: each number is about 1 / sqrt(D)
        self.gain = embedding_dim**0.5

    def observe(self, statistics: Tensor, colours: Tensor) -> None:
        """Nothing to take in."""

    def forward(self, embedding: Tensor, colours: Tensor) -> StyleCode:
        """embedding [N, D] of unit norm, colours [N, 9]."""
        modulation = full_precision(self.outputs(self.gain * embedding))
        return StyleCode(modulation, colours[:, :3], colours[:, 3:6])


def _handed_on(tap_channels: Sequence[int], num_out: int) -> nn.Linear:
    """Means and deviations of taps, and the colours -> an AdaIN's scale, less 1, and shift: at first the
    first tap's deviations and means as they are."""
    num_tap = tap_channels[0]
    linear = nn.Linear(2 * sum(tap_channels) + NUM_COLOUR_STATISTICS, 2 * num_out)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    channels = torch.arange(num_out)
    with torch.no_grad():
        linear.weight[channels, num_tap + channels % num_tap] = 1.0
        linear.weight[num_out + channels, channels % num_tap] = 1.0
        linear.bias[:num_out] = -1.0
    return linear


def _small_linear(num_in: int, num_out: int) -> nn.Linear:
    """Starts with AdaIN close to plain instance norm."""
    linear = nn.Linear(num_in, num_out)
    nn.init.normal_(linear.weight, std=0.1 / num_in**0.5)
    nn.init.zeros_(linear.bias)
    return linear
