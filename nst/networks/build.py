"""From a configuration to its generator."""

from __future__ import annotations

from nst.approaches import ModelConfig, UniganModel
from nst.networks.generator import Generator
from nst.networks.style_generator import StyleGenerator


def build_generator(config: ModelConfig) -> StyleGenerator:
    """The generator of the approach that the configuration is of, freshly initialised."""
    if isinstance(config, UniganModel):
        return Generator(config)
    raise NotImplementedError(config.kind)
