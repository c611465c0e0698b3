"""Approach 2, the unidirectional GAN: content encoder, style encoder and decoder, where the same encoders are
the discriminators (paper, section on the unidirectional network).

An encoder step teaches the encoders to tell artists apart, fakes from art and contents from each other; a
generator step teaches decoder and modulator to please them. Weights of the terms: `nst.config.LossConfig`."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nst import losses
from nst.augment import change_look, diff_augment
from nst.batch import Batch
from nst.config import TrainConfig
from nst.distributed import gather, gather_labels, rank, world_size
from nst.networks.content_encoder import ContentFeatures, ContentHeads
from nst.networks.generator import Generator
from nst.networks.style_code import colour_statistics
from nst.networks.wavelet_encoder import StyleHeads, tap_statistics

Metrics = dict[str, Tensor]


class Judgement(NamedTuple):
    """What the encoders say of one set of pictures."""

    z: Tensor  # [N, D] style, unit norm
    logits: list[Tensor]  # realness maps
    statistics: Tensor  # [N, F] of the taps


class Encoders(nn.Module):
    """E_c and E_s with their heads: one module, so that one DDP wrapper sees one forward a step."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        config = generator.config
        self.content = generator.content_encoder
        self.style = generator.style_encoder
        self.content_heads = ContentHeads(config.content_widths[-1], config.embedding_dim)
        self.style_heads = StyleHeads(self.style.tap_channels, config.embedding_dim)

    def judge_style(self, images: Tensor) -> Judgement:
        taps = self.style(images)
        return Judgement(
            self.style_heads.embedding(taps), self.style_heads.logits(taps), tap_statistics(taps)
        )

    def judge_content(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """h [N, D] and q [N, d, h, w]."""
        return self.content_heads(self.content(images).eighth)

    def forward(
        self, style_images: Tensor, content_images: Tensor
    ) -> tuple[Judgement, tuple[Tensor, Tensor]]:
        return self.judge_style(style_images), self.judge_content(content_images)


class Drawing(nn.Module):
    """Modulator and decoder: what the generator step trains."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.modulator, self.decoder = generator.modulator, generator.decoder

    def forward(self, features: ContentFeatures, statistics: Tensor, colours: Tensor) -> Tensor:
        return self.decoder(features, self.modulator(statistics, colours))


class Drawn(NamedTuple):
    """The pictures drawn from one batch, which both steps judge."""

    stylized: Tensor  # [N, 3, H, W]
    reconstructed: Tensor  # [N, 3, H, W], every other picture in its own style


class Unigan:
    """The objective: networks, optimisers, EMA, and one step of each side.

    Args:
        config: the whole configuration.
        device: where the networks live.
    """

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.config = config
        self.device = torch.device(device)
        self.generator = Generator(config.model).to(self.device).to(memory_format=torch.channels_last)
        self.encoders = Encoders(self.generator).to(self.device).to(memory_format=torch.channels_last)
        self.drawing = Drawing(self.generator)
        self.ema_generator = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas = config.optim.betas
        self.encoder_optimizer = torch.optim.Adam(
            self.encoders.parameters(), lr=config.optim.encoder_lr, betas=betas
        )
        self.generator_optimizer = torch.optim.Adam(
            self.drawing.parameters(), lr=config.optim.generator_lr, betas=betas
        )
        self._encoders: nn.Module = self.encoders
        self._drawing: nn.Module = self.drawing
        if world_size() > 1:
            # separate wrappers: one around both would wait for gradients that a step does not make
            devices = [self.device] if self.device.type == "cuda" else None
            self._encoders = DistributedDataParallel(self.encoders, device_ids=devices)
            self._drawing = DistributedDataParallel(self.drawing, device_ids=devices)

    # --- the two steps -------------------------------------------------------------------------------

    def step(self, batch: Batch, progress: float) -> Metrics:
        """One encoder step and one generator step; `progress` in [0, 1] is the share of the training done."""
        scale = self._learning_rate_scale(progress)
        for optimizer, rate in (
            (self.encoder_optimizer, self.config.optim.encoder_lr),
            (self.generator_optimizer, self.config.optim.generator_lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        drawn = self._draw(batch)
        metrics = self.encoder_step(batch, drawn.stylized.detach())
        metrics |= self.generator_step(batch, drawn)
        metrics["optim/learning_rate"] = torch.tensor(self.config.optim.generator_lr * scale)
        return metrics

    def encoder_step(self, batch: Batch, stylized: Tensor) -> Metrics:
        """Encoders as discriminators: matrix loss over artists with fakes as negatives, realness, R1, and
        for E_c the pairwise margin loss and PatchNCE on another rendering of the same content."""
        weights, num = self.config.loss, batch.num_images
        penalise = weights.r1 > 0 and batch.step % weights.r1_every == 0
        art = batch.style.detach().requires_grad_(penalise)
        another_look = change_look(batch.content, batch.style)
        with self._autocast():
            judged, (h, q) = self._encoders(
                diff_augment(torch.cat([art, stylized, batch.content])),
                torch.cat([batch.content, another_look]),
            )
        z_art, z_fake, _ = judged.z.split(num)
        real = [part[:num] for part in judged.logits]
        fakes = [part[num:] for part in judged.logits]  # stylized pictures and plain photos

        metric = self._artist_loss(z_art, gather(z_art), batch, extra=gather(z_fake))
        realness = losses.hinge_discriminator(real, fakes)
        margin = self._content_margin(h[:num], gather(h[num:]))
        patch = losses.patch_nce(q[num:], q[:num], weights.patch_temperature)
        total = metric + realness + margin + 0.5 * patch
        if penalise:
            total = total + weights.r1 * weights.r1_every * losses.r1_penalty(real, art)
        self._update(self.encoder_optimizer, total, self.encoders)
        with torch.no_grad():
            correct = torch.stack(
                [(part > 0).float().mean() for part in real] + [(part < 0).float().mean() for part in fakes]
            )
            return {
                "encoder/matrix": metric.detach(),
                "encoder/realness": realness.detach(),
                "encoder/margin": margin.detach(),
                "encoder/patch": patch.detach(),
                "encoder/realness_accuracy": correct.mean(),
                "encoder/style_cosine": losses.off_diagonal_cosine(z_art),
                "encoder/content_cosine": losses.off_diagonal_cosine(h[:num]),
            }

    def generator_step(self, batch: Batch, drawn: Drawn) -> Metrics:
        """Decoder and modulator against the encoders just updated, which stay as they are."""
        weights = self.config.loss
        stylized = drawn.stylized
        self.encoders.requires_grad_(False)
        try:
            with self._autocast():
                judged = self.encoders.judge_style(diff_augment(stylized))
                h, q = self.encoders.judge_content(stylized)
                with torch.no_grad():
                    art = self.encoders.judge_style(batch.style)
                    h_content, q_content = self.encoders.judge_content(batch.content)
            spread = self.generator.modulator.standardise.variance[: judged.statistics.shape[1]].sqrt() + 1e-3
            terms = {
                "matrix": self._artist_loss(judged.z, gather(art.z), batch),
                "reference": losses.squared_distance(judged.z, art.z).mean(),
                "content": losses.squared_distance(h, h_content).mean(),
                "patch": losses.patch_nce(q, q_content, weights.patch_temperature),
                "adversarial": losses.hinge_generator(judged.logits),
                "reconstruction": F.l1_loss(
                    drawn.reconstructed, torch.cat([batch.content, batch.style])[::2]
                ),
                "luminance": losses.low_band_structure(stylized, batch.content),
                "statistics": losses.statistics_distance(judged.statistics, art.statistics, spread),
                "bands": losses.sliced_band_distance(stylized, batch.style),
            }
            total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
            self._update(self.generator_optimizer, total, self.drawing)
        finally:
            self.encoders.requires_grad_(True)
        return {f"generator/{name}": term.detach() for name, term in terms.items()}

    def _draw(self, batch: Batch) -> Drawn:
        """Stylizes the batch, and redraws half of its pictures in their own style."""
        pictures = torch.cat([batch.content, batch.style])
        with torch.no_grad(), self._autocast():
            features = self.encoders.content(pictures)
            statistics = tap_statistics(self.encoders.style(pictures))
        colours = colour_statistics(pictures)
        num = batch.num_images
        # one call, since DDP wants one forward a backward: N stylizations, then N reconstructions
        sources = torch.cat([torch.arange(num), torch.arange(0, 2 * num, 2)]).to(self.device)
        styles = torch.cat([torch.arange(num, 2 * num), torch.arange(0, 2 * num, 2)]).to(self.device)
        with self._autocast():
            pictures_drawn = self._drawing(
                ContentFeatures(*(level[sources] for level in features)), statistics[styles], colours[styles]
            )
        return Drawn(pictures_drawn[:num], pictures_drawn[num:])

    # --- parts of the losses ------------------------------------------------------------------------

    def _artist_loss(
        self, rows: Tensor, columns: Tensor, batch: Batch, extra: Tensor | None = None
    ) -> Tensor:
        """Each row onto another work by its artist; the artist's remaining works are left out, `extra`
        columns (fakes) are negatives for all."""
        num = len(rows)
        all_labels = gather_labels(batch.labels)
        positives = batch.partner + num * rank()
        mask = batch.labels[:, None] == all_labels[None, :]
        if extra is not None:
            columns = torch.cat([columns, extra])
            mask = torch.cat([mask, torch.zeros_like(mask[:, :1]).expand(-1, len(extra))], dim=1)
        return losses.matrix_loss(rows, columns, positives, self.config.loss.temperature, mask)

    def _content_margin(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(c, T(c)) belong together, (c_i, c_j) do not; both kinds weigh the same."""
        distances = (2 - 2 * rows @ columns.T).clamp(min=0)
        own = torch.arange(len(rows), device=rows.device) + len(rows) * rank()
        same = F.one_hot(own, len(columns)).bool()
        margin = self.config.loss.margin
        together = losses.pairwise_margin(distances[same], torch.ones_like(distances[same]), margin)
        apart = losses.pairwise_margin(distances[~same], torch.zeros_like(distances[~same]), margin)
        return 0.5 * (together + apart)

    # --- optimisation -------------------------------------------------------------------------------

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, network: nn.Module) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.config.optim.gradient_clip)
        optimizer.step()

    def _learning_rate_scale(self, progress: float) -> float:
        optim = self.config.optim
        done = progress * self.config.num_images
        warmup = min(1.0, (done + 1) / max(optim.warmup_images, 1))
        cosine = 0.5 * (1 + float(torch.cos(torch.tensor(min(progress, 1.0) * torch.pi))))
        return warmup * (optim.final_lr + (1 - optim.final_lr) * cosine)

    @torch.no_grad()
    def update_ema(self, num_images: int, num_images_seen: int) -> None:
        """Moves the averaged weights; the decay is for 32 images, and shorter at the start."""
        decay = self.config.optim.ema_decay ** (num_images / 32)
        decay = min(decay, (num_images_seen + 32) / (num_images_seen + 320))
        for mean, current in zip(self.ema_generator.parameters(), self.generator.parameters(), strict=True):
            mean.lerp_(current, 1 - decay)
        for mean, current in zip(self.ema_generator.buffers(), self.generator.buffers(), strict=True):
            mean.copy_(current)

    @torch.no_grad()
    def preview(self, content: Tensor, style: Tensor) -> Tensor:
        """Every content in every style, by the averaged weights.

        Args:
            content: [C, 3, H, W]; style: [S, 3, h, w]; in [-1, 1].

        Returns:
            [C, S, 3, H, W] in [-1, 1], fp32.
        """
        with self._autocast():
            codes = self.ema_generator.encode_style(style)
            rows = [self.ema_generator(content, codes[index]) for index in range(len(codes))]
        return torch.stack(rows, dim=1).float()

    # --- checkpoint ---------------------------------------------------------------------------------

    def networks(self) -> dict[str, nn.Module]:
        """Everything with weights; `encoders` holds E_c and E_s, which the generator shares."""
        return {"encoders": self.encoders, "drawing": self.drawing, "ema": self.ema_generator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"encoders": self.encoder_optimizer, "drawing": self.generator_optimizer}
