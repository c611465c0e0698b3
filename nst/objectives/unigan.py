"""Approach 2, the unidirectional GAN: content encoder, style encoder and decoder, where the same encoders are
the discriminators (paper, section on the unidirectional network).

An encoder step teaches the encoders to tell artists apart (matrix loss), fakes from art (realness) and
contents from each other (pairwise margin loss). A generator step teaches modulator and decoder to please
them. Nothing maps back: content and style of the stylized picture are compared by the encoders that made it,
so the cycle is closed by the architecture. Weights of the terms: `nst.approaches.UniganLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst import losses
from nst.approaches import UniganLoss, UniganModel
from nst.augment import change_look, diff_augment, draw_augmentation
from nst.batch import Batch
from nst.config import TrainConfig
from nst.distributed import gather, mean_over_ranks, rank
from nst.networks.content_encoder import ContentFeatures
from nst.networks.generator import Generator
from nst.networks.style_code import colour_statistics
from nst.networks.wavelet_encoder import tap_statistics
from nst.objectives.accumulation import backward_in_parts
from nst.objectives.embedding_losses import artist_losses, content_margin, mean_over_valid
from nst.objectives.objective import Metrics, Objective
from nst.objectives.unigan_sides import Drawing, Encoders, Judgement
from nst.vgg import load_vgg, perceptual_loss


class Seen(NamedTuple):
    """Everything that a batch is drawn from: N contents in N styles, and then some pictures in their own."""

    contents: ContentFeatures | Tensor
    styles: Tensor
    colours: Tensor
    statistics: Tensor | None  # [N, F] of the artworks, as the discriminators' E_s sees them
    again: Tensor  # [m] rows whose picture is drawn in its own style
    pictures: Tensor  # [m, 3, H, W] those pictures


class Drawn(NamedTuple):
    stylized: Tensor  # [n, 3, H, W]
    reconstructed: Tensor  # [m, 3, H, W]
    original: Tensor  # [m, 3, H, W]


class Unigan(Objective):
    """The unidirectional GAN's networks, optimisers, and one step of each side."""

    generator: Generator

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        assert isinstance(config.model, UniganModel), config.model
        assert isinstance(config.loss, UniganLoss), config.loss
        self.weights = config.loss
        self.encoders = self.place(Encoders(self.generator))
        self.drawing = Drawing(self.generator)
        self.encoder_optimizer = self.adam(self.encoders.parameters(), config.optim.encoder_lr)
        self.generator_optimizer = self.adam(self.drawing.parameters(), config.optim.generator_lr)
        self._encoders, self._drawing = self.wrapped(self.encoders), self.wrapped(self.drawing)
        self._vgg = load_vgg().to(self.device) if self.weights.perceptual else None
        self._perceptual_loss = torch.compile(perceptual_loss) if config.compile else perceptual_loss

    def networks(self) -> dict[str, nn.Module]:
        """`encoders` holds E_c and E_s, which the generator shares."""
        return {"encoders": self.encoders, "drawing": self.drawing, "ema": self.ema_generator}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"encoders": self.encoder_optimizer, "drawing": self.generator_optimizer}

    def step(self, batch: Batch, progress: float) -> Metrics:
        """Draws the batch, then one encoder step and one generator step."""
        rates = self.set_rates(progress, [self.encoder_optimizer], self.generator_optimizer)
        if progress * self.config.num_images < self.config.optim.encoder_images:
            return self.encoder_step(batch, None) | rates
        seen = self._see(batch)
        if not self.weights.asks_encoders:
            return self.generator_step(batch, seen, None, progress) | rates
        drawn = stylized = None
        if self.config.batch.accumulate == 1:
            drawn = self._draw(seen, torch.arange(batch.num_images, device=self.device))
            stylized = drawn.stylized.detach()
        else:
            rows = torch.arange(batch.num_images, device=self.device).chunk(self.config.batch.accumulate)
            with torch.no_grad():
                stylized = torch.cat([self._draw(seen, part).stylized for part in rows])
        metrics = self.encoder_step(batch, stylized, seen.statistics)
        return metrics | self.generator_step(batch, seen, drawn, progress) | rates

    # --- encoder step -------------------------------------------------------------------------------

    def encoder_step(
        self, batch: Batch, stylized: Tensor | None, statistics: Tensor | None = None
    ) -> Metrics:
        """Encoders as discriminators: the matrix loss over artists, realness (real = art; fake = stylized
        pictures and plain photos) and, for E_c, the pairwise margin loss and PatchNCE on another rendering of
        the same content. `stylized` None: the encoders train alone. `statistics` [N, F]: the artworks', where
        E_s has been asked already.

        There is no adversarial term on E_c, and fakes are pushed away from their style, never pulled to it.
        """
        num = batch.num_images
        kinds = [batch.style, batch.content] if stylized is None else [batch.style, stylized, batch.content]
        looked_at = [diff_augment(images, draw_augmentation(num)) for images in kinds]
        contents = [batch.content, change_look(batch.content, batch.style)]
        self.encoders.embedding.observe(self._statistics(batch.style) if statistics is None else statistics)
        if self.weights.r1 > 0 and batch.step % self.weights.r1_every == 0:
            self._penalise_gradient(batch.style)

        def forward(rows: Tensor) -> tuple[Tensor, ...]:
            with self.autocast():
                judged = self._encoders(_rows_of(looked_at, rows), _rows_of(contents, rows))
            # [kinds * n, ...] -> [n, kinds, ...]: what is said of one row stays together
            return tuple(part.unflatten(0, (-1, len(rows))).transpose(0, 1) for part in judged)

        def loss_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
            return self._encoder_loss(Judgement(*outputs), batch)

        parts = self.config.batch.accumulate
        metrics = backward_in_parts(forward, num, parts, loss_of, self._encoders, self.device)
        norm = self.apply_gradients(self.encoder_optimizer, self.encoders)
        accuracy = float(mean_over_ranks(metrics["encoder/realness_accuracy"]))
        self.gate.observe(accuracy)
        return {**metrics, "encoder/gradient_norm": norm}

    def _encoder_loss(self, judged: Judgement, batch: Batch) -> tuple[Tensor, Metrics]:
        """`judged` holds [N, kinds, ...]; kinds are art, stylized, photo, and photo, another look of it."""
        weights = self.weights
        z_art = judged.z[:, 0]
        z_fake = judged.z[:, 1] if judged.z.shape[1] == 3 else None
        real = [judged.local[:, 0], judged.wide[:, 0]]
        fake = [judged.local[:, 1:].flatten(0, 1), judged.wide[:, 1:].flatten(0, 1)]
        h, h_other = judged.h.unbind(1)
        q, q_other = judged.q.unbind(1)

        artist, guessing = artist_losses(weights, z_art, z_art, batch, z_fake)
        self.artist_losses = artist.detach()
        metric = mean_over_valid(artist, batch.has_partner)
        realness = losses.hinge_discriminator(real, fake)
        margin = content_margin(h, gather(h_other), weights.margin)
        patch = losses.patch_nce(q_other, q, weights.patch_temperature)
        # the gate closes on realness alone: artists and contents are learned on
        share = weights.realness * float(self.gate.is_open)
        total = metric + share * realness + margin + weights.encoder_patch * patch
        with torch.no_grad():
            right = [(part > 0).float().mean() for part in real] + [
                (part < 0).float().mean() for part in fake
            ]
            metrics = {
                "encoder/metric": metric.detach(),
                "encoder/realness": realness.detach(),
                "encoder/margin": margin.detach(),
                "encoder/patch": patch.detach(),
                "encoder/realness_accuracy": torch.stack(right).mean(),
                "encoder/style_cosine": losses.off_diagonal_cosine(gather(z_art)),
                "encoder/content_cosine": losses.off_diagonal_cosine(gather(h)),
            }
            if guessing is not None:
                metrics["encoder/guessing"] = metric.detach() / guessing
        return total, metrics

    def _penalise_gradient(self, art: Tensor) -> None:
        """Lazy R1: adds its gradients to the encoders', before the step's own. The bare module, since DDP
        takes these in when the wrapped forward pass follows, and a compiled one has no second derivative."""
        weights = self.weights
        for part in art.chunk(self.config.batch.accumulate):
            images = part.detach().requires_grad_()
            with self.autocast():
                logits = self.encoders.judge_realness(images)
            share = len(part) / len(art) * weights.r1 * weights.r1_every
            penalty = share * losses.r1_penalty(logits, images)
            penalty.backward()

    # --- generator step -----------------------------------------------------------------------------

    def generator_step(self, batch: Batch, seen: Seen, drawn: Drawn | None, progress: float) -> Metrics:
        """Modulator and decoder against the encoders just updated, which stay as they are.

        `drawn`: the whole batch, with its graph; None: it is drawn here, part by part.
        """
        weights = self.weights
        self.encoders.requires_grad_(False)
        try:
            wanted: Judgement | None = None
            if weights.asks_encoders:
                draws = draw_augmentation(batch.num_images)
                with torch.no_grad(), self.autocast():
                    # cut and shifted like the stylized pictures, or their statistics could not agree
                    wanted = self._frozen(diff_augment(batch.style, draws), batch.content)

            def forward(rows: Tensor) -> tuple[Tensor, ...]:
                made = drawn or self._draw(seen, rows)
                difference = (made.reconstructed - made.original).abs().mean(dim=(1, 2, 3)).sum()
                pictures = (made.stylized, difference / (batch.num_images / 2))  # every other picture
                if wanted is None:
                    return pictures
                with self.autocast():
                    looked_at = diff_augment(made.stylized, _rows_of([draws], rows.cpu()))
                    return (*self._frozen(looked_at, made.stylized), *pictures)

            def loss_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
                *judged, stylized, reconstruction = outputs
                terms = self._picture_terms(stylized, batch)
                if wanted is not None:
                    terms |= self._judged_terms(Judgement(*judged), wanted, batch)
                if weights.reconstruction:
                    terms["reconstruction"] = reconstruction
                total = torch.stack([self._weight(name, progress) * term for name, term in terms.items()])
                return total.sum(), {f"generator/{name}": term.detach() for name, term in terms.items()}

            parts = self.config.batch.accumulate
            metrics = backward_in_parts(forward, batch.num_images, parts, loss_of, self._drawing, self.device)
        finally:
            self.encoders.requires_grad_(True)
        norm = self.apply_gradients(self.generator_optimizer, self.drawing)
        return {**metrics, "generator/gradient_norm": norm}

    def _judged_terms(self, judged: Judgement, wanted: Judgement, batch: Batch) -> dict[str, Tensor]:
        """What the encoders say: the terms that have a weight above 0, each a scalar."""
        weights = self.weights
        artist, _ = artist_losses(weights, judged.z, wanted.z, batch)
        return self._weighted(
            {
                "matrix": lambda: mean_over_valid(artist, batch.has_partner),
                "reference": lambda: losses.squared_distance(judged.z, wanted.z).mean(),
                "content": lambda: losses.squared_distance(judged.h, wanted.h).mean(),
                "patch": lambda: losses.patch_nce(judged.q, wanted.q, weights.patch_temperature),
                "adversarial": lambda: losses.hinge_generator([judged.local, judged.wide]),
                "statistics": lambda: losses.statistics_distance(
                    judged.statistics, wanted.statistics, self.encoders.embedding.standardise.spread
                ),
            }
        )

    def _picture_terms(self, stylized: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the pictures alone say: the terms that have a weight above 0, each a scalar."""
        return self._weighted(
            {
                "mae": lambda: F.l1_loss(stylized, batch.content),
                "luminance": lambda: losses.low_band_structure(stylized, batch.content),
                "bands": lambda: losses.sliced_band_distance(stylized, batch.style),
                "perceptual": lambda: self._perceptual(stylized, batch),
                "grid": lambda: losses.grid_loss(stylized),
            }
        )

    def _weighted(self, terms: dict[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        return {name: term() for name, term in terms.items() if getattr(self.weights, name) > 0}

    def _perceptual(self, stylized: Tensor, batch: Batch) -> Tensor:
        assert self._vgg is not None
        with self.autocast():
            content, style = self._perceptual_loss(self._vgg, stylized, batch.content, batch.style)
        return content + self.weights.perceptual_style * style

    def _weight(self, name: str, progress: float) -> float:
        weight = getattr(self.weights, name)
        if name == "luminance":  # strict at first, then the style may move light and dark
            weight *= 1 - progress * (1 - self.weights.final_luminance)
        return weight

    # --- drawing ------------------------------------------------------------------------------------

    def _see(self, batch: Batch) -> Seen:
        """Contents, styles, and every other picture once more to be drawn in its own style: contents at even
        steps, artworks at odd ones."""
        num = batch.num_images
        first = (batch.step // 2 + rank() * num) % 2  # in the global batch, whichever way that is cut
        again = torch.arange(first, num, 2, device=self.device)
        if not self.weights.reconstruction:
            again = again[:0]
        pictures = (batch.style if batch.step % 2 else batch.content)[again]
        contents, styles = torch.cat([batch.content, pictures]), torch.cat([batch.style, pictures])
        colours = colour_statistics(styles)
        if self.drawing.owns_encoders and self.generator.config.direct_statistics:  # nothing to take in
            return Seen(contents, styles, colours, None, again, pictures)
        with torch.no_grad(), self.autocast():
            features, statistics = self.drawing.look(contents, styles)
            self.generator.modulator.observe(statistics[:num], colours[:num])
            if not self.drawing.owns_encoders:
                styles = self.generator.describe_style(statistics)
                return Seen(features, styles, colours, statistics[:num], again, pictures)
            if self.generator.embedding is not None:
                self.generator.embedding.observe(statistics[:num])
        # trained with the drawing, the encoders look again
        return Seen(contents, styles, colours, None, again, pictures)

    def _draw(self, seen: Seen, rows: Tensor) -> Drawn:
        """The rows of the batch, and those of them that are drawn again: one call, since DDP wants one
        forward a backward."""
        num = len(seen.colours) - len(seen.again)
        if len(rows) == num:  # all of them; asking the device which would wait for it
            among = torch.arange(len(seen.again), device=rows.device)
            contents, styles, colours = seen.contents, seen.styles, seen.colours
        else:
            among = torch.isin(seen.again, rows).nonzero().flatten()
            places = torch.cat([rows, num + among])
            contents = (
                seen.contents[places]
                if isinstance(seen.contents, Tensor)
                else ContentFeatures(*(level[places] for level in seen.contents))
            )
            styles, colours = seen.styles[places], seen.colours[places]
        with self.autocast():
            pictures = self._drawing(contents, styles, colours)
        return Drawn(pictures[: len(rows)], pictures[len(rows) :], seen.pictures[among])

    @torch.no_grad()
    def _statistics(self, images: Tensor) -> Tensor:
        with self.autocast():
            return tap_statistics(self.encoders.style(images))

    @property
    def _frozen(self) -> nn.Module:
        """The encoders without their DDP wrapper, which would wait for gradients."""
        return self.encoders


def _rows_of(tensors: list[Tensor], rows: Tensor) -> Tensor:
    """Those rows of every tensor, joined. All rows are taken as they are: a copy would lose the layout."""
    return torch.cat([tensor if len(rows) == len(tensor) else tensor[rows] for tensor in tensors])
