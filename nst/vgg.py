"""The first layers of the normalised VGG-19 (as AdaIN and WCT use it), from a local safetensors file. For
measures that peers report; nothing here is needed to train or to stylize."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nst.metrics import check_pictures

LAYERS = ("preprocess", "conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
TAPS = ("r11", "r21", "r31")
CHUNK = 8  # pictures in one pass


class VGGFeatures:
    """relu1_1, relu2_1 and relu3_1 of RGB pictures in [0, 1].

    The file holds `NAME.weight` and `NAME.bias` of `preprocess` (1x1: to BGR, scale, mean), `conv1_1`,
    `conv1_2`, `conv2_1`, `conv2_2` and `conv3_1` (3x3, on reflected borders).
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    @classmethod
    def load(cls, path: str, *, device: str = "cpu") -> VGGFeatures:
        """Raises ValueError if the file is missing or holds other layers."""
        if not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file; give the VGG-19 weights as a safetensors file")
        try:
            weights = load_file(path, device=device)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}); give the VGG-19 weights") from None
        names = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
        if missing := [name for name in names if name not in weights]:
            raise ValueError(f"{path}: holds no {missing[0]}; the layers needed are {', '.join(LAYERS)}")
        return cls({name: weights[name].float() for name in names})

    def __call__(self, pictures: Tensor) -> dict[str, Tensor]:
        """[N, 3, H, W] in [0, 1] -> r11 [N, 64, H, W], r21 [N, 128, H/2, W/2], r31 [N, 256, H/4, W/4]."""
        hidden = F.conv2d(check_pictures(pictures), *self._layer("preprocess"))
        r11 = self._conv(hidden, "conv1_1")
        hidden = F.max_pool2d(self._conv(r11, "conv1_2"), 2, ceil_mode=True)
        r21 = self._conv(hidden, "conv2_1")
        hidden = F.max_pool2d(self._conv(r21, "conv2_2"), 2, ceil_mode=True)
        return {"r11": r11, "r21": r21, "r31": self._conv(hidden, "conv3_1")}

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]

    def _conv(self, features: Tensor, name: str) -> Tensor:
        return F.relu(F.conv2d(F.pad(features, (1, 1, 1, 1), mode="reflect"), *self._layer(name)))

    def pair_measures(self, stylized: Tensor, content: Tensor, style: Tensor) -> dict[str, list[float]]:
        """Feature measures of N stylized pictures, [N, 3, H, W] in [0, 1] (the style of any size).

        content_r31: mean squared difference of relu3_1 to the content's. style_r11, _r21, _r31: MSE of
        channel means plus MSE of channel standard deviations to the style's (Huang & Belongie 2017). gram:
        `|G - S|² / |S|²` of Gram matrices divided by their number of positions, mean over the three layers.
        """
        parts = [
            self._measures_of(*chunk)
            for chunk in zip(stylized.split(CHUNK), content.split(CHUNK), style.split(CHUNK), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]).tolist() for name in parts[0]}

    @torch.inference_mode()
    def _measures_of(self, stylized: Tensor, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        made, wanted, aimed = self(stylized), self(content)["r31"], self(style)
        measures = {"content_r31": (made["r31"] - wanted).square().mean(dim=(1, 2, 3))}
        grams = []
        for tap in TAPS:
            means = made[tap].mean(dim=(2, 3)) - aimed[tap].mean(dim=(2, 3))
            stds = made[tap].std(dim=(2, 3), correction=0) - aimed[tap].std(dim=(2, 3), correction=0)
            measures[f"style_{tap}"] = means.square().mean(dim=1) + stds.square().mean(dim=1)
            gram, other = _gram(made[tap]), _gram(aimed[tap])
            grams.append((gram - other).square().sum(dim=(1, 2)) / other.square().sum(dim=(1, 2)))
        measures["gram"] = torch.stack(grams).mean(dim=0)
        return measures


def _gram(features: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, C], divided by H * W."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / flat.shape[2]
