"""The small parts that the networks share: convolutions, instance norm, adaptive instance norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.distributed import mean_over_ranks
from nst.wavelets import full_precision

Statistics = list[tuple[Tensor, Tensor]]

EPSILON = 1e-5


def conv(num_in: int, num_out: int, kernel: int, stride: int = 1, *, bias: bool = True) -> nn.Conv2d:
    """A convolution on reflected borders: zeros there would show as a frame.

    Starts so that signals keep their size (He et al. 2015): without norms they would shrink a hundredfold
    over an encoder, and the first steps would turn what it says upside down.
    """
    padding = (kernel - stride + 1) // 2 if stride > 1 else kernel // 2
    layer = nn.Conv2d(num_in, num_out, kernel, stride, padding, bias=bias, padding_mode="reflect")
    nn.init.kaiming_normal_(layer.weight, a=0.2)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over space, [N, C, H, W] -> two of [N, C], in fp32; float64 stays."""
    features = full_precision(features)
    mean = features.mean(dim=(2, 3))
    # about 1.6 times as fast on a CPU as torch.var_mean, backward included
    variance = (features.square().mean(dim=(2, 3)) - mean.square()).clamp(min=0)
    return mean, (variance + EPSILON).sqrt()


class InstanceNorm(nn.Module):
    """Instance norm, optionally followed by a scale and shift of the caller's (AdaIN).

    Its statistics can be recorded on one image and replayed on others: tiles of a large picture are then
    normalised by the whole picture's statistics and show no seams (see `record_statistics`).

    Attributes:
        heard: told every picture that is measured, also where other statistics are replayed for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.replayed: Iterator[tuple[Tensor, Tensor]] | None = None
        self.heard: Callable[[Tensor], None] | None = None

    def measure(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over space, two of [N, C]: these features', or the replayed ones."""
        if self.heard is not None:
            self.heard(features)
        return channel_statistics(features) if self.replayed is None else next(self.replayed)

    def forward(self, features: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """features [N, C, H, W]; scale and shift [N, C] or None."""
        mean, std = self.measure(features)
        gain = 1 / std if scale is None else full_precision(scale) / std
        offset = -mean * gain if shift is None else full_precision(shift) - mean * gain
        gain, offset = gain[:, :, None, None], offset[:, :, None, None]
        return torch.addcmul(offset.to(features.dtype), features, gain.to(features.dtype))


@contextmanager
def record_statistics(network: nn.Module) -> Iterator[dict[str, Statistics]]:
    """Collects the statistics of every InstanceNorm in `network`, by name, in the order of its calls."""
    norms = {name: norm for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)}
    statistics: dict[str, Statistics] = {}

    def note(name: str, features: Tensor) -> None:
        statistics.setdefault(name, []).append(channel_statistics(features))

    for name, norm in norms.items():
        norm.heard = partial(note, name)
    try:
        yield statistics
    finally:
        for norm in norms.values():
            norm.heard = None


@contextmanager
def replay_statistics(network: nn.Module, statistics: dict[str, Statistics]) -> Iterator[None]:
    """Every InstanceNorm in `network` uses the recorded statistics for one forward pass."""
    norms = {name: norm for name, norm in network.named_modules() if isinstance(norm, InstanceNorm)}
    for name, norm in norms.items():
        norm.replayed = iter(statistics[name])
    try:
        yield
    finally:
        for norm in norms.values():
            norm.replayed = None


class AdaptiveNorm(nn.Module):
    """AdaIN: instance norm whose scale and shift are slices of a style code."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = InstanceNorm()

    def forward(self, features: Tensor, modulation: Tensor) -> Tensor:
        """modulation [N, 2C]: the scale's deviation from 1, then the shift."""
        scale, shift = modulation.chunk(2, dim=1)
        return self.norm(features, 1 + scale, shift)


class RunningStandardisation(nn.Module):
    """Standardises each feature by its running mean and variance, the same in training and inference. Short
    memory: the encoder that makes the features moves on.

    The statistics of all pictures are alike; what tells one style from another is a small deviation from
    their mean. Without this the decoder sees nearly the same code for every style, and for hundreds of
    steps every style gives the same picture.
    """

    mean: Tensor
    variance: Tensor
    num_updates: Tensor

    def __init__(self, num_features: int, momentum: float = 0.2) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("variance", torch.ones(num_features))
        self.register_buffer("num_updates", torch.zeros(()))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """features [N, F], this rank's part of the batch; every rank must call."""
        mean = mean_over_ranks(features.mean(dim=0))
        variance = mean_over_ranks((features - mean).square().mean(dim=0))
        self.num_updates += 1
        share = torch.clamp(1 / self.num_updates, min=self.momentum)
        self.mean.lerp_(mean, share)
        self.variance.lerp_(variance.clamp(min=1e-6), share)

    @property
    def spread(self) -> Tensor:
        """[F] standard deviations."""
        return (self.variance + 1e-6).sqrt()

    def forward(self, features: Tensor) -> Tensor:
        """[N, F] -> [N, F] in [-5, 5]."""
        return ((features - self.mean) / self.spread).clamp(-5, 5)


class CriticResBlock(nn.Module):
    """Two convolutions around a skip, without any norm: an encoder here is also a discriminator."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first = conv(num_channels, num_channels, 3)
        self.second = conv(num_channels, num_channels, 3)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(F.leaky_relu(self.first(F.leaky_relu(features, 0.2)), 0.2))


class AdaptiveResBlock(nn.Module):
    """Two convolutions, each followed by AdaIN, around a skip."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(num_channels, num_channels, 3), conv(num_channels, num_channels, 3)
        self.norms = nn.ModuleList([AdaptiveNorm(), AdaptiveNorm()])

    def forward(self, features: Tensor, first: Tensor, second: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(features), first))
        return features + self.norms[1](self.second(hidden), second)


def upsample(features: Tensor) -> Tensor:
    """Twice the size; a convolution follows. Bilinear: transposed convolutions leave checkerboards, and
    nearest neighbours left ripples along edges that a short training does not unlearn."""
    return F.interpolate(features, scale_factor=2, mode="bilinear")


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
