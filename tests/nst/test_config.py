import json

import pytest

from nst.approaches import UniganModel
from nst.config import BatchConfig, TrainConfig, from_dict, override, to_dict
from nst.presets import PRESETS, preset


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_survives_json(name):
    config = preset(name)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_override_reaches_every_kind_of_field():
    config = override(
        preset("smoke"),
        {"loss.bands": "3", "batch.size": "64", "precision": "bf16", "model.content_widths": "[8,8,8,8]"},
    )
    assert config.loss.bands == 3.0
    assert config.batch.size == 64
    assert config.precision == "bf16"
    assert config.model.content_widths == (8, 8, 8, 8)


NOBODY_ASKS = {
    f"loss.{name}": "0" for name in ("matrix", "reference", "content", "patch", "adversarial", "statistics")
}


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"loss.band": "3"}, "no field 'band'"),
        ({"losses.bands": "3"}, "no section 'losses'"),
        ({"batch.size": "big"}, "BatchConfig.size must be int"),
        ({"batch.size": "50"}, "multiple of 16"),
        ({"precision": "fp8"}, "'fp32' or 'bf16'"),
        ({"loss": "3"}, "no field 'loss'"),
        ({"num_images": "true"}, "must be int"),
        ({"model.direct_statistics": "true", "model.modulator": "false"}, "set model.modulator=true"),
        (NOBODY_ASKS, "false, and the generator trains them"),
        (NOBODY_ASKS | {"model.shared_encoders": "false", "optim.encoder_images": "9"}, "set it to 0"),
    ],
)
def test_a_wrong_setting_is_named(assignments, message):
    with pytest.raises(ValueError, match=message):
        override(preset("smoke"), assignments)


def test_configurations_validate_themselves():
    with pytest.raises(ValueError, match="works_per_class"):
        BatchConfig(works_per_class=1)
    with pytest.raises(ValueError, match="four numbers"):
        UniganModel(content_widths=(8, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no preset 'big'"):
        preset("big")
