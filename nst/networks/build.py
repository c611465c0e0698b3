"""From a configuration to its generator."""

from __future__ import annotations

from nst.approaches import ModelConfig, UniganModel
from nst.networks.generator import Generator
from nst.networks.style_generator import StyleGenerator
from nst.networks.unet_generator import build_unet


def build_generator(config: ModelConfig) -> StyleGenerator:
    """The generator of the approach that the configuration is of, freshly initialised."""
    return Generator(config) if isinstance(config, UniganModel) else build_unet(config)
