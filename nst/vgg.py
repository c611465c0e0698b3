"""The first layers of VGG-19 (Simonyan and Zisserman 2015): an optional perceptual loss, and measures that
peers report. Nothing here is needed to train the paper's presets, or to stylize.

The weights are torchvision's for ImageNet, or a local safetensors file; see `load_vgg`."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VGG19_Weights

from nst.metrics import check_pictures
from nst.networks.blocks import channel_statistics
from nst.wavelets import full_precision

# name -> (channels in, channels out, number in torchvision's `features`)
LAYERS = {
    "conv1_1": (3, 64, 0),
    "conv1_2": (64, 64, 2),
    "conv2_1": (64, 128, 5),
    "conv2_2": (128, 128, 7),
    "conv3_1": (128, 256, 10),
    "conv3_2": (256, 256, 12),
    "conv3_3": (256, 256, 14),
    "conv3_4": (256, 256, 16),
    "conv4_1": (256, 512, 19),
}
NEEDED = ("preprocess", "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
BEFORE_POOLING = ("conv1_2", "conv2_2", "conv3_4")
TAPS = {"conv1_1": "r11", "conv2_1": "r21", "conv3_1": "r31", "conv4_1": "r41"}
GRAM_TAPS = ("r11", "r21", "r31")  # as peers report it, whether or not the weights go deeper
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHUNK = 8  # pictures in one pass
VARIABLE = "NST_VGG19"
Statistics = tuple[Tensor, Tensor]  # means and standard deviations of the channels, two of [N, C]
REMEDY = (
    f"set {VARIABLE} to a safetensors file, or let torchvision download VGG19_Weights.IMAGENET1K_V1 once on "
    "a machine with network"
)


class VGGFeatures(nn.Module):
    """relu1_1, relu2_1, relu3_1, and relu4_1 if the weights go that far, on reflected borders.

    Frozen: the weights are buffers, so that no optimiser finds them and no checkpoint holds them; gradients
    pass through to the pictures. An autocast around it applies to all but the first, 1x1 convolution.

    Args:
        weights: `NAME.weight` and `NAME.bias` of `preprocess` (1x1, from RGB in [0, 1] to what `conv1_1`
            takes) and of the 3x3 convolutions up to `conv3_1` or `conv4_1`.

    Raises:
        ValueError: a layer is missing or of another shape.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        names = ["preprocess", *LAYERS] if "conv4_1.weight" in weights else list(NEEDED)
        for name in names:
            wide = (3, 3, 1, 1) if name == "preprocess" else (LAYERS[name][1], LAYERS[name][0], 3, 3)
            for kind, shape in (("weight", wide), ("bias", wide[:1])):
                tensor = weights.get(f"{name}.{kind}")
                if tensor is None:
                    raise ValueError(f"there is no {name}.{kind}; the layers needed are {', '.join(names)}")
                if tensor.shape != shape:
                    raise ValueError(f"{name}.{kind} is {list(tensor.shape)}, not {list(shape)}")
                self.register_buffer(f"{name}_{kind}", tensor.detach().float(), persistent=False)
        self.layers = names[1:]

    @cached_property
    def digest(self) -> str:
        """sha256 over the weights: figures of different ones do not compare."""
        digest = hashlib.sha256()
        for name, weights in sorted(self.named_buffers()):
            digest.update(f"{name}\0".encode() + weights.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def deepest(self) -> str:
        """The last of `r11`, `r21`, `r31`, `r41` that there is."""
        return TAPS[self.layers[-1]]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] in [-1, 1], 16 px or more a side -> r11 [N, 64, H, W], r21 [N, 128, H/2, W/2],
        r31 [N, 256, H/4, W/4], and r41 [N, 512, H/8, W/8] if there is one; sides rounded up."""
        with torch.autocast(images.device.type, enabled=False):  # up to ±150: too far for bf16's 8 bits
            weight, bias = self._layer("preprocess")
            hidden = F.conv2d((images.to(weight.dtype) + 1) / 2, weight, bias)
        taps = {}
        for name in self.layers:
            hidden = F.relu(F.conv2d(F.pad(hidden, (1, 1, 1, 1), mode="reflect"), *self._layer(name)))
            if name in TAPS:
                taps[TAPS[name]] = hidden
            if name in BEFORE_POOLING:
                hidden = F.max_pool2d(hidden, 2, ceil_mode=True)
        return taps

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")

    def pair_measures(self, stylized: Tensor, content: Tensor, style: Tensor) -> dict[str, list[float]]:
        """Feature measures of N stylized pictures, [N, 3, H, W] in [0, 1] (the style of any size).

        content_r31 (and _r41): mean squared difference of relu3_1 to the content's. style_r11, _r21, _r31
        (and _r41): MSE of channel means plus MSE of channel standard deviations to the style's (Huang &
        Belongie 2017). gram: `|G - S|² / |S|²` of Gram matrices divided by their number of positions (Gatys
        et al. 2016), mean over relu1_1, 2_1 and 3_1.

        Figures of different weights do not compare: torchvision's activations are not normalised.

        Raises:
            ValueError: sizes or ranges do not fit.
        """
        parts = [
            self._measures_of(*(2 * check_pictures(pictures) - 1 for pictures in chunk))
            for chunk in zip(stylized.split(CHUNK), content.split(CHUNK), style.split(CHUNK), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]).tolist() for name in parts[0]}

    @torch.inference_mode()
    def _measures_of(self, stylized: Tensor, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        made, wanted, aimed = self(stylized), self(content), self(style)
        measures = {}
        for tap in ("r31", "r41"):
            if tap in made:
                measures[f"content_{tap}"] = (made[tap] - wanted[tap]).square().mean(dim=(1, 2, 3))
        for tap in made:
            measures[f"style_{tap}"] = _distance(_exact_statistics(made[tap]), _exact_statistics(aimed[tap]))
        grams = []
        for tap in GRAM_TAPS:
            gram, other = _gram(made[tap]), _gram(aimed[tap])
            grams.append((gram - other).square().sum(dim=(1, 2)) / other.square().sum(dim=(1, 2)))
        measures["gram"] = torch.stack(grams).mean(dim=0)
        return measures


def _exact_statistics(features: Tensor) -> Statistics:
    deviation, mean = torch.std_mean(features, dim=(2, 3), correction=0)
    return mean, deviation


def _distance(made: Statistics, aimed: Statistics) -> Tensor:
    """MSE of channel means plus MSE of channel deviations, each [N, C] -> [N]."""
    return sum((mine - theirs).square().mean(dim=1) for mine, theirs in zip(made, aimed, strict=True))  # type: ignore[return-value]


def _gram(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, C], divided by H * W."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def perceptual_loss(
    features: VGGFeatures, stylized: Tensor, content: Tensor, style: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a stylized picture is from its content and from its style, as VGG-19 sees them (Gatys et al.
    2016; the style by means and deviations as Huang & Belongie 2017, eq. 12 and 13, squared).

    Args:
        features: the weights decide on the scale of both terms; with the normalised ones of AdaIN 1 and 3
            are good weights, torchvision's activations are larger.
        stylized, content: [N, 3, H, W] in [-1, 1], same size; style [N, 3, h, w] of any size.

    Returns:
        The content term, the mean squared difference at the deepest layer; and the style term, the sum over
        layers of MSE of channel means plus MSE of channel standard deviations. Scalars in fp32, under an
        autocast too. Gradients reach `stylized` alone.
    """
    made = features(stylized)
    with torch.no_grad():
        wanted, aimed = features(content)[features.deepest], features(style)
    made, aimed = ({tap: full_precision(part) for tap, part in one.items()} for one in (made, aimed))
    content_term = (made[features.deepest] - full_precision(wanted)).square().mean()
    # not the exact ones: a flat channel's deviation would have no gradient
    style_terms = [
        _distance(channel_statistics(made[tap]), channel_statistics(aimed[tap])).mean() for tap in made
    ]
    return content_term, torch.stack(style_terms).sum()


# --- weights ------------------------------------------------------------------------------------------


def load_vgg(path: str | None = None, *, device: torch.device | str = "cpu") -> VGGFeatures:
    """VGG-19 from the safetensors file `path`; else from the file that NST_VGG19 names; else torchvision's
    ImageNet weights, from its cache or downloaded (550 MB; TORCH_HOME says where to).

    A file holds the layers as `VGGFeatures` wants them, or as torchvision names them (`features.0.weight`).
    Nothing is unpickled but tensors; a download is checked against its digest.

    Raises:
        ValueError: no such file, other layers in it, or no weights to be had; says what to do.
    """
    path = path or os.environ.get(VARIABLE)
    weights, origin = (_from_file(path), path) if path else (_from_torchvision(), "torchvision's VGG-19")
    if "features.0.weight" in weights:
        weights = _in_our_names(weights)
    try:
        return VGGFeatures(weights).to(device)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}; give the VGG-19 weights") from None


def _from_file(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; give the VGG-19 weights as a safetensors file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); give the VGG-19 weights") from None


def _from_torchvision() -> dict[str, Tensor]:
    try:
        # weights_only: a file in the cache may be anybody's
        weights = VGG19_Weights.IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        cache = Path(torch.hub.get_dir(), "checkpoints")
        raise ValueError(
            f"the VGG-19 weights are neither in {cache} nor to be downloaded ({lines[0]}); {REMEDY}"
        ) from None
    return dict(weights)


def _in_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's layers, with its normalisation of pictures as `preprocess`."""
    std = torch.tensor(IMAGENET_STD)
    renamed = {
        "preprocess.weight": torch.diag(1 / std)[:, :, None, None],
        "preprocess.bias": -torch.tensor(IMAGENET_MEAN) / std,
    }
    for name, (_, _, number) in LAYERS.items():
        for kind in ("weight", "bias"):
            if (tensor := weights.get(f"features.{number}.{kind}")) is not None:
                renamed[f"{name}.{kind}"] = tensor
    return renamed
