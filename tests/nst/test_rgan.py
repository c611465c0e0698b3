"""Approach 1: its networks have the paper's sizes, each step trains its own side, parts and ranks give the
same gradients, and the generator learns."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.flop_counter import FlopCounterMode

from nst.approaches import RganModel
from nst.batch import Batch
from nst.checkpoint import load_checkpoint, load_generator, save_checkpoint
from nst.config import TrainConfig, override
from nst.networks.blocks import num_parameters, record_statistics, replay_statistics
from nst.networks.patch_discriminator import PatchDiscriminator
from nst.networks.style_discriminator import WaveletTrunk, build_style_discriminator
from nst.networks.style_generator import pad_to_multiple
from nst.networks.unet_generator import build_unet
from nst.objectives.build import build_objective
from nst.objectives.rgan import Rgan, retouch
from nst.presets import preset

DEEP = "[8, 8, 12, 12, 12, 16]"  # stride 64
TINY = {
    "model.widths": "[8, 8, 12]",
    "model.style_width": "4",
    "model.style_side": "32",
    "model.patch_widths": "[8, 8, 8, 8]",
    "model.embedding_dim": "8",
    "batch.num_classes": "4",
    "batch.size": "32",
    "precision": "fp32",
    "optim.gradient_clip": "1e9",
    "optim.encoder_images": "0",
}
FUSIONS = ["adain", "concat6", "wavelet_skips"]


def config(name: str = "rgan", **changes) -> TrainConfig:
    named = {key.replace("__", "."): str(value) for key, value in changes.items()}
    return override(preset(name), {**TINY, **named})


def model(name: str) -> RganModel:
    chosen = preset(name).model
    assert isinstance(chosen, RganModel)
    return chosen


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


def pictures(num: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(num, 3, height, width) * 2 - 1


def weights_of(network) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in network.parameters()])


# --- networks -----------------------------------------------------------------------------------------


def test_the_paper_preset_has_the_originals_sizes():
    paper = model("paper_rgan")
    assert num_parameters(build_unet(paper)) == pytest.approx(34.5e6, rel=0.02)
    content = PatchDiscriminator(paper.patch_widths, paper.patch_field)
    assert num_parameters(content) == pytest.approx(2.77e6, rel=0.02)
    assert num_parameters(build_style_discriminator(paper)) == pytest.approx(4.42e6, rel=0.05)
    assert build_unet(paper).down[-1](torch.zeros(1, 512, 2, 2)).shape == (1, 64, 1, 1)  # at 128 px


def test_the_modern_preset_has_the_methods_sizes():
    generator = build_unet(model("rgan")).eval()
    assert num_parameters(generator) == pytest.approx(8.7e6, rel=0.05)
    with torch.no_grad():
        code = generator.encode_style(pictures(1, 64, 64))
        with FlopCounterMode(display=False) as counter:
            generator(pictures(1, 256, 256), code)
    assert counter.get_total_flops() / 2 < 4.4e9  # multiply-adds


def test_the_style_features_of_the_variant_have_the_originals_sizes():
    with torch.no_grad():
        features = WaveletTrunk(64)(torch.zeros(1, 3, 128, 128))
    assert [(feature.shape[1], feature.shape[2]) for feature in features] == [
        (64, 64), (128, 32), (256, 16), (256, 8), (128, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("field", "logits"), [(70, 22), (94, 6)])
def test_a_logit_of_the_content_discriminator_sees_its_field(field, logits):
    network = PatchDiscriminator((4, 4, 4, 4), field)
    pairs = torch.rand(1, 6, 192, 192, requires_grad=True)
    found = network(pairs)
    assert found.shape == (1, 1, logits, logits)
    found[0, 0, logits // 2, logits // 2].backward()
    assert pairs.grad is not None
    seen = pairs.grad.abs().sum(dim=(0, 1)) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (field, field)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("palette", ["style", "content", "network"])
def test_every_fusion_draws_any_size_in_any_style(fusion, palette):
    torch.manual_seed(0)
    generator = build_unet(model_of(fusion, palette)).eval().requires_grad_(False)
    codes = generator.encode_style(pictures(2, 50, 70))
    for size in ((16, 16), (37, 61), (128, 128), (200, 130)):
        content = pictures(1, *size).expand(2, -1, -1, -1)
        stylized = generator(content, codes)
        assert stylized.shape == (2, 3, *size)
        assert stylized.dtype == torch.float32
        assert stylized.abs().max() <= 1
        assert (stylized[0] - stylized[1]).abs().mean() > 1e-4  # the style makes a difference
        torch.testing.assert_close(generator(content[:1], codes[1]), stylized[1:], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="too small"):
        generator(pictures(1, 10, 40), codes[0])


def model_of(fusion: str, palette: str = "style") -> RganModel:
    chosen = config(model__fusion=fusion, model__palette=palette, model__widths=DEEP).model
    assert isinstance(chosen, RganModel)
    return chosen


@pytest.mark.parametrize("fusion", FUSIONS)
def test_codes_of_styles_mix(fusion):
    generator = build_unet(model_of(fusion)).eval().requires_grad_(False)
    content, codes = pictures(1, 64, 64), generator.encode_style(pictures(3, 64, 64))
    alone = generator(content, codes[1])
    torch.testing.assert_close(generator(content, codes.mix([0, 2, 0])), alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generator(content, codes.mix([1, 1, 0])), alone, atol=1e-3)


@pytest.mark.parametrize(("palette", "source"), [("style", 1), ("content", 0)])
def test_the_palette_is_the_one_that_is_asked_for(palette, source):
    generator = build_unet(model_of("adain", palette)).eval().requires_grad_(False)
    grey = torch.tensor([[0.5, -0.2, -0.6], [-0.4, 0.1, 0.5]]).reshape(2, 1, 3, 1, 1)
    both = 0.2 * pictures(2, 64, 64)[:, None] + grey  # content, style
    stylized = generator(both[0], generator.encode_style(both[1]))
    torch.testing.assert_close(stylized.mean(dim=(2, 3)), both[source].mean(dim=(2, 3)), atol=0.02, rtol=0)


@pytest.mark.parametrize("palette", ["style", "content"])
def test_tiles_take_colours_and_statistics_of_the_whole_picture(palette):
    shallow = replace(model_of("adain", palette), widths=(8, 8, 8))  # so that a tile sees enough around it
    generator = build_unet(shallow).eval().requires_grad_(False)
    picture = pictures(1, 128, 256)
    picture[:, :, :, 128:] *= 0.1
    code, tile = generator.encode_style(pictures(1, 64, 64)), picture[:, :, :, 128:]
    with record_statistics(generator) as statistics:
        whole = generator(picture, code)[:, :, :, 128:]
    with replay_statistics(generator, statistics):
        replayed = generator(tile, code)
    inside = (..., slice(64, None))
    error = (generator(tile, code)[inside] - whole[inside]).abs().mean()
    assert (replayed[inside] - whole[inside]).abs().mean() < 0.3 * error


def test_mirroring_goes_on_as_long_as_it_must():
    picture = torch.arange(48.0).reshape(1, 3, 1, 16).expand(-1, -1, 16, -1)
    padded, size = pad_to_multiple(picture, 64)
    assert (padded.shape[2:], size) == ((64, 64), (16, 16))
    expected = [*range(16), *range(14, 0, -1)] * 3
    assert padded[0, 0, 0].tolist() == expected[:64]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.fusion": "wavelet_skips", "model.widths": "[8, 8, 8]"}, "must be 6 or more numbers"),
        ({"model.patch_field": "80"}, "70 or 94"),
        ({"model.style_side": "8"}, "style_side must be 32 or more"),
        ({"loss.gan": "wasserstein"}, "'hinge' or 'bce'"),
        ({"loss.r1": "-1"}, "loss.r1 must be 0 or more"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        override(preset("rgan"), changes)


def test_a_bottleneck_of_one_pixel_upsets_nothing():
    """The norms behind it would blow up what little differs in a map that is constant."""
    torch.manual_seed(0)
    generator = build_unet(model_of("adain")).eval()
    content, style = pictures(1, 64, 64), pictures(1, 64, 64)

    def gradient(content):
        loss = generator(content, generator.encode_style(style)).square().mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(generator.parameters()))])

    exact, rounded = gradient(content), gradient(content * (1 + 1e-6))
    assert (exact - rounded).abs().max() < 1e-2 * exact.abs().max()


# --- steps --------------------------------------------------------------------------------------------


def test_each_step_trains_its_own_side():
    objective = Rgan(config(loss__r1_every=1))
    sides = {name: network for name, network in objective.networks().items() if name != "ema"}
    batch, rows = make_batch(), torch.arange(8)
    torch.manual_seed(0)
    drawn = objective._draw(batch, rows)
    steps = {
        "content_discriminator": lambda: objective.content_step(batch, drawn[0].detach()),
        "style_discriminator": lambda: objective.style_step(batch, drawn[0].detach()),
        "generator": lambda: objective.generator_step(batch, drawn),
    }
    for trained, step in steps.items():
        before = {name: weights_of(network) for name, network in sides.items()}
        step()
        moved = [name for name in sides if not torch.equal(before[name], weights_of(sides[name]))]
        assert moved == [trained]
        parameters = [parameter for network in sides.values() for parameter in network.parameters()]
        assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)


def test_discriminators_train_again_after_a_generator_step_that_failed(monkeypatch):
    objective = Rgan(config())

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(objective, "apply_gradients", fail)
    monkeypatch.setattr(objective, "_pairs", fail)
    with pytest.raises(RuntimeError):
        objective.generator_step(make_batch(), None)
    for network in (objective.content_discriminator, objective.style_discriminator):
        assert all(parameter.requires_grad for parameter in network.parameters())


def gradients_of(settings: TrainConfig, batch: Batch) -> dict[str, torch.Tensor]:
    """What one step of each side would apply, without applying it."""
    objective = Rgan(settings)
    names = {id(network): name for name, network in objective.networks().items()}
    found = {}

    def keep(optimizer, network):
        side = names[id(network)]
        found.update({f"{side}.{name}": p.grad.clone() for name, p in network.named_parameters()})
        optimizer.zero_grad()
        return torch.tensor(0.0)

    objective.apply_gradients = keep  # type: ignore[method-assign]
    torch.manual_seed(3)
    objective.step(batch, 0.5)
    assert len({name.split(".")[0] for name in found}) == 3
    return found


def assert_alike(first, second, tolerance=1e-5):
    """To 1e-5 of the largest gradient of its side: sums in another order round differently."""
    assert first.keys() == second.keys()
    largest = {}
    for name, gradient in first.items():
        side = name.split(".")[0]
        largest[side] = max(largest.get(side, 0.0), float(gradient.abs().max()))
    assert min(largest.values()) > 1e-3
    for name, gradient in first.items():
        atol = tolerance * largest[name.split(".")[0]]
        torch.testing.assert_close(second[name], gradient, atol=atol, rtol=0, msg=name)


VARIANTS = [
    {},
    {"model__fusion": "concat6", "loss__gan": "bce", "loss__mae": 1.0, "loss__reconstruction": 0.0},
    {
        "model__fusion": "wavelet_skips",
        "model__widths": DEEP,
        "model__palette": "network",
        "loss__augment": "false",
    },
    {"model__style_discriminator": "grid", "model__palette": "content"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parts_give_the_gradients_of_the_whole_batch(variant):
    whole = gradients_of(config(**variant), make_batch())
    for parts in (3, 4):
        assert_alike(whole, gradients_of(config(batch__accumulate=parts, **variant), make_batch()))


def test_parts_train_to_the_same_weights():
    trained, start = [], weights_of(Rgan(config()).generator)
    for parts in (1, 4):
        objective = Rgan(config(batch__accumulate=parts, optim__betas="[0.5, 0.99]"))
        for step in range(2):
            torch.manual_seed(step)
            objective.step(make_batch(step=step), 0.5)
        trained.append(weights_of(objective.generator))
    # Adam's first steps have the sign of the gradient: where that is nearly zero, rounding decides
    assert (trained[0] - trained[1]).abs().mean() < 0.05 * (trained[0] - start).abs().mean()


def _one_rank(rank, world_size, port, changes, labels, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        batch = make_batch(16, labels=labels)
        mine = slice(rank * 8, (rank + 1) * 8)
        part = replace(
            batch, content=batch.content[mine], style=batch.style[mine], labels=batch.labels[mine]
        ).to("cpu")
        torch.save(gradients_of(config(**changes), part), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


# artists without a second work, more of them on one rank than on the other
RAGGED = [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 9]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, None),
        ({"batch__accumulate": 2, "model__fusion": "wavelet_skips", "model__widths": DEEP}, RAGGED),
    ],
    ids=["plain", "in parts, ragged"],
)
def test_two_ranks_give_the_gradients_of_one(changes, labels, tmp_path, free_port):
    whole = gradients_of(config(**changes), make_batch(16, labels=labels))
    mp.start_processes(  # type: ignore[attr-defined]
        _one_rank, (2, free_port, changes, labels, tmp_path), nprocs=2, start_method="spawn"
    )
    for rank in range(2):
        assert_alike(whole, torch.load(tmp_path / f"{rank}.pt", weights_only=True))


def test_the_margin_loss_by_hand():
    objective = Rgan(config())
    art = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.8, 0.6]])  # artists 0, 0, 1, 1
    fake = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8], [0.8, 0.6]])
    batch = replace(make_batch(4), labels=torch.tensor([0, 0, 1, 1]))
    together = (2 + 2 + 0 + 0) / 4
    # squared distances of (1, 0) and of (0, 1) to (0.8, 0.6): 0.4 and 0.8
    apart = ((1 - 0.4) + (1 - 0.8) + 2 * (0.6 + 0.2) / 2) / 4
    fakes = (1 + 0 + (1 - 0.08) + 1) / 4
    found = objective._margin_loss(batch, art, fake)
    torch.testing.assert_close(found, torch.tensor((together + apart + fakes) / 3))
    torch.testing.assert_close(objective.artist_losses, torch.tensor([2.6, 2.2, 0.4, 0.4]))
    torch.testing.assert_close(objective._margin_loss(batch, art), torch.tensor((together + apart) / 2))


def test_one_artist_alone_is_no_reason_for_nan():
    objective = Rgan(config())
    metrics = objective.step(make_batch(labels=[3] * 8), 0.5)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_real_has_the_look_that_a_fake_may_have():
    content = pictures(8, 32, 32)
    draws = torch.rand(8, 4)
    retouched = retouch(content, draws)
    assert retouched.abs().max() <= 1
    assert (retouched - content).abs().mean() > 0.02
    objective, batch = Rgan(config(model__palette="style")), make_batch()
    objective_mean = objective._real(batch).mean(dim=(2, 3))
    torch.testing.assert_close(objective_mean, batch.style.mean(dim=(2, 3)), atol=0.05, rtol=0)


def test_a_closed_gate_stops_the_content_discriminator_alone():
    objective = Rgan(config(loss__r1_every=1))
    objective.gate.recall({"steps_above": 1000})
    before = {name: weights_of(network) for name, network in objective.networks().items()}
    metrics = objective.step(make_batch(), 0.5)
    moved = {
        name: not torch.equal(before[name], weights_of(net)) for name, net in objective.networks().items()
    }
    assert moved == {
        "generator": True, "content_discriminator": False, "style_discriminator": True, "ema": False,
    }  # fmt: skip
    assert metrics["content_discriminator/realness_accuracy"] < 0.9
    assert objective.gate.is_open  # the accuracy fell, so it opens again


def test_the_gradient_penalty_comes_every_so_many_steps():
    batches = [make_batch(step=step) for step in (0, 1)]
    for step, differs in ((0, True), (1, False)):
        with_r1 = gradients_of(config(loss__r1=10.0, loss__r1_every=16), batches[step])
        without = gradients_of(config(loss__r1=0.0), batches[step])
        name = "content_discriminator.layers.0.weight"
        assert torch.allclose(with_r1[name], without[name], rtol=1e-3) != differs


def test_the_style_discriminator_may_begin_alone():
    objective = Rgan(config(optim__encoder_images=100, num_images=200))
    before = {name: weights_of(network) for name, network in objective.networks().items()}
    metrics = objective.step(make_batch(), progress=0.4)
    moved = [
        name for name, net in objective.networks().items() if not torch.equal(before[name], weights_of(net))
    ]
    assert moved == ["style_discriminator"]
    assert not any(name.startswith("generator/") for name in metrics)
    assert "generator/style" in objective.step(make_batch(step=1), progress=0.6)


def test_the_paper_preset_uses_the_papers_terms_alone():
    settings = override(preset("paper_rgan"), {**TINY, "model.style_discriminator": "grid"})
    metrics = Rgan(settings).step(make_batch(), 0.5)
    terms = {name for name in metrics if name.startswith("generator/") and "norm" not in name}
    assert terms == {"generator/style", "generator/adversarial", "generator/mae"}


def test_losses_stay_fp32_under_bf16():
    objective = Rgan(config(precision="bf16"))
    metrics = objective.step(make_batch(), 0.5)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in metrics.values())
    assert all(parameter.dtype == torch.float32 for parameter in objective.generator.parameters())
    assert objective.artist_losses.shape == (8,)


def test_a_checkpoint_brings_back_every_network_and_the_model(tmp_path):
    settings = config()
    trained, fresh = build_objective(settings), build_objective(settings)
    torch.manual_seed(0)
    trained.step(make_batch(), 0.5)
    trained.update_ema(8, 8)
    save_checkpoint(tmp_path, trained, {"step": 1})
    assert load_checkpoint(tmp_path, fresh) == {"step": 1}
    for objective in (trained, fresh):
        torch.manual_seed(1)
        objective.step(make_batch(step=1), 0.6)
    for name, network in trained.networks().items():
        assert torch.equal(weights_of(network), weights_of(fresh.networks()[name])), name
    content, style = pictures(1, 40, 40), pictures(1, 64, 64)
    generator = load_generator(str(tmp_path))
    drawn = generator(content, generator.encode_style(style))
    torch.testing.assert_close(drawn, trained.preview(content, style)[:, 0])


def test_the_generator_learns(corpora):
    def crops(corpus):
        cut = [torch.as_tensor(corpus.decode(3 * row)[::3, ::3].copy()) for row in range(8)]
        return torch.stack(cut).permute(0, 3, 1, 2).float() / 127.5 - 1

    content, style = (crops(corpus) for corpus in corpora)
    labels = torch.as_tensor(corpora[1].labels[::3]).long()
    learning = {"optim__generator_lr": 2e-3, "optim__warmup_images": 1, "optim__gradient_clip": 1}
    objective = Rgan(config(**learning))
    history = []
    for step in range(40):
        torch.manual_seed(step)
        batch = Batch(content=content, style=style, labels=labels, works_per_class=2, step=step)
        history.append(objective.step(batch, step / 1000))
    for term in ("reconstruction", "luminance"):
        values = torch.stack([metrics[f"generator/{term}"] for metrics in history])
        assert values[-4:].mean() < 0.7 * values[:4].mean(), term
