"""VGG-19 features with random weights: the layers are torchvision's, the losses are frozen and exact, and the
weights come from where they should. Real weights are measured with where NST_VGG19 names some."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import normalize

from nst import metrics
from nst.batch import Batch
from nst.config import override
from nst.objectives.unigan import Unigan
from nst.presets import preset
from nst.vgg import NEEDED, VGGFeatures, load_vgg, perceptual_loss


def torchvision_layers() -> nn.Sequential:
    """torchvision's own convolutions up to relu4_1, at random."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["E"])[:21]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)  # type: ignore[arg-type]
    return layers.requires_grad_(False)


@pytest.fixture(scope="module")
def reference() -> nn.Sequential:
    return torchvision_layers()


@pytest.fixture(scope="module")
def state(reference: nn.Sequential) -> dict[str, Tensor]:
    """As torchvision names it."""
    return {f"features.{name}": tensor for name, tensor in reference.state_dict().items()}


@pytest.fixture(scope="module")
def vgg(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> VGGFeatures:
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file(state, path)
    return load_vgg(str(path))


def to_conv3_1(vgg: VGGFeatures) -> dict[str, Tensor]:
    """Weights in the project's own names, as far as the normalised VGG-19 files go."""
    return {
        f"{name}.{kind}": vgg.get_buffer(f"{name}_{kind}").clone()
        for name in NEEDED
        for kind in ("weight", "bias")
    }


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """In [-1, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_layers_are_torchvisions(vgg: VGGFeatures, reference: nn.Sequential) -> None:
    """But for the borders, which are zeros there. Its layers 1, 6, 11, 20 are relu1_1, 2_1, 3_1, 4_1."""
    images = pictures(2, 3, 128, 96)
    hidden = normalize((images + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = {}
    for number, layer in enumerate(reference):
        hidden = layer(hidden)
        if number in (1, 6, 11, 20):
            expected[number] = hidden.clone()
    found = vgg(images)
    assert list(found) == ["r11", "r21", "r31", "r41"]
    for (name, features), other, border in zip(found.items(), expected.values(), (1, 3, 4, 5), strict=True):
        assert features.shape == other.shape, name
        inside = (..., slice(border, -border), slice(border, -border))
        torch.testing.assert_close(features[inside], other[inside], rtol=1e-4, atol=1e-4)


def test_shallow_weights_end_at_conv3_1(vgg: VGGFeatures) -> None:
    shallow, images = VGGFeatures(to_conv3_1(vgg)), pictures(1, 3, 33, 50)
    assert shallow.deepest == "r31"
    assert vgg.deepest == "r41"
    found, expected = shallow(images), vgg(images)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "r11": (1, 64, 33, 50),
        "r21": (1, 128, 17, 25),
        "r31": (1, 256, 9, 13),
    }
    assert all(torch.equal(part, expected[name]) for name, part in found.items())
    assert set(shallow.pair_measures(*(pictures(1, 3, 32, 32).abs(),) * 3)) == {
        *("content_r31", "style_r11", "style_r21", "style_r31", "gram")
    }
    weights = to_conv3_1(vgg)
    assert VGGFeatures(weights).digest == shallow.digest != vgg.digest
    weights["conv2_1.bias"][0] += 1e-3
    assert VGGFeatures(weights).digest != shallow.digest


def test_nothing_of_it_is_trained_or_kept(vgg: VGGFeatures) -> None:
    assert not list(vgg.parameters())
    assert not vgg.state_dict()
    stylized = pictures(1, 3, 32, 32).requires_grad_()
    content, style = pictures(1, 3, 32, 32, seed=1).requires_grad_(), pictures(1, 3, 48, 40, seed=2)
    sum(perceptual_loss(vgg, stylized, content, style)).backward()  # type: ignore[union-attr]
    assert stylized.grad is not None
    assert stylized.grad.abs().sum() > 0
    assert content.grad is None
    assert not any(buffer.requires_grad or buffer.grad is not None for buffer in vgg.buffers())


def test_loss_is_zero_where_nothing_differs(vgg: VGGFeatures) -> None:
    one, other = pictures(2, 3, 32, 32), pictures(2, 3, 32, 32, seed=1) * 0.2
    content_term, style_term = perceptual_loss(vgg, one, one, one)
    assert content_term.item() == style_term.item() == 0
    assert perceptual_loss(vgg, one, one, other)[0] == 0 < perceptual_loss(vgg, one, one, other)[1]
    # the manner of a picture has no place, its content has
    turned = one.flip(3)
    content_term, style_term = perceptual_loss(vgg, turned, one, turned)
    assert style_term == 0 < content_term


def test_loss_by_its_definition(vgg: VGGFeatures) -> None:
    stylized, content, style = (pictures(2, 3, 32, 32, seed=seed) * (1 + seed) / 3 for seed in range(3))
    content_term, style_term = perceptual_loss(vgg, stylized, content, style)
    made, wanted, aimed = vgg(stylized), vgg(content), vgg(style)
    mse = nn.MSELoss()
    torch.testing.assert_close(content_term, mse(made["r41"], wanted["r41"]))
    expected = torch.zeros(())
    for tap in ("r11", "r21", "r31", "r41"):
        for statistic in (
            lambda features: features.mean(dim=(2, 3)),
            lambda features: (features.var(dim=(2, 3), correction=0) + 1e-5).sqrt(),
        ):
            expected = expected + mse(statistic(made[tap]), statistic(aimed[tap]))
    torch.testing.assert_close(style_term, expected)


def test_a_training_weighs_the_style_against_the_content(vgg: VGGFeatures, monkeypatch) -> None:
    monkeypatch.setattr("nst.objectives.unigan.load_vgg", lambda: vgg)
    batch = Batch(
        content=pictures(4, 3, 32, 32),
        style=pictures(4, 3, 32, 32, seed=1) / 2,
        labels=torch.tensor([0, 0, 1, 1]),
        works_per_class=2,
        step=0,
    )
    changes = {"batch.size": "32", "precision": "fp32"}
    found = []
    for weight in ("0", "1", "10"):
        objective = Unigan(override(preset("perceptual"), changes | {"loss.perceptual_style": weight}))
        found.append(objective.step(batch, 0.5)["generator/perceptual"])
    content, both, tenfold = found
    assert 0 < content < both
    torch.testing.assert_close(tenfold - content, 10 * (both - content))


def test_gradients_by_finite_differences(vgg: VGGFeatures) -> None:
    double = VGGFeatures(to_conv3_1(vgg)).double()
    stylized, content, style = (pictures(1, 3, 16, 16, seed=seed).double() for seed in range(3))
    for term in (0, 1):
        assert torch.autograd.gradcheck(
            lambda made, term=term: perceptual_loss(double, made, content, style)[term],
            stylized.clone().requires_grad_(),
            fast_mode=True,
        )


def test_a_flat_picture_has_a_finite_gradient(vgg: VGGFeatures) -> None:
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    perceptual_loss(vgg, flat, pictures(1, 3, 32, 32), pictures(1, 3, 32, 32, seed=1))[1].backward()
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())


def test_autocast_costs_little_and_the_terms_stay_in_fp32(vgg: VGGFeatures) -> None:
    pictures_seen = [pictures(1, 3, 64, 64, seed=seed).requires_grad_() for seed in range(3)]
    expected = perceptual_loss(vgg, *pictures_seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = perceptual_loss(vgg, *pictures_seen)
    assert all(term.dtype == torch.float32 for term in found)
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_it_moves_with_its_module(vgg: VGGFeatures) -> None:
    holder = nn.Module()
    holder.vgg = VGGFeatures(to_conv3_1(vgg))
    holder.to("meta")
    assert all(buffer.device.type == "meta" for buffer in holder.vgg.buffers())  # type: ignore[union-attr]


# --- where the weights come from ------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torchvision's, no variable set, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("NST_VGG19", raising=False)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    return cache


def test_without_network_the_error_says_what_to_do(torch_home: Path) -> None:
    with pytest.raises(ValueError, match=r"set NST_VGG19 to a safetensors file, or let torchvision download"):
        load_vgg()
    assert not list(torch_home.iterdir())


def test_torchvisions_cache_is_read(torch_home: Path, state: dict[str, Tensor], vgg: VGGFeatures) -> None:
    torch.save({**state, "classifier.0.bias": torch.zeros(4)}, torch_home / "vgg19-dcbb9e9d.pth")
    images = pictures(1, 3, 32, 32)
    torch.testing.assert_close(load_vgg()(images), vgg(images))


def test_the_variable_comes_before_torchvision_and_a_path_before_both(
    torch_home: Path, vgg: VGGFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = to_conv3_1(vgg)
    save_file(weights, tmp_path / "one.safetensors")
    weights["conv1_1.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    monkeypatch.setenv("NST_VGG19", str(tmp_path / "one.safetensors"))
    images = pictures(1, 3, 32, 32)
    torch.testing.assert_close(load_vgg()(images)["r11"], vgg(images)["r11"])
    other = load_vgg(str(tmp_path / "other.safetensors"))
    assert bool((other(images)["r11"] > vgg(images)["r11"]).any())


class Surprise:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_cache_with_more_than_tensors_is_not_unpickled(torch_home: Path, tmp_path: Path) -> None:
    torch.save({"features.0.weight": Surprise(tmp_path / "touched")}, torch_home / "vgg19-dcbb9e9d.pth")
    with pytest.raises(ValueError, match=r"neither in .*checkpoints nor to be downloaded"):
        load_vgg()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04"])
def test_a_cut_cache_is_no_crash(torch_home: Path, content: bytes) -> None:
    (torch_home / "vgg19-dcbb9e9d.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"neither in .*checkpoints nor to be downloaded"):
        load_vgg()


def test_weights_that_are_none(tmp_path: Path, vgg: VGGFeatures) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "cut.safetensors")
    weights = to_conv3_1(vgg) | {"conv1_1.weight": torch.zeros(64, 3, 5, 5)}
    save_file(weights, tmp_path / "shape.safetensors")
    for name, words in (
        ("missing", "no such file"),
        ("broken", "not a safetensors file"),
        ("cut", r"no conv1_1\.bias; the layers needed are preprocess, conv1_1"),
        ("shape", r"conv1_1\.weight is \[64, 3, 5, 5\], not \[64, 3, 3, 3\]"),
    ):
        path = str(tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words) as caught:
            load_vgg(path)
        assert path in str(caught.value)


# --- measures -------------------------------------------------------------------------------------------


def test_measures_by_their_definition(vgg: VGGFeatures) -> None:
    made, wanted, aimed = (pictures(2, 3, 32, 32, seed=seed).abs() for seed in range(3))
    found = vgg.pair_measures(made, wanted, aimed)
    mine, contents, styles = (vgg(2 * part - 1) for part in (made, wanted, aimed))
    for row in range(2):
        expected = (mine["r41"][row] - contents["r41"][row]).square().mean().item()
        assert found["content_r41"][row] == pytest.approx(expected, rel=1e-4)
        relative = []
        for tap in ("r11", "r21", "r31"):
            grams = [
                torch.einsum("chw,dhw->cd", side[tap][row], side[tap][row]) / side[tap][row][0].numel()
                for side in (mine, styles)
            ]
            relative.append(((grams[0] - grams[1]).norm() / grams[1].norm()).item() ** 2)
        assert found["gram"][row] == pytest.approx(sum(relative) / 3, rel=1e-3)


def test_measures_take_their_pictures_in_parts(vgg: VGGFeatures) -> None:
    made, wanted, aimed = (pictures(9, 3, 32, 32, seed=seed).abs() for seed in range(3))
    found = vgg.pair_measures(made, wanted, aimed)
    assert all(len(values) == 9 for values in found.values())
    last = vgg.pair_measures(made[8:], wanted[8:], aimed[8:])
    assert {name: values[8] for name, values in found.items()} == pytest.approx(
        {name: values[0] for name, values in last.items()}, rel=1e-4
    )
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        vgg.pair_measures(2 * made - 1, wanted, aimed)


@pytest.mark.skipif("NST_VGG19" not in os.environ, reason="NST_VGG19 names no file")
def test_real_weights_agree_with_the_baselines() -> None:
    from skimage import data

    def picture(rgb) -> Tensor:
        return torch.from_numpy(rgb[:256, :256].copy()).permute(2, 0, 1)[None].float() / 255

    contents = torch.cat([picture(data.astronaut()), picture(data.chelsea())])
    styles = torch.cat([picture(data.retina()), picture(data.coffee())])
    vgg, copies = load_vgg(), metrics.baselines(contents, styles)
    unchanged, copied, moved = (vgg.pair_measures(made, contents, styles) for made in copies.values())
    assert max(unchanged["content_r31"]) == 0
    assert max(copied["gram"] + copied["style_r11"] + copied["style_r31"]) < 1e-4
    assert min(copied["content_r31"]) > 1
    assert sum(moved["style_r11"]) < sum(unchanged["style_r11"])
