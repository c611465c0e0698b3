"""`nst evaluate`: fixed pairs, figures beside baselines, a page that stands alone, and the registry."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from infra import evaluations, registry
from nst.metrics import LOWER_IS_BETTER
from nst.stylize import Stylizer
from pipelines.evaluate_model import evaluate, methods_of, sensitivities
from pipelines.evaluation_set import choose_pairs, make_evaluation_set, open_pictures
from pipelines.registration import register_checkpoint
from tests.checkpoints import tiny_checkpoint
from tests.corpora import make_corpus

SMALL = ("--pairs", 4, "--size", 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three photographs and two style pictures, in folders."""
    content, style = tmp_path_factory.mktemp("content"), tmp_path_factory.mktemp("style")
    for name, rgb in (
        ("a/astronaut", data.astronaut()),
        ("coffee", data.coffee()),
        ("chelsea", data.chelsea()),
    ):
        (content / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rgb).resize((120, 100)).save(content / f"{name}.png")
    for number, rgb in enumerate(load_sample_images().images):
        Image.fromarray(rgb).resize((150, 100)).save(style / f"{number}.jpg")
    return content, style


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [*map(str, arguments), "--json"])


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_the_figures_stand_beside_their_baselines(
    model: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    content, style = folders
    result = run(model, "--content", content, "--style", style, "--report", tmp_path / "report", *SMALL)
    printed = found(result)
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert {name: printed[name] for name in evaluation} == evaluation
    assert set(evaluation["measures"]) == set(LOWER_IS_BETTER)
    for measures in (evaluation["measures"], *evaluation["baselines"].values()):
        assert set(measures) == set(LOWER_IS_BETTER)
        assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in measures.values())
    baselines = evaluation["baselines"]
    assert baselines["content"]["content_distance"]["mean"] == pytest.approx(0, abs=1e-5)
    assert baselines["content"]["style_sensitivity"]["mean"] == pytest.approx(0, abs=1e-6)
    assert baselines["style"]["style_distance"]["mean"] == pytest.approx(0, abs=1e-3)
    assert baselines["style"]["content_distance"]["mean"] > 0.5
    assert evaluation["evaluation_set"]["num_pairs"] == 4
    assert "content_distance" in result.stdout
    assert "lower is better" in result.stdout
    with Image.open(tmp_path / "report" / "grid.jpg") as grid:
        assert grid.width > 4 * 200

    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "data:image/jpeg;base64," in page
    assert not re.search(r"(?:src|href)=.(?!data:)|url\((?!data:)|https?://", page)
    assert f"{evaluation['measures']['style_distance']['mean']:.3f}" in page

    again = found(run(model, "--content", content, "--style", style, "--report", tmp_path / "again", *SMALL))
    assert {name: again[name] for name in evaluation} == evaluation
    other = found(
        run(
            model, "--content", content, "--style", style, "--report", tmp_path / "other", *SMALL, "--seed", 1
        )
    )
    assert other["evaluation_set"] != evaluation["evaluation_set"]


def test_a_corpus_can_be_measured_on(model: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = make_corpus(tmp_path / "content", "content", per_label=2)
    printed = found(
        run(model, "--content", content, "--style", folders[1], "--report", tmp_path / "r", *SMALL)
    )
    digest = json.loads((tmp_path / "content" / "corpus.json").read_text())["digest"]
    assert printed["evaluation_set"]["content_digest"] == digest


def test_pairs_are_distinct_and_even() -> None:
    pairs = choose_pairs(10, 4, 20, seed=3)
    assert pairs == choose_pairs(10, 4, 20, seed=3)
    assert pairs != choose_pairs(10, 4, 20, seed=4)
    assert len(set(pairs)) == 20
    assert max(Counter(content for content, _ in pairs).values()) <= 3
    assert max(Counter(style for _, style in pairs).values()) <= 6
    assert sorted(choose_pairs(3, 2, 100, seed=0)) == [(c, s) for c in range(3) for s in range(2)]


def test_a_changed_picture_is_another_evaluation_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_pictures(str(tmp_path)).digest == open_pictures(str(folders[1])).digest
    Image.new("RGB", (64, 64)).save(tmp_path / "0.jpg")
    assert open_pictures(str(tmp_path)).digest != open_pictures(str(folders[1])).digest


def test_sensitivity_is_measured_for_each_content(model: str, folders: tuple[Path, Path]) -> None:
    content, style = (open_pictures(str(folder)) for folder in folders)
    chosen = make_evaluation_set(content, style, num_pairs=6, size=64, seed=0)
    methods = methods_of(Stylizer.load(model))
    assert len(sensitivities(chosen, methods["model"])) == 3
    assert max(sensitivities(chosen, methods["content"])) == pytest.approx(0, abs=1e-6)
    assert min(sensitivities(chosen, methods["style"])) > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{missing}", "--content", "{content}", "--style", "{style}"], "is no checkpoint"),
        (["{model}", "--content", "{missing}", "--style", "{style}"], "holds no pictures"),
        (["{model}", "--content", "{content}", "--style", "{broken}"], "cannot be used"),
        (["{model}", "--content", "{content}", "--style", "{style}", "--vgg", "{missing}"], "no such file"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(
    model: str, folders: tuple[Path, Path], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    places = {
        "model": model,
        "content": folders[0],
        "style": folders[1],
        "missing": tmp_path / "missing",
        "broken": tmp_path / "broken",
    }
    result = run(*(part.format(**places) for part in arguments), "--report", tmp_path / "report", *SMALL)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_figures_of_a_registered_version_are_kept_with_it(
    model: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = register_checkpoint(model)
    arguments = ("--content", folders[0], "--style", folders[1], "--report", tmp_path / "report", *SMALL)
    printed = found(run(f"models:/nst/{version}", *arguments))
    assert printed["recorded"] == f"models:/nst/{version}"
    kept = evaluations.evaluation(registry.get_version("nst", version))
    assert kept is not None
    assert kept["measures"] == printed["measures"]
    assert found(run(str(version), *arguments))["recorded"] == f"models:/nst/{version}"
