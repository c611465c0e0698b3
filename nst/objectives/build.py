"""From a configuration to its objective."""

from __future__ import annotations

import torch

from nst.config import TrainConfig
from nst.objectives.objective import Objective
from nst.objectives.rgan import Rgan
from nst.objectives.unigan import Unigan


def build_objective(config: TrainConfig, device: torch.device | str = "cpu") -> Objective:
    """The objective of the approach that the configuration is of."""
    kinds = {"unigan": Unigan, "rgan": Rgan}
    return kinds[config.model.kind](config, device)
