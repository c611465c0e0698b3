"""The models in the box: what a person gets right after the installation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from nst.builtin import DEFAULT, WEIGHTS_DIR, builtin_checkpoint, builtin_names
from nst.checkpoint import MODEL_FILE, read_config
from nst.golden import check_golden
from nst.metrics import border_error, checkerboard, edge_ssim, histogram_distance
from nst.stylize import Stylizer

MAX_MEGABYTES = 16  # of all of them together


@pytest.fixture(scope="module")
def stylizer() -> Stylizer:
    return Stylizer.load(builtin_checkpoint(), device="cpu")


@pytest.fixture(scope="module")
def pictures(stylizer):
    """A photograph, two paintings' stand-ins and what becomes of it in both: [1, 3, H, W] in [0, 1]."""
    photo = Image.fromarray(data.astronaut())
    styles = [Image.fromarray(data.retina()).resize((400, 400)), Image.fromarray(data.immunohistochemistry())]
    drawn = [stylizer(photo, style) for style in styles]

    def planes(picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255

    return tuple([planes(one) for one in several] for several in ([photo], styles, drawn))


def test_they_are_small_and_each_has_a_card():
    assert DEFAULT in builtin_names()
    size = sum(path.stat().st_size for path in WEIGHTS_DIR.rglob("*") if path.is_file())
    assert size < MAX_MEGABYTES * 1e6
    for name in builtin_names():
        card = (WEIGHTS_DIR / name / "CARD.md").read_text()
        for part in ("Data", "Recipe", "Quality", "Failures", "Rights"):
            assert f"## {part}" in card, (name, part)
    with pytest.raises(ValueError, match=r"no built-in model 'mikro'; there are: .*micro"):
        builtin_checkpoint("mikro")


@pytest.mark.parametrize("name", builtin_names())
def test_they_draw_what_they_drew_when_they_were_new(name):
    folder = builtin_checkpoint(name)
    check_golden(Stylizer.load(folder, device="cpu"), f"{folder}/golden")


def test_altered_weights_draw_something_else(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = builtin_checkpoint()
    shutil.copytree(folder, tmp_path / "altered")
    weights = load_file(tmp_path / "altered" / MODEL_FILE)
    weights["decoder.to_rgb.weight"] *= 0.5
    weights["decoder.up.0.weight"] *= -1
    save_file(weights, tmp_path / "altered" / MODEL_FILE)
    with pytest.raises(OSError, match="does not draw on this machine"):
        check_golden(Stylizer.load(str(tmp_path / "altered"), device="cpu"), f"{folder}/golden")


def test_a_photograph_becomes_a_picture_in_the_style(pictures):
    (photo,), styles, drawn = pictures
    for style, stylized in zip(styles, drawn, strict=True):
        assert stylized.shape == photo.shape
        assert edge_ssim(stylized, photo) > 0.3, "what is in it stays"
        before, after = histogram_distance(photo, style), histogram_distance(stylized, style)
        assert after < 0.8 * before, "it takes on the colours"
        assert checkerboard(stylized) < 0.25
        assert border_error(stylized, photo) < 2
    assert (drawn[0] - drawn[1]).abs().mean() > 0.1, "two styles give two pictures"


def test_its_configuration_names_no_folder_of_the_machine_that_trained_it():
    for name in builtin_names():
        text = json.dumps(json.loads((WEIGHTS_DIR / name / "config.json").read_text()))
        assert "/" not in text.replace("decode/", "")
        assert read_config(WEIGHTS_DIR / name).model.kind == "unigan"
