"""A gate that cannot refuse is none, nor is one that lets nobody pass: models that are no stylization go the
whole way to it, and no further; the model in the box goes through.

Each is registered, measured with `nst evaluate` on real pictures and refused by `nst promote` with the gate
that is shipped. Checkpoints hold weights and no code, so what these models do is put in where a checkpoint
becomes a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from PIL import Image
from skimage import data
from torch import Tensor, nn

import nst.stylize
from infra import promotions, registry, tracking_server
from nst.builtin import builtin_checkpoint
from nst.checkpoint import model_digest
from nst.metrics import color_transfer, style_copy
from nst.networks.style_code import StyleCode
from nst.networks.style_generator import StyleGenerator
from pipelines import painter
from pipelines.cli import main
from pipelines.gate import DEFAULT_GATE
from pipelines.registration import register_checkpoint
from tests.checkpoints import tiny_checkpoint

Draw = Callable[[Tensor, Tensor], Tensor]
SIZE = 128


def noise(content: Tensor, style: Tensor) -> Tensor:
    return torch.rand(content.shape, generator=torch.Generator().manual_seed(len(content)))


def all_colors(content: Tensor, style: Tensor) -> Tensor:
    """The colours' whole covariance moved, by the map that changes them least (Pitié and Kokaram 2007, "The
    linear Monge-Kantorovitch linear colour mapping"): the best that recolouring does to style_distance."""

    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag_embed(values.clamp(min=1e-8) ** exponent) @ vectors.mT

    pixels, aims = content.double().flatten(2), style.double().flatten(2)
    around = pixels - pixels.mean(dim=2, keepdim=True)
    found, aim = (torch.stack([one.cov(correction=0) for one in many]) for many in (pixels, aims))
    found = found + 1e-6 * torch.eye(3)
    root, inverse = power(found, 0.5), power(found, -0.5)
    moved = inverse @ power(root @ aim @ root, 0.5) @ inverse @ around + aims.mean(dim=2, keepdim=True)
    return moved.view_as(content).clamp(0, 1).float()


# What a model does with contents and styles in [0, 1], and a measure that must give it away.
BAD_MODELS: dict[str, tuple[Draw, str]] = {
    "content": (lambda content, style: content, "style_sensitivity"),
    "style": (style_copy, "content_distance"),
    "noise": (noise, "content_distance"),
    "colors": (color_transfer, "style_distance"),
    "all-colors": (all_colors, "edge_ssim"),
    "double-exposure": (
        lambda content, style: (content + style_copy(content, style)) / 2,
        "structure_copied",
    ),
    "one-look": (lambda content, style: 1 - content, "style_sensitivity"),
}


class BadGenerator(StyleGenerator):
    """Draws as it is told; its style code is the style picture."""

    stride = 16

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.weight = nn.Parameter(torch.zeros(1))

    def encode_style(self, style: Tensor) -> StyleCode:
        none = torch.zeros(len(style), 3)
        return StyleCode(F.interpolate(style, (SIZE, SIZE), mode="bilinear", antialias=True), none, none)

    def forward(self, content: Tensor, code: StyleCode) -> Tensor:
        style = code.expand(len(content)).modulation
        return self.draw((content + 1) / 2, (style + 1) / 2).clamp(0, 1) * 2 - 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four photographs, and four paintings of four manners."""
    content, style = tmp_path_factory.mktemp("content"), tmp_path_factory.mktemp("style")
    for photo in (data.astronaut, data.coffee, data.chelsea, data.rocket):
        Image.fromarray(photo()).resize((192, 160)).save(content / f"{photo.__name__}.png")
    for number, manner in enumerate(list(painter.MANNERS)[:4]):
        Image.fromarray(painter.paint(manner, number, size=(192, 160))).save(style / f"{manner}.png")
    return content, style


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.slow
def test_each_is_refused_and_the_model_in_the_box_is_not(
    pictures: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)  # pictures are small: a second thread costs more than it gives
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tracking_server.check()
    draws: dict[str, Draw] = {}
    load = nst.stylize.load_generator

    def load_generator(checkpoint_dir: str, *, device: str) -> StyleGenerator:
        draw = draws.get(model_digest(checkpoint_dir))
        return load(checkpoint_dir, device=device) if draw is None else BadGenerator(draw).eval()

    monkeypatch.setattr(nst.stylize, "load_generator", load_generator)
    content, style = pictures
    versions = {}
    for seed, (name, (draw, _)) in enumerate(BAD_MODELS.items()):
        checkpoint = tiny_checkpoint(tmp_path / name, seed)
        draws[model_digest(checkpoint)] = draw
        versions[name] = register_checkpoint(checkpoint)

    in_the_box = register_checkpoint(builtin_checkpoint())
    uris = [f"models:/nst/{version}" for version in (*versions.values(), in_the_box)]
    measured = run(
        "evaluate", *uris, "--content", content, "--style", style, "--report", tmp_path / "report",
        "--pairs", 16, "--size", SIZE,
    )  # fmt: skip
    assert measured.exit_code == 0, measured.output
    gate = tmp_path / "gate.toml"  # checkpoints without a training: nobody knows what they saw
    gate.write_text(DEFAULT_GATE.read_text().replace("held_out = true", "held_out = false"))
    for name, version in versions.items():
        refused = run("promote", version, "--gate", gate, "--json")
        answer = json.loads(refused.stdout.splitlines()[-1])
        assert (refused.exit_code, answer["promoted"]) == (3, False), (name, refused.output)
        failed = [finding["text"] for finding in answer["findings"] if not finding["passed"]]
        assert any(text.startswith(BAD_MODELS[name][1]) for text in failed), (name, failed)
    assert registry.champion() is None
    assert promotions.events() == []
    accepted = run("promote", in_the_box, "--gate", gate)
    assert accepted.exit_code == 0, accepted.output
