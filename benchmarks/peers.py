"""Networks that others published, written from their tables, with random weights: for speed alone.

pix2pix (Isola et al. 2017, arXiv 1611.07004), CycleGAN (Zhu et al. 2017, arXiv 1703.10593), AdaIN (Huang and
Belongie 2017, arXiv 1703.06868) and MicroAST (Wang et al. 2023, arXiv 2211.15313). `C64` and the like are
the papers' own short names. Images are [N, 3, H, W] in [-1, 1]."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- pix2pix and CycleGAN: networks ------------------------------------------------------------------


class UNet256(nn.Module):
    """pix2pix's generator. Encoder C64-C128-C256-C512-C512-C512-C512-C512, decoder
    CD512-CD512-CD512-C512-C256-C128-C64 and the output, skips at every level; H and W multiples of 256."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 512, 512, 512, 512)
        inputs = (3, *widths[:-1])
        self.down = nn.ModuleList()
        for level, (num_in, num_out) in enumerate(zip(inputs, widths, strict=True)):
            is_normed = 0 < level < len(widths) - 1
            self.down.append(
                nn.Sequential(
                    nn.LeakyReLU(0.2) if level else nn.Identity(),
                    nn.Conv2d(num_in, num_out, 4, 2, 1, bias=not is_normed),
                    nn.BatchNorm2d(num_out) if is_normed else nn.Identity(),
                )
            )
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            num_in = widths[level] if level == len(widths) - 1 else 2 * widths[level]
            num_out = inputs[level]
            self.up.append(
                nn.Sequential(
                    nn.ReLU(),
                    nn.ConvTranspose2d(num_in, num_out, 4, 2, 1, bias=level == 0),
                    nn.BatchNorm2d(num_out) if level else nn.Tanh(),
                    nn.Dropout(0.5) if level >= len(widths) - 3 else nn.Identity(),
                )
            )

    def forward(self, images: Tensor) -> Tensor:
        levels = [images]
        for down in self.down:
            levels.append(down(levels[-1]))
        hidden = self.up[0](levels[-1])
        for up, skip in zip(self.up[1:], levels[-2:0:-1], strict=True):
            hidden = up(torch.cat([hidden, skip], dim=1))
        return hidden


class ResNet9(nn.Module):
    """CycleGAN's generator: c7s1-64, d128, d256, nine R256, u128, u64, c7s1-3; instance norm."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, 64, 7), *_norm_relu(64)]
        for width in (128, 256):
            layers += [nn.Conv2d(width // 2, width, 3, 2, 1), *_norm_relu(width)]
        layers += [_ResNetBlock(256) for _ in range(9)]
        for width in (128, 64):
            layers += [nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1), *_norm_relu(width)]
        self.layers = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(64, 3, 7), nn.Tanh())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _norm_relu(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.InstanceNorm2d(width), nn.ReLU(inplace=True)


class _ResNetBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            *_norm_relu(width),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, features: Tensor) -> Tensor:
        return features + self.layers(features)


class PatchGan(nn.Sequential):
    """The 70x70 discriminator of both: C64-C128-C256-C512 and a map of logits.

    Args:
        num_in: channels of its input: 6 for pix2pix's pairs, 3 for CycleGAN.
        batch_norm: pix2pix's; otherwise instance norm without weights.
    """

    def __init__(self, num_in: int, *, batch_norm: bool) -> None:
        layers: list[nn.Module] = [nn.Conv2d(num_in, 64, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for width, stride in ((128, 2), (256, 2), (512, 1)):
            layers += [
                nn.Conv2d(width // 2, width, 4, stride, 1, bias=not batch_norm),
                nn.BatchNorm2d(width) if batch_norm else nn.InstanceNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        super().__init__(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def _prepare(network: nn.Module, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """Weights from N(0, 0.02), as both papers have it."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
    return network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]


# --- pix2pix and CycleGAN: training steps ------------------------------------------------------------


class _PeerStep:
    """Networks and Adam of both sides (2e-4, beta1 0.5), and the precision."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, device: torch.device, *, bf16: bool
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self._generator_optimizer, self._discriminator_optimizer = (
            torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
            for network in (generator, discriminator)
        )
        self._device_type, self._bf16 = device.type, bf16

    def autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._bf16)

    def update_generator(self, loss: Tensor) -> None:
        _update(self._generator_optimizer, loss)

    def update_discriminator(self, loss: Tensor) -> None:
        _update(self._discriminator_optimizer, loss)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


class Pix2PixStep(_PeerStep):
    """One training step: the discriminator on (input, target) and (input, output), then the generator by it
    and 100 times L1 (paper, section 3)."""

    def __init__(
        self,
        device: torch.device,
        *,
        bf16: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        generator = _prepare(UNet256(), device, memory_format)
        discriminator = _prepare(PatchGan(6, batch_norm=True), device, memory_format)
        super().__init__(generator, discriminator, device, bf16=bf16)

    def __call__(self, inputs: Tensor, targets: Tensor) -> None:
        with self.autocast():
            outputs = self.generator(inputs)
            fake = self.discriminator(torch.cat([inputs, outputs.detach()], dim=1))
            real = self.discriminator(torch.cat([inputs, targets], dim=1))
        self.update_discriminator(0.5 * (_cross_entropy(fake, 0.0) + _cross_entropy(real, 1.0)))
        self.discriminator.requires_grad_(False)
        with self.autocast():
            logits = self.discriminator(torch.cat([inputs, outputs], dim=1))
        loss = _cross_entropy(logits, 1.0) + 100 * F.l1_loss(outputs.float(), targets)
        self.update_generator(loss)
        self.discriminator.requires_grad_(True)


class CycleGanStep(_PeerStep):
    """One training step: both generators together by least squares, 10 times the cycles and 5 times the
    identities; then both discriminators. The pool of 50 earlier pictures is left out: it costs no time.

    One step takes as many content pictures as pictures of the other domain."""

    def __init__(
        self,
        device: torch.device,
        *,
        bf16: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        generators = nn.ModuleDict({"to_style": ResNet9(), "to_content": ResNet9()})
        judges = nn.ModuleDict({name: PatchGan(3, batch_norm=False) for name in ("style", "content")})
        generator, discriminator = (_prepare(part, device, memory_format) for part in (generators, judges))
        super().__init__(generator, discriminator, device, bf16=bf16)
        self._to_style, self._to_content = generators["to_style"], generators["to_content"]
        self._judge_style, self._judge_content = judges["style"], judges["content"]

    def __call__(self, content: Tensor, style: Tensor) -> None:
        self.discriminator.requires_grad_(False)
        with self.autocast():
            fake_style, fake_content = self._to_style(content), self._to_content(style)
            cycles = ((self._to_content(fake_style), content), (self._to_style(fake_content), style))
            identities = ((self._to_style(style), style), (self._to_content(content), content))
            logits = (self._judge_style(fake_style), self._judge_content(fake_content))
        terms = [_least_squares(part, 1.0) for part in logits]
        terms += [10 * F.l1_loss(drawn.float(), original) for drawn, original in cycles]
        terms += [5 * F.l1_loss(drawn.float(), original) for drawn, original in identities]
        self.update_generator(torch.stack(terms).sum())
        self.discriminator.requires_grad_(True)
        with self.autocast():
            real = (self._judge_style(style), self._judge_content(content))
            fake = (self._judge_style(fake_style.detach()), self._judge_content(fake_content.detach()))
        terms = [_least_squares(part, 1.0) for part in real] + [_least_squares(part, 0.0) for part in fake]
        self.update_discriminator(0.5 * torch.stack(terms).sum())


def _cross_entropy(logits: Tensor, target: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _least_squares(logits: Tensor, target: float) -> Tensor:
    return (logits.float() - target).square().mean()


# --- AdaIN and MicroAST: stylizing -------------------------------------------------------------------


class AdaIn(nn.Module):
    """VGG-19 as far as relu4_1, its feature statistics exchanged, and a mirrored decoder."""

    def __init__(self) -> None:
        super().__init__()
        encoder = _vgg(3, 64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512)
        decoder = _vgg(512, 256, "up", 256, 256, 256, 128, "up", 128, 64, "up", 64, 3)
        self.encoder = nn.Sequential(nn.Conv2d(3, 3, 1), *encoder)  # the first brings RGB to VGG's scale
        self.decoder = nn.Sequential(*decoder[:-1])  # without the ReLU on the picture

    def encode_style(self, style: Tensor) -> Moments:
        return _moments(self.encoder(style))

    def forward(self, content: Tensor, code: Moments) -> Tensor:
        return self.decoder(_adain(self.encoder(content), code))


class Moments(NamedTuple):
    """Of feature maps over space."""

    mean: Tensor  # [N, C, 1, 1]
    std: Tensor  # [N, C, 1, 1]


def _moments(features: Tensor) -> Moments:
    variance, mean = torch.var_mean(features, dim=(2, 3), keepdim=True)
    return Moments(mean, (variance + 1e-5).sqrt())


def _adain(features: Tensor, target: Moments) -> Tensor:
    mean, std = _moments(features)
    return (features - mean) / std * target.std + target.mean


def _vgg(num_in: int, *plan: int | str) -> list[nn.Module]:
    """3x3 convolutions on reflected borders, each with a ReLU, to the widths of `plan`."""
    layers: list[nn.Module] = []
    for entry in plan:
        if isinstance(entry, int):
            layers += [_reflected(num_in, entry, 3), nn.ReLU(inplace=True)]
            num_in = entry
        else:
            layers.append(nn.MaxPool2d(2) if entry == "pool" else nn.Upsample(scale_factor=2))
    return layers


def _reflected(num_in: int, num_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    return nn.Conv2d(num_in, num_out, kernel, stride, kernel // 2, groups=groups, padding_mode="reflect")


class MicroAst(nn.Module):
    """Two micro encoders, a modulator and a micro decoder (paper, section 3).

    An encoder: conv9, two depthwise-separable convolutions of stride 2, two residual blocks at 64 channels.
    The style's two levels modulate features (AdaIN) and filters of the decoder's residual blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.content_encoder, self.style_encoder = _MicroEncoder(), _MicroEncoder()
        # a gain and a bias for the filters of each level, from a depthwise convolution's mean
        self.gains = nn.ModuleList([_reflected(64, 64, 3, groups=64) for _ in range(2)])
        self.biases = nn.ModuleList([_reflected(64, 64, 3, groups=64) for _ in range(2)])
        self.blocks = nn.ModuleList([_MicroBlock(64) for _ in range(2)])
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *_separable(64, 32, groups=32),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            *_separable(32, 16, groups=16),
            _reflected(16, 3, 9),
        )

    def encode_style(self, style: Tensor) -> list[Modulation]:
        """Of the level that the decoder begins with, then of the other."""
        levels = reversed(self.style_encoder(style))
        return [
            Modulation(_moments(level), *(net(level).mean(dim=(2, 3), keepdim=True) for net in nets))
            for level, *nets in zip(levels, self.gains, self.biases, strict=True)
        ]

    def forward(self, content: Tensor, code: list[Modulation]) -> Tensor:
        hidden = self.content_encoder(content)[-1]
        for block, modulation in zip(self.blocks, code, strict=True):
            hidden = block(_adain(hidden, modulation.moments), modulation)
        return self.up(hidden)


class Modulation(NamedTuple):
    """What one level of a style does to the decoder."""

    moments: Moments
    gain: Tensor  # [N, C, 1, 1]
    bias: Tensor  # [N, C, 1, 1]


class _MicroEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _reflected(3, 16, 9),
            nn.ReLU(inplace=True),
            *_separable(16, 32, stride=2, groups=16),
            *_separable(32, 64, stride=2, groups=32),
        )
        self.blocks = nn.ModuleList([_MicroBlock(64) for _ in range(2)])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> two levels, both [N, 64, H/4, W/4]."""
        first = self.blocks[0](self.stem(images))
        return first, self.blocks[1](first)


class _MicroBlock(nn.Module):
    """Two convolutions around a skip; modulating the filters comes to `gain * conv(x) + bias * x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _reflected(width, width, 3), _reflected(width, width, 3)

    def forward(self, features: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is None:
            return features + self.second(F.relu(self.first(features)))
        _, gain, bias = modulation
        hidden = F.relu(gain * self.first(features) + bias * features)
        return features + gain * self.second(hidden) + bias * hidden


def _separable(num_in: int, num_out: int, *, groups: int, stride: int = 1) -> list[nn.Module]:
    """A grouped 3x3 and a pointwise convolution, each with a ReLU."""
    return [
        _reflected(num_in, num_out, 3, stride, groups),
        nn.ReLU(inplace=True),
        nn.Conv2d(num_out, num_out, 1),
        nn.ReLU(inplace=True),
    ]
