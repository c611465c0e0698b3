"""From a configuration to its objective."""

from __future__ import annotations

import torch

from nst.config import TrainConfig
from nst.objectives.objective import Objective
from nst.objectives.unigan import Unigan


def build_objective(config: TrainConfig, device: torch.device | str = "cpu") -> Objective:
    """The objective of the approach that the configuration is of."""
    if config.model.kind == "unigan":
        return Unigan(config, device)
    raise NotImplementedError(config.model.kind)
