"""Golden pairs: the model they were drawn with passes wherever it is, another does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from nst.checkpoint import load_generator
from nst.golden import PAIRS, check_golden, golden_digest, write_golden
from nst.networks.build import build_generator
from nst.presets import resolve_config
from nst.stylize import Stylizer
from tests.checkpoints import tiny_checkpoint


@pytest.fixture
def stylizer(tmp_path: Path) -> Stylizer:
    return Stylizer.load(tiny_checkpoint(tmp_path / "checkpoint"), device="cpu")


@pytest.fixture
def golden_dir(tmp_path: Path, stylizer: Stylizer) -> Path:
    folder = tmp_path / "golden"
    folder.mkdir()
    write_golden(stylizer, folder)
    return folder


def with_noise(stylizer: Stylizer, noise: float) -> Stylizer:
    torch.manual_seed(0)
    generator = copy.deepcopy(stylizer.generator)
    with torch.no_grad():
        for weights in generator.parameters():
            weights.mul_(1 + noise * torch.randn_like(weights))
    return Stylizer(generator)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_the_same_weights_pass_whatever_surrounds_them(
    stylizer: Stylizer, golden_dir: Path, tmp_path: Path
) -> None:
    assert check_golden(stylizer, golden_dir) == 0
    again = Stylizer(load_generator(tmp_path / "checkpoint"), dtype=torch.bfloat16)
    assert check_golden(again, golden_dir) == 0, "compared in fp32"
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1 if num_threads > 1 else 2)
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            assert check_golden(stylizer, golden_dir) < 0.01
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("preset", ["micro", "smoke", "rgan"])
def test_a_little_noise_on_the_weights_does_not_pass(preset: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = resolve_config(preset, None, ()).model
    stylizer = Stylizer(build_generator(model).eval().requires_grad_(False))
    write_golden(stylizer, tmp_path)
    assert check_golden(with_noise(stylizer, 1e-4), tmp_path) < 0.1
    with pytest.raises(OSError, match=r"golden pair 'plain' differs by [\d.]+ levels .*tolerance is 0\.25"):
        check_golden(with_noise(stylizer, 0.01), tmp_path)


def test_another_model_does_not_pass(golden_dir: Path, tmp_path: Path) -> None:
    other = Stylizer.load(tiny_checkpoint(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(OSError, match="golden pair 'plain' differs by"):
        check_golden(other, golden_dir)


def test_pairs_are_the_same_wherever_they_are_made(
    stylizer: Stylizer, golden_dir: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_golden(stylizer, again)
    assert golden_digest(again) == golden_digest(golden_dir)
    sizes = [side for pair in PAIRS for side in (*pair.content_size, *pair.style_size)]
    assert all(side % stylizer.generator.stride for side in sizes), "sizes that fit no network"


def test_altered_golden_files_are_named(stylizer: Stylizer, golden_dir: Path) -> None:
    picture = golden_dir / "reduced-style.png"
    data = picture.read_bytes()
    picture.write_bytes((golden_dir / "plain-style.png").read_bytes())
    with pytest.raises(OSError, match=r"reduced-style\.png was altered"):
        check_golden(stylizer, golden_dir)
    picture.unlink()
    with pytest.raises(OSError, match=r"reduced-style\.png"):
        check_golden(stylizer, golden_dir)
    picture.write_bytes(data)
    check_golden(stylizer, golden_dir)

    facts = json.loads((golden_dir / "golden.json").read_text())
    before = golden_digest(golden_dir)
    (golden_dir / "golden.json").write_text(json.dumps({**facts, "tolerance": 99}))
    assert golden_digest(golden_dir) != before
    for text, reason in (("{", "is cut or altered"), ('{"format_version": 9}', "has format 9")):
        (golden_dir / "golden.json").write_text(text)
        with pytest.raises(OSError, match=reason):
            check_golden(stylizer, golden_dir)
