"""The unidirectional objective: what each step trains, and that parts and ranks give the same gradients."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nst.batch import Batch
from nst.config import TrainConfig, override
from nst.networks.blocks import num_parameters
from nst.objectives.embedding_losses import _next_of_another, artist_losses
from nst.objectives.unigan import Unigan
from nst.presets import preset

TINY = {
    "model.content_widths": "[8, 8, 12, 16]",
    "model.style_width": "4",
    "model.num_blocks": "1",
    "batch.size": "32",
    "optim.gradient_clip": "1e9",
}


def config(**changes) -> TrainConfig:
    named = {name.replace("__", "."): str(value) for name, value in changes.items()}
    return override(preset("smoke"), {**TINY, **named})


def make_batch(num: int = 8, step: int = 0, labels: list[int] | None = None) -> Batch:
    random = torch.Generator().manual_seed(step)
    content, style = (torch.rand(num, 3, 32, 32, generator=random) * 2 - 1 for _ in range(2))
    return Batch(
        content=content,
        style=style,
        labels=torch.tensor(labels) if labels else torch.arange(num) // 2,
        works_per_class=2,
        step=step,
    ).to("cpu")


def part_of(batch: Batch, rank: int, world_size: int) -> Batch:
    num = batch.num_images // world_size
    mine = slice(rank * num, (rank + 1) * num)
    return replace(batch, content=batch.content[mine], style=batch.style[mine], labels=batch.labels[mine]).to(
        "cpu"
    )


def gradients_of(settings: TrainConfig, batch: Batch) -> dict[str, torch.Tensor]:
    """What one step of each side would apply, without applying it."""
    objective = Unigan(settings)
    found = {}

    def keep(optimizer, network):
        side = "encoders" if network is objective.encoders else "drawing"
        found.update({f"{side}.{name}": p.grad.clone() for name, p in network.named_parameters()})
        optimizer.zero_grad()
        return torch.tensor(0.0)

    objective.apply_gradients = keep  # type: ignore[method-assign]
    torch.manual_seed(3)
    objective.step(batch, 0.5)
    return found


def assert_alike(first, second, tolerance=1e-5):
    """To 1e-5 of the largest gradient of its side: sums in another order round differently."""
    assert first.keys() == second.keys()
    largest = max(float(gradient.abs().max()) for gradient in first.values())
    assert largest > 0.1
    for name, gradient in first.items():
        torch.testing.assert_close(second[name], gradient, atol=tolerance * largest, rtol=0, msg=name)


# no term that asks the encoders
PICTURES_ALONE = {"model__shared_encoders": "false", "model__direct_statistics": "true", "loss__bands": 3.0}
PICTURES_ALONE |= {
    f"loss__{name}": 0.0 for name in ("matrix", "reference", "content", "patch", "adversarial", "statistics")
}

VARIANTS = [
    {},
    PICTURES_ALONE,
    {"model__direct_statistics": "true"},
    {"model__modulator": "false"},
    {"model__shared_encoders": "false"},
    {"model__shared_encoders": "false", "model__modulator": "false"},
    {"loss__metric": "pairs"},
    {"loss__fakes_as_negatives": "false"},
    {"loss__mae": 1.0, "loss__bands": 0.0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parts_give_the_gradients_of_the_whole_batch(variant):
    whole = gradients_of(config(**variant), make_batch())
    for parts in (2, 4):
        assert_alike(whole, gradients_of(config(batch__accumulate=parts, **variant), make_batch()))


def _one_rank(rank, world_size, port, variant, labels, folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        batch = part_of(make_batch(16, labels=labels), rank, world_size)
        torch.save(gradients_of(config(**variant), batch), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


# artists without a second work, more of them on one rank than on the other
RAGGED = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 9]


@pytest.fixture
def in_double():
    """fp32 would fall on either side of a kink, as the machine rounds."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("variant", "labels"),
    [
        ({}, None),
        ({"batch__accumulate": 2}, None),
        ({"model__shared_encoders": "false"}, RAGGED),
    ],
    ids=["plain", "in parts", "ragged, separate encoders"],
)
def test_two_ranks_give_the_gradients_of_one(in_double, variant, labels, tmp_path, free_port):
    whole = gradients_of(config(**variant), make_batch(16, labels=labels))
    mp.start_processes(  # type: ignore[attr-defined]
        _one_rank, (2, free_port, variant, labels, tmp_path), nprocs=2, start_method="spawn"
    )
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(gradient.dtype == torch.float64 for gradient in found.values())
        assert_alike(whole, found, tolerance=1e-10)


def weights_of(network):
    return torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()])


@pytest.mark.parametrize("shared", ["true", "false"])
def test_each_step_trains_its_own_side(shared):
    objective = Unigan(config(model__shared_encoders=shared, loss__r1_every=1))
    batch = make_batch()
    torch.manual_seed(0)
    seen = objective._see(batch)
    drawn = objective._draw(seen, torch.arange(8))

    encoders, drawing = weights_of(objective.encoders), weights_of(objective.drawing)
    objective.encoder_step(batch, drawn.stylized.detach())
    assert not torch.equal(encoders, weights_of(objective.encoders))
    assert torch.equal(drawing, weights_of(objective.drawing))

    encoders = weights_of(objective.encoders)
    objective.generator_step(batch, seen, drawn, 0.0)
    assert torch.equal(encoders, weights_of(objective.encoders))
    assert not torch.equal(drawing, weights_of(objective.drawing))
    assert all(parameter.grad is None for parameter in objective.encoders.parameters())
    assert all(parameter.requires_grad for parameter in objective.encoders.parameters())


def test_encoders_that_nobody_asks_are_left_alone():
    objective = Unigan(config(**PICTURES_ALONE))
    encoders, drawing = weights_of(objective.encoders), weights_of(objective.drawing)
    metrics = objective.step(make_batch(), 0.5)
    assert torch.equal(encoders, weights_of(objective.encoders))
    assert not torch.equal(drawing, weights_of(objective.drawing))
    assert not [name for name in metrics if name.startswith("encoder/")]


def test_shared_encoders_are_the_discriminators_and_separate_ones_are_not():
    shared, separate = Unigan(config()), Unigan(config(model__shared_encoders="false"))
    assert shared.encoders.style is shared.generator.style_encoder
    mine = set(map(id, separate.generator.parameters()))
    assert mine.isdisjoint(map(id, separate.encoders.parameters()))
    extra = num_parameters(separate.drawing) - num_parameters(shared.drawing)
    assert extra == num_parameters(shared.generator.style_encoder) + num_parameters(
        shared.generator.content_encoder
    )


def test_encoders_may_train_alone_first():
    objective = Unigan(config(optim__encoder_images=100, num_images=200))
    drawing, encoders = weights_of(objective.drawing), weights_of(objective.encoders)
    metrics = objective.step(make_batch(), progress=0.4)
    assert torch.equal(drawing, weights_of(objective.drawing))
    assert not torch.equal(encoders, weights_of(objective.encoders))
    assert not any(name.startswith("generator/") for name in metrics)
    assert "generator/matrix" in objective.step(make_batch(step=1), progress=0.6)


def test_a_closed_gate_stops_realness_and_nothing_else():
    objective = Unigan(config(loss__r1=0.0))
    objective.gate.recall({"steps_above": 1000})
    realness, style = weights_of(objective.encoders.realness), weights_of(objective.encoders.style)
    objective.step(make_batch(), 0.5)
    assert torch.equal(realness, weights_of(objective.encoders.realness))
    assert not torch.equal(style, weights_of(objective.encoders.style))


def test_a_collapsed_style_encoder_scores_like_guessing():
    objective = Unigan(config())
    for name, parameter in objective.encoders.embedding.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.zeros_(parameter)
    metrics = objective.step(make_batch(), 0.5)
    assert float(metrics["encoder/guessing"]) == pytest.approx(1, abs=1e-4)
    assert float(metrics["encoder/style_cosine"]) == pytest.approx(1, abs=1e-4)


def test_fakes_are_columns_unless_told_otherwise():
    batch = make_batch()
    columns = {}
    for choice in ("true", "false"):
        objective = Unigan(config(loss__fakes_as_negatives=choice))
        z = torch.nn.functional.normalize(torch.randn(8, 64), dim=1)
        _, guessing = artist_losses(objective.weights, z, z, batch, torch.roll(z, 1, 0))
        assert guessing is not None
        columns[choice] = float(guessing.exp())
    # 8 works less the artist's own two, and the positive; 8 fakes more
    assert columns["false"] == pytest.approx(7)
    assert columns["true"] == pytest.approx(15)


def test_artists_who_are_hard_to_tell_are_known():
    objective = Unigan(config())
    objective.step(make_batch(), 0.5)
    assert objective.artist_losses.shape == (8,)
    assert (objective.artist_losses > 0).all()


def test_losses_stay_fp32_under_bf16():
    objective = Unigan(config(precision="bf16"))
    metrics = objective.step(make_batch(), 0.5)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in metrics.values())
    assert all(parameter.dtype == torch.float32 for parameter in objective.generator.parameters())


def test_luminance_is_strict_first():
    objective = Unigan(config(loss__luminance=2.0, loss__final_luminance=0.25))
    assert [objective._weight("luminance", p) for p in (0, 0.5, 1)] == pytest.approx([2.0, 1.25, 0.5])
    assert objective._weight("bands", 1) == objective.weights.bands


def test_the_paper_preset_uses_the_papers_terms_alone():
    objective = Unigan(
        override(preset("paper_unigan"), {**TINY, "batch.num_classes": "4", "model.embedding_dim": "16"})
    )
    metrics = objective.step(make_batch(), 0.5)
    terms = {name for name in metrics if name.startswith("generator/") and "norm" not in name}
    assert terms == {"generator/matrix", "generator/content", "generator/mae"}


@pytest.mark.faults  # a minute of compiling, where the cache is cold
@pytest.mark.timeout(600)
def test_compiled_networks_train_alike():
    plain, compiled = (Unigan(config(compile=choice)) for choice in ("false", "true"))
    for step in range(3):
        batch = make_batch(step=step)
        results = []
        for objective in (plain, compiled):
            torch.manual_seed(step)
            results.append(objective.step(batch, 0.5))
        assert float(results[1]["generator/matrix"]) == pytest.approx(
            float(results[0]["generator/matrix"]), rel=0.02
        )


def test_averaged_weights_follow():
    objective = Unigan(config())
    before = copy.deepcopy(objective.ema_generator)
    objective.step(make_batch(), 0.5)
    objective.update_ema(8, 8)
    moved = weights_of(objective.ema_generator) - weights_of(before)
    whole = weights_of(objective.generator) - weights_of(before)
    share = 1 - 40 / 328  # the average is short at the start
    torch.testing.assert_close(moved, whole * share, atol=1e-6, rtol=1e-4)


def test_a_fixed_negative_is_another_artists():
    labels = torch.tensor([0, 0, 1, 2, 2, 0])
    assert _next_of_another(labels).tolist() == [2, 2, 3, 5, 5, 2]
