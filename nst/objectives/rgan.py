"""Approach 1, the conditional GAN: a U-Net generator against two discriminators (paper, section on the
conditional GAN).

The content discriminator sees a content beside a picture of it and says whether the picture is real; the
style discriminator is siamese and says how near the manners of two pictures are. Both learn first, on
pictures just drawn; then the generator learns to please them as they are. Weights of the terms:
`nst.approaches.RganLoss`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nst import losses
from nst.approaches import RganLoss, RganModel
from nst.augment import diff_augment, draw_augmentation
from nst.batch import Batch
from nst.config import TrainConfig
from nst.distributed import gather, gather_labels, mean_over_ranks, rank
from nst.networks.patch_discriminator import PatchDiscriminator
from nst.networks.style_code import colour_statistics
from nst.networks.style_discriminator import build_style_discriminator
from nst.networks.unet_generator import ConditionalUnet
from nst.objectives.accumulation import backward_in_parts
from nst.objectives.objective import Metrics, Objective

Drawn = tuple[Tensor, Tensor]  # stylized [n, 3, H, W]; sum over the rows' |G(x, x) - x|, a scalar


class Drawing(nn.Module):
    """From pictures to pictures: the generator as training calls it, in the one forward pass that a DDP
    wrapper must see."""

    def __init__(self, generator: ConditionalUnet) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """N contents in N styles -> [N, 3, H, W] in [-1, 1]."""
        return self.generator(content, self.generator.encode_style(style))


class Rgan(Objective):
    """The conditional GAN's networks, optimisers, and one step of each side."""

    generator: ConditionalUnet

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        super().__init__(config, device)
        assert isinstance(config.model, RganModel), config.model
        assert isinstance(config.loss, RganLoss), config.loss
        model, self.weights = config.model, config.loss
        self.content_discriminator = PatchDiscriminator(model.patch_widths, model.patch_field)
        self.style_discriminator = build_style_discriminator(model)
        for network in (self.content_discriminator, self.style_discriminator):
            self.place(network)
        rate = config.optim.encoder_lr
        self.generator_optimizer = self.adam(self.generator.parameters(), config.optim.generator_lr)
        self.content_optimizer = self.adam(self.content_discriminator.parameters(), rate)
        self.style_optimizer = self.adam(self.style_discriminator.parameters(), rate)
        # what trains through these is called by these alone; frozen, the bare discriminators are called
        self._drawing = self.wrapped(Drawing(self.generator))
        self._content_discriminator = self.wrapped(self.content_discriminator)
        self._style_discriminator = self.wrapped(self.style_discriminator)

    def networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.generator,
            "content_discriminator": self.content_discriminator,
            "style_discriminator": self.style_discriminator,
            "ema": self.ema_generator,
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "generator": self.generator_optimizer,
            "content_discriminator": self.content_optimizer,
            "style_discriminator": self.style_optimizer,
        }

    def step(self, batch: Batch, progress: float) -> Metrics:
        """Draws the batch, then one step of each discriminator, then one of the generator. The style
        discriminator begins alone where `optim.encoder_images` says so."""
        encoders = [self.content_optimizer, self.style_optimizer]
        rates = self.set_rates(progress, encoders, self.generator_optimizer)
        if progress * self.config.num_images < self.config.optim.encoder_images:
            return self.style_step(batch, None) | rates
        with self.autocast():
            self.generator.observe(batch.style)
        rows, drawn = torch.arange(batch.num_images, device=self.device), None
        if self.config.batch.accumulate == 1:
            drawn = self._draw(batch, rows)
            stylized = drawn[0].detach()
        else:
            with torch.no_grad():
                parts = rows.chunk(self.config.batch.accumulate)
                stylized = torch.cat([self._draw(batch, part)[0] for part in parts])
        metrics = self.content_step(batch, stylized) | self.style_step(batch, stylized)
        return metrics | self.generator_step(batch, drawn) | rates

    # --- content discriminator ----------------------------------------------------------------------

    def content_step(self, batch: Batch, stylized: Tensor) -> Metrics:
        """Real is (content, the content retouched), fake (content, stylized). While the gate is closed the
        discriminator is only asked."""
        weights, num = self.weights, batch.num_images
        judging = losses.hinge_discriminator if weights.gan == "hinge" else losses.bce_discriminator
        real, draws = self._real(batch), draw_augmentation(num)
        pairs = [self._pairs(batch.content, pictures, draws) for pictures in (real, stylized)]

        def forward(rows: Tensor) -> tuple[Tensor, ...]:
            with self.autocast():
                logits = self._content_discriminator(torch.cat([_rows(part, rows) for part in pairs]))
            return logits.split(len(rows))

        def loss_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
            real, fake = outputs
            loss = judging([real], [fake])
            accuracy = 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean())
            return loss, {
                "content_discriminator/realness": loss.detach(),
                "content_discriminator/realness_accuracy": accuracy,
            }

        if self.gate.is_open:
            if weights.r1 > 0 and batch.step % weights.r1_every == 0:
                self._penalise_gradient(pairs[0])
            parts, network = self.config.batch.accumulate, self._content_discriminator
            metrics = backward_in_parts(forward, num, parts, loss_of, network, self.device)
            self.apply_gradients(self.content_optimizer, self.content_discriminator)
        else:
            with torch.no_grad():
                _, metrics = loss_of(forward(torch.arange(num, device=self.device)))
        accuracy = mean_over_ranks(metrics["content_discriminator/realness_accuracy"])
        self.gate.observe(float(accuracy))
        return metrics

    @torch.no_grad()
    def _real(self, batch: Batch) -> Tensor:
        """Contents slightly blurred and toned, in the palette of a stylized picture: were colours to tell
        real from fake, nothing else would be learnt, and the generator's last layer could not help it."""
        retouched = retouch(batch.content, draw_augmentation(batch.num_images).to(self.device))
        if self.generator.palette.palette == "network":
            return retouched
        colours = colour_statistics(batch.style)
        return self.generator.palette(retouched, batch.content, colours[:, :3], colours[:, 3:6])

    def _pairs(self, content: Tensor, pictures: Tensor, draws: Tensor) -> Tensor:
        """[N, 6, H, W], both shifted and cut alike."""
        pairs = torch.cat([content, pictures], dim=1)
        return diff_augment(pairs, draws) if self.weights.augment else pairs

    def _penalise_gradient(self, pairs: Tensor) -> None:
        """Lazy R1 at real pairs: adds its gradients to the discriminator's, before the step's own. The bare
        `forward`, since DDP takes these in when the wrapped forward pass follows, and a compiled one has no
        second derivative."""
        for part in pairs.chunk(self.config.batch.accumulate):
            images = part.detach().requires_grad_()
            with self.autocast():
                logits = self.content_discriminator.forward(images)
            share = len(part) / len(pairs) * self.weights.r1 * self.weights.r1_every
            (share * losses.r1_penalty([logits], images)).backward()

    # --- style discriminator ------------------------------------------------------------------------

    def style_step(self, batch: Batch, stylized: Tensor | None) -> Metrics:
        """Works of one artist belong together; works of different artists do not, nor do a style and what was
        drawn in it. `stylized` None: artists alone."""
        pictures = [batch.style] if stylized is None else [batch.style, stylized]
        with self.autocast():
            self.style_discriminator.observe(batch.style)

        def forward(rows: Tensor) -> tuple[Tensor, ...]:
            with self.autocast():
                embeddings = self._style_discriminator(torch.cat([_rows(part, rows) for part in pictures]))
            return embeddings.split(len(rows))

        def loss_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
            art, *fake = outputs
            loss = self._margin_loss(batch, art, *fake)
            return loss, {
                "style_discriminator/margin": loss.detach(),
                "encoder/style_cosine": losses.off_diagonal_cosine(gather(art.detach())),
            }

        parts, network = self.config.batch.accumulate, self._style_discriminator
        metrics = backward_in_parts(forward, batch.num_images, parts, loss_of, network, self.device)
        self.apply_gradients(self.style_optimizer, self.style_discriminator)
        return metrics

    def _margin_loss(self, batch: Batch, art: Tensor, fake: Tensor | None = None) -> Tensor:
        """Paper, pairwise margin loss y·d + (1 - y)·max(0, m - d), over three kinds of pairs that weigh the
        same: an artist's two works (y = 1), works of two artists (y = 0), a style and its fake (y = 0).

        Args:
            art, fake: [N, D] embeddings of this rank's artworks and of what was drawn in their styles.
        """
        margin = self.weights.margin
        others = batch.labels[:, None] != gather_labels(batch.labels)[None, :]
        distances = (2 - 2 * art @ gather(art).T).clamp(min=0)  # squared, of unit vectors: [N, all]
        together = losses.squared_distance(art, art[batch.partner]) * batch.has_partner
        apart = (F.relu(margin - distances) * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)
        self.artist_losses = (together + apart).detach()
        num_together = mean_over_ranks(batch.has_partner.sum().float()).clamp(min=1e-6)
        kinds = [together.sum() / num_together, apart.mean()]
        if fake is not None:
            kinds.append(F.relu(margin - losses.squared_distance(art, fake)).mean())
        return torch.stack(kinds).mean()

    # --- generator ----------------------------------------------------------------------------------

    def generator_step(self, batch: Batch, drawn: Drawn | None) -> Metrics:
        """The generator against the discriminators just updated, which stay as they are.

        `drawn`: the whole batch, with its graph; None: it is drawn here, part by part.
        """
        weights, num = self.weights, batch.num_images
        draws = draw_augmentation(num)
        fooling = losses.hinge_generator if weights.gan == "hinge" else losses.bce_generator
        frozen = (self.content_discriminator, self.style_discriminator)
        for network in frozen:
            network.requires_grad_(False)
        try:
            with torch.no_grad(), self.autocast():
                wanted = self.style_discriminator(batch.style)

            def forward(rows: Tensor) -> tuple[Tensor, ...]:
                stylized, reconstruction = drawn or self._draw(batch, rows)
                pairs = self._pairs(_rows(batch.content, rows), stylized, draws[rows.cpu()])
                with self.autocast():
                    logits = self.content_discriminator(pairs)
                    embedding = self.style_discriminator(stylized)
                return stylized, logits, embedding, reconstruction

            def loss_of(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Metrics]:
                stylized, logits, embedding, reconstruction = outputs
                terms = {
                    "style": losses.squared_distance(embedding, wanted).mean(),  # (style, stylized) = 1
                    "adversarial": fooling([logits]),
                }
                if weights.mae:
                    terms["mae"] = F.l1_loss(stylized, batch.content)
                if weights.luminance:
                    terms["luminance"] = losses.low_band_structure(stylized, batch.content)
                if weights.reconstruction:
                    terms["reconstruction"] = reconstruction / (num / 2)  # every other picture
                total = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
                return total, {f"generator/{name}": term.detach() for name, term in terms.items()}

            parts = self.config.batch.accumulate
            metrics = backward_in_parts(forward, num, parts, loss_of, self._drawing, self.device)
        finally:
            for network in frozen:
                network.requires_grad_(True)
        norm = self.apply_gradients(self.generator_optimizer, self.generator)
        return {**metrics, "generator/gradient_norm": norm}

    def _draw(self, batch: Batch, rows: Tensor) -> Drawn:
        """The rows' contents in their styles, and every other row's picture in its own style, a content in
        one step and an artwork in the next. One call, since DDP wants one forward a backward."""
        content, style = _rows(batch.content, rows), _rows(batch.style, rows)
        place = rows + rank() * batch.num_images  # in the global batch, whichever way that is cut
        is_again = (place + batch.step // 2) % 2 == 0
        again = (style if batch.step % 2 else content)[is_again & (self.weights.reconstruction > 0)]
        with self.autocast():
            pictures = self._drawing(torch.cat([content, again]), torch.cat([style, again]))
        stylized, reconstructed = pictures.split([len(rows), len(again)])
        return stylized, (reconstructed - again).abs().mean(dim=(1, 2, 3)).sum()


def retouch(images: Tensor, draws: Tensor) -> Tensor:
    """Mild blur, contrast and tone, so that a content discriminator cannot go by the pixels being the same.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        draws: [N, 4] in [0, 1), of which three are used.

    Returns:
        [N, 3, H, W] in [-1, 1].
    """
    blur, contrast, tone = (draws[:, index].reshape(-1, 1, 1, 1) for index in range(3))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, blur)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(mean, images, 0.8 + 0.4 * contrast).clamp(-1, 1)
    gamma = torch.exp(0.6 * (tone - 0.5))
    return ((images + 1) / 2).clamp(min=1e-4).pow(gamma) * 2 - 1


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Those rows. All of them are taken as they are: a copy would lose the memory layout."""
    return tensor if len(rows) == len(tensor) else tensor[rows]
