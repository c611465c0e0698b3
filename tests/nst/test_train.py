import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nst import class_draws
from nst.checkpoint import load_generator, model_digest, read_config, save_checkpoint
from nst.config import override
from nst.networks.blocks import num_parameters
from nst.networks.build import build_generator
from nst.objectives.build import build_objective
from nst.presets import PRESETS, preset
from nst.standalone import find_checkpoint, main
from nst.train import Previews, prepare, state_to_dict, train
from tests.corpora import make_corpus


class Recorder:
    """Hooks that keep everything; `stop_at` images it asks the loop to stop."""

    def __init__(self, folder=None, stop_at=None):
        self.folder, self.stop_at, self.metrics, self.checkpoints = folder, stop_at, [], []

    def should_stop(self, state):
        return self.stop_at is not None and state.num_images_seen >= self.stop_at

    def should_checkpoint(self):
        return False

    def on_metrics(self, state, metrics):
        self.metrics.append((state.num_images_seen, metrics))

    def on_preview(self, state, objective):
        pass

    def on_checkpoint(self, state, objective):
        self.checkpoints.append(state.num_images_seen)
        if self.folder is not None:
            path = self.folder / str(state.num_images_seen)
            path.mkdir()
            save_checkpoint(path, objective, state_to_dict(state))


def run(config, corpora, hooks=None, checkpoint_dir=None, **kwargs):
    session = prepare(config, *corpora, checkpoint_dir=checkpoint_dir, **kwargs)
    train(session, hooks or Recorder())
    return session


def weights(session):
    return {
        f"{name}.{key}": value.clone()
        for name, network in session.objective.networks().items()
        for key, value in network.state_dict().items()
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_seed_decides_everything(corpora, tiny):
    first, second = run(tiny, corpora), run(tiny, corpora)
    assert_same(weights(first), weights(second))
    other = run(override(tiny, {"seed": "1"}), corpora)
    assert any(not torch.equal(value, weights(other)[name]) for name, value in weights(first).items())


def test_resuming_gives_the_weights_of_an_uninterrupted_run(corpora, tiny, tmp_path):
    whole = run(tiny, corpora)
    cut = Recorder(tmp_path, stop_at=24)
    run(tiny, corpora, cut)
    assert cut.checkpoints == [24]
    resumed = run(tiny, corpora, checkpoint_dir=str(tmp_path / "24"))
    assert (resumed.state.step, resumed.state.num_images_seen) == (8, 64)
    assert resumed.objective.memory() == whole.objective.memory()
    assert_same(weights(whole), weights(resumed))
    for name, optimizer in whole.objective.optimizers().items():
        other = resumed.objective.optimizers()[name].state_dict()["state"]
        for index, slots in optimizer.state_dict()["state"].items():
            assert all(
                torch.equal(torch.as_tensor(slots[key]), torch.as_tensor(other[index][key])) for key in slots
            )


def test_resuming_remembers_which_artists_were_hard(corpora, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(class_draws, "WINDOW", 2)  # the drawing follows the losses within this short training
    changes = {"batch.adaptive": "1", "batch.num_classes": "2", "batch.size": "48", "batch.sizes": "[32, 48]"}
    config = override(tiny, changes)
    whole = run(config, corpora)
    cut = Recorder(tmp_path, stop_at=24)
    run(config, corpora, cut)
    resumed = run(config, corpora, checkpoint_dir=str(tmp_path / str(cut.checkpoints[0])))
    assert resumed.sampler.memory() == whole.sampler.memory() != {}
    assert_same(weights(whole), weights(resumed))


@pytest.mark.slow
def test_loader_workers_change_nothing(corpora, tiny):
    assert_same(weights(run(tiny, corpora)), weights(run(tiny, corpora, num_loader_workers=2)))


def test_hooks_are_called_when_thresholds_are_crossed(corpora, tiny):
    hooks = Recorder()
    run(tiny, corpora, hooks)
    assert [seen for seen, _ in hooks.metrics] == [16, 32, 48, 64]
    assert hooks.checkpoints == [24, 48, 64]
    assert all(value == value for _, metrics in hooks.metrics for value in metrics.values())  # no NaN


@pytest.mark.slow
def test_it_learns(corpora, tiny):
    hooks = Recorder()
    # a fresh generator keeps most of the light already: what it is to learn must count
    weights = {"loss.luminance": "8", "loss.final_luminance": "1"}
    run(override(tiny, {"num_images": "1200", "optim.warmup_images": "50", **weights}), corpora, hooks)

    def mean(name, records):
        return sum(metrics[name] for _, metrics in records) / len(records)

    first, last = hooks.metrics[:5], hooks.metrics[-5:]
    assert mean("generator/luminance", last) < 0.5 * mean("generator/luminance", first)  # keeps the content
    assert mean("generator/reconstruction", last) < 0.6 * mean("generator/reconstruction", first)
    assert mean("generator/matrix", last) < 0.5 * mean("generator/matrix", first)  # in the artist's manner
    assert mean("encoder/metric", last) < 0.7 * mean("encoder/metric", first)  # tells the artists apart


def test_the_checkpoint_is_the_model(corpora, tiny, tmp_path):
    hooks = Recorder(tmp_path)
    session = run(tiny, corpora, hooks)
    folder = tmp_path / "64"
    assert read_config(folder) == tiny
    generator = load_generator(str(folder))
    previews = Previews.choose(tiny, *corpora)
    code = generator.encode_style(previews.style)
    drawn = torch.stack([generator(previews.content, code[index]) for index in range(len(code))], dim=1)
    torch.testing.assert_close(drawn, session.objective.preview(previews.content, previews.style))
    assert model_digest(folder) == model_digest(folder)
    assert model_digest(folder) != model_digest(tmp_path / "48")


def test_a_training_that_has_diverged_is_told_apart(corpora, tiny):
    objective = prepare(tiny, *corpora).objective
    previews = Previews.choose(tiny, *corpora)
    assert previews.measure(objective)["preview/distance"] > 0
    with torch.no_grad():
        next(objective.networks()["ema"].parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"has diverged.*lower rates"):
        previews.measure(objective)


def test_damaged_checkpoints_are_named(corpora, tiny, tmp_path):
    run(tiny, corpora, Recorder(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere is not a checkpoint"):
        load_generator(str(tmp_path / "nowhere"))
    weights_path = tmp_path / "64" / "model.safetensors"
    weights_path.write_bytes(weights_path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_generator(str(tmp_path / "64"))
    with pytest.raises(ValueError, match="another configuration"):
        prepare(override(tiny, {"model.num_blocks": "2"}), *corpora, checkpoint_dir=str(tmp_path / "48"))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_draws_any_size(name):
    generator = build_generator(preset(name).model).eval()
    with torch.no_grad():
        code = generator.encode_style(torch.rand(2, 3, 50, 70) * 2 - 1)
        stylized = generator(torch.rand(2, 3, 37, 61) * 2 - 1, code)
    assert stylized.shape == (2, 3, 37, 61)
    assert stylized.abs().max() <= 1


def test_the_presets_keep_their_parameter_budgets():
    for name, millions in (("main", 6.4), ("small", 3.4), ("micro", 1.9)):
        objective = build_objective(preset(name))
        parts = [network for part, network in objective.networks().items() if part != "ema"]
        num = num_parameters(torch.nn.ModuleList(parts))
        assert num / 1e6 == pytest.approx(millions, rel=0.03), name
        assert num / 1e6 <= millions


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_torchrun_and_one_process_train_the_same_model(corpora, tmp_path):
    content, style = corpora
    common = ["--content", content.uri, "--style", style.uri, "--preset", "smoke", "--images", "32"]
    for change in ("batch.size=32", "model.content_widths=[8,8,8,8]", "log_every=8"):
        common += ["--set", change]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "nst.train", *common, "--out", str(tmp_path / "one")]
    subprocess.run(alone, check=True, env=environment, timeout=120)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [*launcher, "-m", "nst.train", *common, "--out", str(tmp_path / "two")]
    subprocess.run(both, check=True, env=environment, timeout=120)
    one, two = (load_file(tmp_path / name / "checkpoint" / "training.safetensors") for name in ("one", "two"))
    start = build_objective(read_config(tmp_path / "one" / "checkpoint")).networks()
    for part in ("encoders", "drawing"):
        moved = apart = 0.0
        for name, before in start[part].named_parameters():
            key = f"network.{part}.{name}"
            moved += float((one[key] - before.detach()).square().sum())
            apart += float((one[key] - two[key]).square().sum())
        # had the ranks not shared their gradients, the two would be as far apart as they have moved
        assert apart**0.5 < 0.05 * moved**0.5, (part, apart**0.5, moved**0.5)


def test_standalone_refuses_what_does_not_belong_to_the_training(corpora, tmp_path, capsys):
    content, style = corpora
    common = ["--preset", "smoke", "--images", "8", "--set", "batch.size=32", "--out", str(tmp_path)]
    assert main(["--content", content.uri, "--style", style.uri, *common]) == 0
    assert main(["--content", style.uri, "--style", content.uri, *common]) == 2
    assert "is a style corpus; --content needs one made for content" in capsys.readouterr().err
    assert main(["--content", content.uri, "--style", style.uri, *common, "--set", "seed=3"]) == 2
    assert "give this one another --out" in capsys.readouterr().err
    other = make_corpus(tmp_path / "other", "style", per_label=4)
    assert main(["--content", content.uri, "--style", other, *common]) == 2
    assert "a training on other corpora" in capsys.readouterr().err


def test_standalone_begins_with_another_trainings_weights(corpora, tmp_path, capsys):
    content, style = corpora
    common = ["--content", content.uri, "--style", style.uri, "--preset", "smoke", "--images", "8"]
    common += ["--set", "batch.size=32"]
    assert main([*common, "--out", str(tmp_path / "first")]) == 0
    first = str(tmp_path / "first" / "checkpoint")
    still = ["--set", "optim.generator_lr=1e-12", "--set", "optim.encoder_lr=1e-12", "--set", "seed=7"]
    assert main([*common, *still, "--start-from", first, "--out", str(tmp_path / "second")]) == 0
    one, two = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("first", "second"))
    for name, weights in one.items():
        if "standardise" not in name:  # what the batches say
            torch.testing.assert_close(two[name], weights, atol=1e-6, rtol=0, msg=name)
    other = ["--set", "model.style_width=4", "--start-from", first, "--out", str(tmp_path / "third")]
    assert main([*common, *other]) == 2
    assert "holds another model" in capsys.readouterr().err


def test_standalone_trains_in_pieces_of_minutes(corpora, tmp_path):
    """Each ends with a checkpoint; together they are one training."""
    content, style = corpora
    common = ["--content", content.uri, "--style", style.uri, "--preset", "smoke", "--images", "16"]
    common += ["--set", "batch.size=32"]
    assert main([*common, "--out", str(tmp_path / "whole")]) == 0
    pieces = [*common, "--out", str(tmp_path / "pieces"), "--minutes", "1e-9"]
    assert main(pieces) == 0
    assert find_checkpoint(tmp_path / "pieces") is None, "there was no time for a step"
    moments = iter([0.0, 0.0, 100.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nst.standalone.time.monotonic", lambda: next(moments, 100.0))
        assert main([*common, "--out", str(tmp_path / "pieces"), "--minutes", "1"]) == 0
    stopped = json.loads((tmp_path / "pieces/checkpoint/state.json").read_text())
    assert 0 < stopped["num_images_seen"] < 16
    assert main([*common, "--out", str(tmp_path / "pieces"), "--minutes", "60"]) == 0
    one, two = (load_file(tmp_path / name / "checkpoint/model.safetensors") for name in ("whole", "pieces"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_standalone_ends_a_training_that_has_diverged(corpora, tmp_path, capsys):
    content, style = corpora
    wild = ["--set", "optim.generator_lr=1e30", "--set", "optim.warmup_images=1", "--set", "log_every=8"]
    small = ["--preset", "smoke", "--images", "80", "--set", "batch.size=32", "--out", str(tmp_path)]
    assert main(["--content", content.uri, "--style", style.uri, *small, *wild]) == 2
    assert "the training has diverged" in capsys.readouterr().err
    assert find_checkpoint(tmp_path) is None  # one of such weights would hide an earlier, good one


@pytest.mark.slow
def test_nst_trains_without_ray_mlflow_and_boto3(corpora, tmp_path):
    content, style = corpora
    program = f"""
import sys
for name in ("ray", "mlflow", "boto3", "botocore", "click", "infra", "pipelines"):
    sys.modules[name] = None
from nst.standalone import main
sys.exit(main(["--content", {content.uri!r}, "--style", {style.uri!r}, "--preset", "smoke", "--images", "16",
               "--set", "batch.size=32", "--out", {str(tmp_path)!r}]))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert find_checkpoint(tmp_path) is not None
