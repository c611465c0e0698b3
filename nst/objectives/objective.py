"""What both approaches share: averaged weights, optimisers and their schedule, precision, wrappers for many
ranks, previews, and what a checkpoint must hold."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nst.batch import Batch
from nst.config import TrainConfig
from nst.distributed import gather, world_size
from nst.networks.build import build_generator
from nst.networks.style_generator import StyleGenerator
from nst.stability import Alarms, SuccessGate

Metrics = dict[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


class Objective(ABC):
    """Networks, optimisers and one training step.

    Args:
        config: the whole configuration.
        device: where the networks live.

    Attributes:
        generator: what is trained; `ema_generator` its averaged weights, which become the model.
        artist_losses: [N], how hard each artwork of the newest batch was to tell apart (this rank's).
    """

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.config = config
        self.device = torch.device(device)
        self.generator: StyleGenerator = self.place(build_generator(config.model))
        self.ema_generator: StyleGenerator = copy.deepcopy(self.generator).eval().requires_grad_(False)
        self.gate = SuccessGate(config.optim.success_gate)
        self.alarms = Alarms()
        self.artist_losses = torch.zeros(0)

    @abstractmethod
    def step(self, batch: Batch, progress: float) -> Metrics:
        """One step of both sides; `progress` in [0, 1] is the share of the training done."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Everything with weights, each part once."""

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]: ...

    # --- for the approaches -------------------------------------------------------------------------

    def place(self, network: Network) -> Network:
        return network.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def adam(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Adam:
        # one kernel for all weights on a GPU; on a CPU the loop is as fast, and its bits are those of before
        is_fused = self.device.type == "cuda"
        return torch.optim.Adam(parameters, lr=rate, betas=self.config.optim.betas, fused=is_fused)

    def wrapped(self, network: nn.Module) -> nn.Module:
        """`network` compiled if that is asked for, and in a DDP wrapper of its own if there are many ranks:
        one around both sides would wait for gradients that a step does not make."""
        if self.config.compile:
            network.compile()  # in place: the names of its weights stay
        if world_size() == 1:
            return network
        devices = [self.device] if self.device.type == "cuda" else None
        # said of 1x1 kernels, whose layout is ambiguous and costs nothing
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(network, device_ids=devices)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def apply_gradients(self, optimizer: torch.optim.Optimizer, network: nn.Module) -> Tensor:
        """One optimiser step on clipped gradients, which are then dropped; their norm before the clip."""
        norm = nn.utils.clip_grad_norm_(network.parameters(), self.config.optim.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def learning_rate_scale(self, progress: float) -> float:
        """Linear warm-up, then a cosine from 1 to `final_lr`."""
        optim = self.config.optim
        done = progress * self.config.num_images
        warmup = min(1.0, (done + 1) / max(optim.warmup_images, 1))
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))
        return warmup * (optim.final_lr + (1 - optim.final_lr) * cosine)

    def set_rates(
        self,
        progress: float,
        encoders: Iterable[torch.optim.Optimizer],
        generator: torch.optim.Optimizer,
    ) -> Metrics:
        """Moves the optimisers along the schedule; their learning rates, for the record."""
        optim, scale = self.config.optim, self.learning_rate_scale(progress)
        rates = {"encoder": optim.encoder_lr * scale, "generator": optim.generator_lr * scale}
        for name, optimizers in (("encoder", encoders), ("generator", [generator])):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rates[name]
        return {f"optim/{name}_learning_rate": torch.tensor(rate) for name, rate in rates.items()}

    # --- for the loop -------------------------------------------------------------------------------

    @torch.no_grad()
    def update_ema(self, num_images: int, num_images_seen: int) -> None:
        """Moves the averaged weights; the decay is for 32 images, and shorter at the start."""
        decay = self.config.optim.ema_decay ** (num_images / 32)
        decay = min(decay, (num_images_seen + 32) / (num_images_seen + 320))
        # the running statistics of an encoder that still moves are smoothed like its weights
        means, current = (
            [*generator.parameters(), *generator.buffers()]
            for generator in (self.ema_generator, self.generator)
        )
        get_ema_multi_avg_fn(decay)(means, current, 0)  # all at once on a GPU

    @torch.no_grad()
    def preview(self, content: Tensor, style: Tensor) -> Tensor:
        """Every content in every style, by the averaged weights.

        Args:
            content: [C, 3, H, W]; style: [S, 3, h, w]; in [-1, 1].

        Returns:
            [C, S, 3, H, W] in [-1, 1], fp32.
        """
        with self.autocast():
            codes = self.ema_generator.encode_style(style)
            rows = [self.ema_generator(content, codes[index]) for index in range(len(codes))]
        return torch.stack(rows, dim=1).float()

    def alarm_metrics(self, metrics: Mapping[str, float], batch: Batch) -> dict[str, float]:
        """The alarms' figures for what a step reported (averaged over ranks), with warnings in the log. Every
        rank must call, and has the same answer: it is about the first content of the global batch in the
        styles of its first artists."""
        styles = gather(batch.style[:: batch.works_per_class])[:4]
        drawn = self.preview(gather(batch.content[:1])[:1], styles)[0]
        sensitivity = float(drawn.std(dim=0, correction=0).mean())
        figures = {"sensitivity": sensitivity} if len(drawn) > 1 else {}
        figures |= {
            name: metrics[key]
            for name, key in (("guessing", "encoder/guessing"), ("cosine", "encoder/style_cosine"))
            if key in metrics
        }
        alarms = self.alarms.observe(figures, gate_is_open=self.gate.is_open)
        return {"generator/style_sensitivity": sensitivity, **alarms}

    # --- for the checkpoint -------------------------------------------------------------------------

    def memory(self) -> dict[str, dict[str, float]]:
        """What the next step depends on beside weights and optimisers, as JSON holds it."""
        return {"gate": self.gate.memory(), "alarms": self.alarms.memory()}

    def recall(self, memory: Mapping[str, Mapping[str, float]]) -> None:
        self.gate.recall(memory["gate"])
        self.alarms.recall(memory["alarms"])
