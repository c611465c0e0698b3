"""A checkpoint of a model that is small and untrained: enough for everything but looks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nst.approaches import UniganModel
from nst.checkpoint import CONFIG_FILE, FORMAT_VERSION, MODEL_FILE
from nst.config import TrainConfig, to_dict
from nst.networks.generator import Generator


def tiny_checkpoint(folder: Path, seed: int = 0) -> str:
    """What inference needs of a checkpoint; the same seed gives the same model."""
    torch.manual_seed(seed)
    model = UniganModel(content_widths=(4, 4, 8, 8), style_width=4, num_blocks=1, embedding_dim=8)
    folder.mkdir(parents=True)
    weights = {name: tensor.contiguous().clone() for name, tensor in Generator(model).state_dict().items()}
    save_file(weights, folder / MODEL_FILE)
    config = {"format_version": FORMAT_VERSION, "config": to_dict(TrainConfig(model=model))}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return str(folder)
