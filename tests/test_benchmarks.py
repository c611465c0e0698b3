"""The benchmarks measure what they say: peers as published, shares and ratios right, goals judged."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from PIL import Image

from benchmarks import inference_speed, peers, sharding_speed, timing, training_speed
from benchmarks.timing import Contender, Seconds
from nst.networks.blocks import num_parameters
from nst.presets import preset
from tests.corpora import photographs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "published"),
    [
        (lambda: peers.UNet256(), 54_414_531),
        (lambda: peers.PatchGan(6, batch_norm=True), 2_768_705),
        (lambda: peers.ResNet9(), 11_378_179),
        (lambda: peers.PatchGan(3, batch_norm=False), 2_764_737),
        (lambda: peers.MicroAst(), 471_987),
        (lambda: peers.AdaIn(), 7_010_959),
    ],
    ids=["unet", "patchgan pairs", "resnet", "patchgan", "microast", "adain"],
)
def test_peers_have_as_many_parameters_as_published(network, published):
    assert num_parameters(network()) == published


def test_the_discriminator_sees_70_pixels():
    judge = peers.PatchGan(3, batch_norm=False).eval()
    picture = torch.zeros(1, 3, 142, 142, requires_grad=True)
    logits = judge[0](picture)
    for layer in list(judge)[1:]:
        if isinstance(layer, torch.nn.Conv2d):  # instance norm would let every logit see the whole picture
            logits = layer(logits)
    logits[0, 0, 8, 8].backward()
    assert picture.grad is not None
    rows = picture.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == 70


@pytest.mark.parametrize("name", ["microast", "adain"])
def test_stylizing_peers_keep_the_size_and_take_the_style(name):
    torch.manual_seed(0)
    network = inference_speed.build(name)
    content = torch.rand(1, 3, 64, 96) * 2 - 1
    first, second = (network(content, network.encode_style(torch.rand(1, 3, 64, 64))) for _ in range(2))
    assert first.shape == content.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("kind", "size"), [(peers.Pix2PixStep, 256), (peers.CycleGanStep, 32)])
def test_a_peers_step_moves_every_weight(kind, size):
    torch.manual_seed(0)
    step = kind(CPU)
    networks = torch.nn.ModuleList([step.generator, step.discriminator])
    before = {name: weight.detach().clone() for name, weight in networks.named_parameters()}
    step(torch.rand(1, 3, size, size), torch.rand(1, 3, size, size))
    still = [name for name, weight in networks.named_parameters() if torch.equal(weight, before[name])]
    # a bias right before a norm has no effect, and so no gradient but rounding's
    assert [name for name in still if not name.endswith("bias")] == []
    assert all(weight.requires_grad for weight in networks.parameters())


def test_every_contender_has_its_turn_and_every_second_round_runs_backwards():
    calls: list[str] = []
    contenders = [Contender(name, {"part": lambda name=name: calls.append(name)}) for name in "ab"]
    turns = timing.run_rounds(contenders, 2, CPU, min_seconds=0, num_warmups=1)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert [len(its) for its in turns] == [2, 2]


def test_a_short_call_is_repeated_and_a_long_one_is_not():
    calls: list[int] = []
    timing.time_calls(lambda: calls.append(0), CPU, min_seconds=0.01)
    assert len(calls) > 2
    calls.clear()
    timing.time_calls(lambda: (calls.append(0), timing.time.sleep(0.02)), CPU, min_seconds=0.01)
    assert len(calls) == 1


def test_ratios_are_taken_round_by_round():
    mine = [Seconds(1, 2), Seconds(2, 2), Seconds(4, 2)]
    theirs = [Seconds(3, 2), Seconds(6, 4), Seconds(12, 8)]
    assert timing.speedup(mine, theirs) == timing.Spread(3, 3, 3)
    assert timing.speedup(mine, theirs, clock="cpu") == timing.Spread(2, 1, 4)
    per_second, per_core_second = timing.rates(mine, num_images=4)
    assert (per_second.median, per_core_second.median) == (2, 2)


def test_the_penalty_has_its_share_of_a_step():
    runner = training_speed.preset_runner(
        "smoke", preset("smoke"), size=32, num_images=4, precision="fp32", device=CPU
    )
    every = preset("smoke").loss.r1_every
    assert runner.shares["step with penalty"] == 1 / every
    assert sum(runner.shares.values()) == pytest.approx(1)
    turn = {"step": Seconds(1, 1), "step with penalty": Seconds(1 + every, 1)}
    assert runner.step_seconds([turn])[0].wall == pytest.approx(2)
    runner.contender.parts["step with penalty"]()


@pytest.mark.parametrize(("seconds", "word"), [(1.0, "**met**"), (3.0, "**NOT met**")])
def test_the_training_page_judges_the_goals(seconds, word):
    def runner(name: str) -> training_speed.Runner:
        contender = Contender(name, {"step": lambda: None}, {"precision": "bf16"}, num_images=4)
        return training_speed.Runner(contender, {"step": 1.0}, "contiguous")

    runners = [runner(name) for name in ("pix2pix", "cyclegan", "micro")]
    turns = [[{"step": Seconds(wall, wall)}] * 2 for wall in (4.0, 16.0, seconds)]
    rows = training_speed.compared(runners, turns)
    page = training_speed.page(
        timing.machine(CPU), {"size": 256, "batch": 4, "rounds": 2}, rows, {"rgan": "no reason"}
    )
    assert word in page
    assert "rgan: no reason" in page


def test_the_stylizing_page_has_every_contender(tmp_path, capsys):
    names, size = ("microast", "smoke"), 64
    contenders = [inference_speed.peak_contender("fp32", CPU)]
    gmacs = {}
    for name in names:
        network = inference_speed.build(name)
        gmacs[name, size] = inference_speed.count_gmacs(network, size)
        at = {"size": size, "precision": "fp32", "layout": "contiguous", "mode": "eager", "device": CPU}
        contenders.append(inference_speed.contender(name, network, **at))
    turns = timing.run_rounds(contenders, 1, CPU, min_seconds=0, num_warmups=0)
    results = inference_speed.Results(contenders, turns, gmacs)
    rows = results.rows()
    assert [row["name"] for row in rows] == list(names)
    assert rows[0]["times MicroAST fp32, style each time"].median == 1
    assert all(0 < row["share of the peak"] < 2 for row in rows)
    page = inference_speed.page(timing.machine(CPU), 1, results, rows, {})
    timing.write_results(tmp_path / "new", "figures", {"rows": timing.as_json(rows)}, page)
    assert page == (tmp_path / "new" / "figures.md").read_text()
    assert len(json.loads((tmp_path / "new" / "figures.json").read_text())["rows"]) == 2
    assert "| smoke | fp32 |" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sharding_jobs(tmp_path_factory) -> list[sharding_speed.Job]:
    """Four small pictures, to be copied and to be re-encoded."""
    folder = tmp_path_factory.mktemp("sharding")
    sources = [folder / f"{number}.png" for number in range(2)]
    for source, pixels in zip(sources, photographs(), strict=True):
        Image.fromarray(pixels).save(source)
    pictures = sharding_speed.PictureSet("small", "512 px", 4, (512, 512), (2, 1))
    pictures.make(sources, folder / "small")
    return [
        sharding_speed.Job(task, pictures, folder / "small", folder / "urls.txt", num_cpus=2)
        for task in sharding_speed.TASKS
    ]


@pytest.mark.parametrize("name", ["bare tarfile loop", "nst write_shard"])
def test_a_sharding_turn_is_counted_with_all_its_images(name, sharding_jobs):
    turns = [sharding_speed.take_turn(name, job, sys.executable) for job in sharding_jobs]
    assert all(turn.wall > 0 and turn.cpu >= sharding_speed.TICK for turn in turns)
    assert all(turn.start_cpu > 0 and turn.memory > 1e6 for turn in turns)


def test_a_contender_that_fails_or_loses_images_is_said(sharding_jobs):
    with pytest.raises(RuntimeError, match=r"failed: .*KeyError"):
        sharding_speed.take_turn("nobody", sharding_jobs[0], sys.executable)
    too_many = dataclasses.replace(sharding_jobs[0].pictures, num=5)
    job = dataclasses.replace(sharding_jobs[0], pictures=too_many)
    with pytest.raises(RuntimeError, match="stored 4 of 5"):
        sharding_speed.take_turn("bare tarfile loop", job, sys.executable)


@pytest.mark.parametrize(("cpu", "word"), [(1.1, "**met**"), (2.0, "**NOT met**")])
def test_the_sharding_page_judges_the_goals(cpu, word, sharding_jobs):
    def turns(seconds: float) -> list[sharding_speed.Turn]:
        one = {"start_wall": 1.0, "start_cpu": 1.0, "memory": 1 << 20}
        return [sharding_speed.Turn(wall=seconds, cpu=seconds, **one)] * 2

    seconds = {"bare tarfile loop": 1.0, "nst write_shard": cpu, "nst shard": cpu, "img2dataset": 1.5}
    by_name = {name: turns(wall) for name, wall in seconds.items()}
    every = {sharding_speed.title_of(job): by_name for job in sharding_jobs}
    facts = timing.machine(CPU) | {"versions": {"ray": "2"}}
    page = sharding_speed.page(facts, sharding_jobs, every, {"Ray Data write_webdataset": "not wanted"})
    goals = page[page.index("## Goals") :]
    assert goals.count(word) == goals.count("met**") == 4
    assert "Left out: Ray Data write_webdataset: not wanted" in goals
