"""The conditional GAN's generators (approach 1): U-Nets that take a content and a style (paper, section on
the conditional GAN). `RganModel.fusion` says how the style enters."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst.approaches import RganModel
from nst.networks.blocks import (
    AdaptiveNorm,
    AdaptiveResBlock,
    InstanceNorm,
    conv,
    upsample,
)
from nst.networks.generator import soft_clip
from nst.networks.style_code import Modulator, StyleCode, colour_statistics
from nst.networks.style_discriminator import WaveletTrunk
from nst.networks.style_generator import StyleGenerator, fit_for_statistics, pad_to_multiple
from nst.networks.wavelet_encoder import WaveletEncoder, tap_statistics
from nst.wavelets import full_precision

BOTTLENECK_STYLE = 128  # channels of the style beside the bottleneck


class ConditionalUnet(StyleGenerator):
    """What the three fusions share: the content's way down, and the palette at the end.

    No norm on the way down: it would take away a style that comes with the content, and leave nothing of a
    bottleneck of one pixel.
    """

    def __init__(self, config: RganModel, num_inputs: int) -> None:
        super().__init__()
        self.config = config
        self.stride = 2 ** len(config.widths)
        self.down = nn.ModuleList([conv(a, b, 4, 2) for a, b in pairwise((num_inputs, *config.widths))])
        self.palette = Palette(config.palette)

    def descend(self, images: Tensor) -> list[Tensor]:
        """images [N, C, H, W], sides multiples of `stride` -> features at strides 2, 4, ..., `stride`."""
        levels = [images]
        for down in self.down:
            levels.append(F.leaky_relu(down(levels[-1]), 0.2))
        return levels[1:]

    def observe(self, style: Tensor) -> None:
        """Takes this rank's style pictures [N, 3, H, W] of a step into running statistics, if there are any;
        once a step, every rank."""


class AdainUnet(ConditionalUnet):
    """The wavelet encoder's statistics, global and local bands fused, reach the decoder through a slice
    beside the bottleneck and through the scale and shift of every norm.

    Skips pass AdaIN too: raw ones would carry how the content looked, and raw style skips, as the other two
    fusions have them, carry objects of the reference into the picture (method). Upsampling is bilinear with a
    convolution behind it. 8.5 M parameters and 3.2 GMAC at 256x256 with the default widths.
    """

    def __init__(self, config: RganModel) -> None:
        super().__init__(config, num_inputs=3)
        self.style_encoder = WaveletEncoder(config.style_width, absolute=config.absolute_wavelets)
        *skips, bottleneck = config.widths
        self.fuse = conv(bottleneck + BOTTLENECK_STYLE, bottleneck, 1)
        # channels at the strides of the skips, the deepest first, and at stride 1, which has no skip
        outputs = [*reversed(skips), skips[0]]
        inputs = [a + b for a, b in zip((bottleneck, *outputs), (*reversed(skips), 0), strict=False)]
        self.up = nn.ModuleList([conv(a, b, 3) for a, b in zip(inputs, outputs, strict=True)])
        self.norms = nn.ModuleList([AdaptiveNorm() for _ in outputs])
        self.skip_norms = nn.ModuleList([AdaptiveNorm() for _ in skips])
        self.block = AdaptiveResBlock(outputs[0])
        self.to_rgb = conv(outputs[-1], 3, 7)
        self.splits = [BOTTLENECK_STYLE, 2 * outputs[0], 2 * outputs[0]]
        self.splits += [2 * width for width in (*outputs, *reversed(skips))]
        self.modulator = Modulator(2 * sum(self.style_encoder.tap_channels), sum(self.splits))

    @torch.no_grad()
    def observe(self, style: Tensor) -> None:
        self.modulator.observe(self._describe(style), colour_statistics(style))

    def encode_style(self, style: Tensor) -> StyleCode:
        return self.modulator(self._describe(style), colour_statistics(style))

    def _describe(self, style: Tensor) -> Tensor:
        """Tap statistics [M, F] of style pictures of any size."""
        return tap_statistics(self.style_encoder(fit_for_statistics(style, self.style_encoder.stride)))

    def forward(self, content: Tensor, code: StyleCode) -> Tensor:
        padded, (height, width) = pad_to_multiple(content, self.stride)
        *skips, hidden = self.descend(padded)
        code = code.expand(len(content))
        beside, first, second, *parts = code.modulation.split(self.splits, dim=1)
        norms, skip_norms = parts[: len(self.up)], parts[len(self.up) :]
        beside = beside[:, :, None, None].expand(-1, -1, *hidden.shape[2:])
        hidden = F.leaky_relu(self.fuse(torch.cat([hidden, beside], dim=1)), 0.2)
        for level, up in enumerate(self.up):
            hidden = upsample(hidden)
            if level < len(skips):
                skip = self.skip_norms[level](skips[-1 - level], skip_norms[level])
                hidden = torch.cat([hidden, skip], dim=1)
            hidden = F.relu(self.norms[level](up(hidden), norms[level]))
            if level == 0:
                hidden = self.block(hidden, first, second)
        drawing = self.palette(self.to_rgb(hidden), padded, code.colour_mean, code.colour_std)
        return drawing[:, :, :height, :width]


class PictureUnet(ConditionalUnet):
    """The original's: the style is a picture that lies beside the content, place by place.

    `concat6`: both go down together as six channels: 34.5 M parameters with the widths of the original, 64,
    128, 256, 512, 512, 512, 64 (4x4 convolutions of stride 2; mirrored transposed convolutions, each but the
    first taking the skip of its size too). `wavelet_skips`: the content goes down alone, and five levels of
    skips have features of the wavelet CNN beside it: 40.5 M.

    No norm on the way up either: with instance norms a short training of `concat6` heeded the style half as
    much, and hid what the norms took away in a bright spot in one corner. Trained at one size, the network
    draws any: the style picture is stretched to the content's size.
    """

    def __init__(self, config: RganModel) -> None:
        has_trunk = config.fusion == "wavelet_skips"
        super().__init__(config, num_inputs=3 if has_trunk else 6)
        self.trunk = (
            WaveletTrunk(config.style_width, absolute=config.absolute_wavelets) if has_trunk else None
        )
        *skips, bottleneck = config.widths
        beside = self.trunk.channels if self.trunk else ()
        # what joins the decoder at strides 2, 4, ...: the skip, and the style's features where there are any
        joining = [
            2 * width + (beside[level] if level < len(beside) else 0) for level, width in enumerate(skips)
        ]
        inputs, outputs = [bottleneck, *reversed(joining)], [*reversed(skips), 3]
        self.up = nn.ModuleList([_transposed(a, b) for a, b in zip(inputs, outputs, strict=True)])

    def encode_style(self, style: Tensor) -> StyleCode:
        """The code's modulation is the picture itself, [M, 3, S, S]; a mix of styles is a blend of them."""
        colours = colour_statistics(style)
        side = self.config.style_side
        return StyleCode(_resized(full_precision(style), side, side), colours[:, :3], colours[:, 3:6])

    def forward(self, content: Tensor, code: StyleCode) -> Tensor:
        padded, (height, width) = pad_to_multiple(content, self.stride)
        code = code.expand(len(content))
        style = _resized(code.modulation, *padded.shape[2:])
        if self.trunk is None:
            levels, beside = self.descend(torch.cat([padded, style], dim=1)), []
        else:
            levels, beside = self.descend(padded), self.trunk(style)
        *skips, hidden = levels
        *ups, to_rgb = self.up
        for up, level in zip(ups, reversed(range(len(skips))), strict=True):
            hidden = torch.cat([F.relu(up(hidden)), skips[level], *beside[level : level + 1]], dim=1)
        drawing = self.palette(to_rgb(hidden), padded, code.colour_mean, code.colour_std)
        return drawing[:, :, :height, :width]


class Palette(nn.Module):
    """The last layer: which RGB mean and deviation a picture has (`RganModel.palette`)."""

    def __init__(self, palette: str) -> None:
        super().__init__()
        self.palette = palette
        self.norm = InstanceNorm()

    def forward(self, drawing: Tensor, content: Tensor, colour_mean: Tensor, colour_std: Tensor) -> Tensor:
        """drawing and content [N, 3, H, W], the style's colours two of [N, 3] -> [N, 3, H, W] in [-1, 1]."""
        drawing = full_precision(drawing)
        if self.palette == "network":
            return torch.tanh(drawing)
        if self.palette == "content":
            colour_mean, colour_std = self.norm.measure(content)
        return soft_clip(self.norm(drawing, colour_std, colour_mean))


def _transposed(num_in: int, num_out: int) -> nn.ConvTranspose2d:
    """Twice the size. Starts so that signals keep theirs (He et al. 2015): 2x2 of the 4x4 weights meet in an
    output pixel."""
    layer = nn.ConvTranspose2d(num_in, num_out, 4, 2, 1)
    nn.init.normal_(layer.weight, std=(2 / (4 * num_in)) ** 0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def build_unet(config: RganModel) -> ConditionalUnet:
    return AdainUnet(config) if config.fusion == "adain" else PictureUnet(config)
