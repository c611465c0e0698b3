"""Checkpoints: safetensors and JSON in a directory. Loading runs no code that the file brings.

model.safetensors      the averaged generator; with config.json all that inference needs
config.json            the resolved configuration
training.safetensors   networks and optimisers
state.json             how far the training is
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nst.config import TrainConfig, from_dict, to_dict
from nst.networks.build import build_generator
from nst.networks.style_generator import StyleGenerator

FORMAT_VERSION = 2

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
TRAINING_FILE, STATE_FILE = "training.safetensors", "state.json"


class Trainable(Protocol):
    """What a checkpoint needs of an objective."""

    config: TrainConfig
    ema_generator: StyleGenerator

    def networks(self) -> dict[str, nn.Module]: ...
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...
    def memory(self) -> dict[str, dict[str, float]]: ...
    def recall(self, memory: Mapping[str, Mapping[str, float]]) -> None: ...


def save_checkpoint(checkpoint_dir: str | Path, objective: Trainable, state: dict[str, Any]) -> None:
    """Writes all four files into an existing directory; `state` is what JSON can hold."""
    folder = Path(checkpoint_dir)
    save_file(_contiguous(objective.ema_generator.state_dict()), folder / MODEL_FILE)
    tensors: dict[str, Tensor] = {}
    steps: dict[str, dict[str, float]] = {}
    for name, network in objective.networks().items():
        tensors |= {f"network.{name}.{key}": value for key, value in network.state_dict().items()}
    for name, optimizer in objective.optimizers().items():
        steps[name] = {}
        for index, slots in optimizer.state_dict()["state"].items():
            steps[name][str(index)] = float(slots["step"])
            tensors |= {f"optimizer.{name}.{index}.{slot}": slots[slot] for slot in ("exp_avg", "exp_avg_sq")}
    save_file(_contiguous(tensors), folder / TRAINING_FILE)
    memory = {"optimizer_steps": steps, "objective": objective.memory()}
    _write_json(folder / STATE_FILE, {**state, **memory})
    # last: a directory without it is not a checkpoint
    _write_json(folder / CONFIG_FILE, {"format_version": FORMAT_VERSION, "config": to_dict(objective.config)})


def load_checkpoint(checkpoint_dir: str | Path, objective: Trainable) -> dict[str, Any]:
    """Puts networks and optimisers back where they were; returns the state.

    Raises:
        ValueError: the directory is not a checkpoint of this configuration.
    """
    folder = Path(checkpoint_dir)
    saved = read_config(folder)
    if saved.model != objective.config.model:
        raise ValueError(f"{folder} holds a model of another configuration; give the training another --name")
    tensors, state = _load_tensors(folder / TRAINING_FILE), json.loads((folder / STATE_FILE).read_text())
    steps = state.pop("optimizer_steps")
    objective.recall(state.pop("objective"))
    for name, network in objective.networks().items():
        prefix = f"network.{name}."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    for name, optimizer in objective.optimizers().items():
        slots = {
            int(index): {
                "step": torch.tensor(step),
                **{slot: tensors[f"optimizer.{name}.{index}.{slot}"] for slot in ("exp_avg", "exp_avg_sq")},
            }
            for index, step in steps[name].items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return state


def load_weights(
    checkpoint_dir: str | Path, config: TrainConfig, generators: Iterable[StyleGenerator]
) -> None:
    """Gives a new training's generators the averaged weights of another one's to begin with.

    Raises:
        ValueError: not a checkpoint, or one of another model.
    """
    if read_config(checkpoint_dir).model != config.model:
        raise ValueError(f"{checkpoint_dir} holds another model; take the preset and --set model... it had")
    weights = load_generator(checkpoint_dir).state_dict()
    for generator in generators:
        generator.load_state_dict(weights)


def read_config(checkpoint_dir: str | Path) -> TrainConfig:
    """The configuration that the checkpoint was trained with.

    Raises:
        ValueError: not a checkpoint, or one of another format.
    """
    path = Path(checkpoint_dir) / CONFIG_FILE
    try:
        stored = json.loads(path.read_text())
        version, values = stored["format_version"], stored["config"]
    except FileNotFoundError:
        raise ValueError(f"{checkpoint_dir} is not a checkpoint: it has no {CONFIG_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a checkpoint ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}; this version of nst reads {FORMAT_VERSION}")
    return from_dict(TrainConfig, values)


def load_generator(checkpoint_dir: str | Path, *, device: str | torch.device = "cpu") -> StyleGenerator:
    """The averaged generator of a checkpoint, ready for inference.

    Raises:
        ValueError: not a checkpoint, damaged, or its weights do not fit its configuration.
    """
    config = read_config(checkpoint_dir)
    generator = build_generator(config.model)
    tensors = _load_tensors(Path(checkpoint_dir) / MODEL_FILE)
    try:
        generator.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {checkpoint_dir} do not fit its {CONFIG_FILE}: {error}") from None
    generator.eval().requires_grad_(False)
    return generator.to(device).to(memory_format=torch.channels_last)


def model_digest(checkpoint_dir: str | Path) -> str:
    """sha256 of the weights' bytes and the model's configuration: two checkpoints that stylize alike have
    one digest."""
    folder = Path(checkpoint_dir)
    digest = hashlib.sha256(json.dumps(to_dict(read_config(folder).model), sort_keys=True).encode())
    try:
        with (folder / MODEL_FILE).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a checkpoint: it has no {MODEL_FILE}") from None
    return digest.hexdigest()


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}; is the copy complete?") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); take an earlier checkpoint") from None


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # clones, since safetensors refuses tensors that share memory
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
