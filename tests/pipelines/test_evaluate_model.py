"""`nst evaluate`: fixed pairs, figures beside baselines, a page that stands alone, and the registry."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from webdataset.compat import WebDataset

from infra import evaluations, registry, storage, tracking_server
from infra.registry import RegisteredVersion
from infra.tracking import TrackedRun
from nst.corpus import Corpus
from nst.images import encode_jpeg
from nst.metrics import LOWER_IS_BETTER
from nst.stylize import Stylizer
from pipelines import artist_judge, evaluate_model, registration
from pipelines.artist_judge import judge_identity, train_judge
from pipelines.evaluate_model import evaluate
from pipelines.evaluation import EvaluatedModel, Evaluation
from pipelines.evaluation_record import write_files
from pipelines.evaluation_set import (
    EvaluationSet,
    Reference,
    choose_pairs,
    make_evaluation_set,
    open_pictures,
)
from pipelines.evaluation_verdict import lineage, verdicts
from pipelines.gate import CHAMPION, load_gate
from pipelines.measure_models import baseline_method, model_method, sensitivities
from pipelines.measures import Summary
from pipelines.published_set import find_or_make_set, publish_set, read_set
from pipelines.registration import register_checkpoint
from pipelines.seen_pictures import seen_pictures, unknown
from tests.checkpoints import tiny_checkpoint
from tests.corpora import make_corpus, pieces
from tests.evaluations import GOOD, evaluation_of, measures_of
from tests.servers import S3Server, mlflow_server

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


class Page(HTMLParser):
    """What a page is made of: its text, and whatever would fetch something."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text, self.sources, self.tags = "", [], Counter()
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def without_values(measures: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: found[key] for key in ("mean", "low", "high")} for name, found in measures.items()}


def test_the_figures_stand_beside_their_baselines(
    model: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    content, style = folders
    result = run(model, "--content", content, "--style", style, "--report", tmp_path / "report", *SMALL)
    printed = found(result)
    evaluation = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    baselines = evaluation["baselines"]
    assert printed["measures"] == without_values(evaluation["measures"])
    assert printed["baselines"] == {name: without_values(values) for name, values in baselines.items()}
    assert printed["evaluation_set"] == evaluation["evaluation_set"]
    assert printed["model_digest"] == evaluation["model_digest"]
    for measures in (evaluation["measures"], *baselines.values()):
        assert set(measures) == set(LOWER_IS_BETTER)
        assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in measures.values())
        assert len(measures["style_distance"]["values"]) == 4
    assert {len(numbers) for numbers in evaluation["pairs"].values()} == {4}
    assert baselines["content"]["content_distance"]["mean"] == pytest.approx(0, abs=1e-5)
    assert baselines["content"]["style_sensitivity"]["mean"] == pytest.approx(0, abs=1e-6)
    assert baselines["style"]["style_distance"]["mean"] == pytest.approx(0, abs=1e-3)
    assert baselines["style"]["content_distance"]["mean"] > 0.5
    assert evaluation["evaluation_set"]["num_pairs"] == 4
    assert "content_distance" in result.stdout
    assert "lower is better" in result.stdout
    assert "only 3 contents" in result.stdout
    with Image.open(tmp_path / "report" / "grid.jpg") as grid:
        assert grid.width > 4 * 200

    again = found(run(model, "--content", content, "--style", style, "--report", tmp_path / "again", *SMALL))
    assert again["measures"] == printed["measures"]
    other = found(
        run(
            model, "--content", content, "--style", style, "--report", tmp_path / "other", *SMALL, "--seed", 1
        )
    )
    assert other["evaluation_set"] != evaluation["evaluation_set"]


def test_several_models_stand_side_by_side(model: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    second = tiny_checkpoint(tmp_path / "second" / "checkpoint", seed=1)
    corpora = ("--content", folders[0], "--style", folders[1], *SMALL)
    alone = found(run(second, *corpora, "--report", tmp_path / "alone"))
    printed = found(run(model, second, *corpora, "--report", tmp_path / "both"))
    assert printed["model"] == model
    assert [one["model"] for one in printed["models"]] == [model, second]
    assert printed["models"][0]["measures"] == printed["measures"]
    assert printed["models"][1]["measures"] == alone["measures"] != printed["measures"]
    kept = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert [one["model_digest"] for one in kept["models"]] == [
        one["model_digest"] for one in printed["models"]
    ]

    markup = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    page = Page(markup)
    assert not page.tags["script"] + page.tags["link"] + page.tags["iframe"]
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http://" not in markup + page.text
    assert "https://" not in markup
    assert "url(" not in markup
    assert "@import" not in markup
    assert str(tmp_path) not in markup  # a report travels
    for one in printed["models"]:
        assert one["model_digest"][:16] in page.text
        assert f"{one['measures']['style_distance']['mean']:.3f}" in page.text
    assert "second/checkpoint" in page.text
    assert "model B − model A" in page.text
    assert "NOthe evaluation has 4 pairs and gate.toml asks for 8" in page.text
    assert "NOwhether it was trained on these pictures cannot be told: it is not registered" in page.text
    assert page.tags["img"] == 1 + (6 + 4) * (2 + 2 + 1)  # a plot; pairs that stand out, and all four

    refused = run(model, second, model, *corpora, "--report", tmp_path / "refused")
    assert refused.exit_code == 2
    assert "are the same model" in refused.stderr


def test_a_published_set_stands_for_its_sources(
    model: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    place = tmp_path / "set"
    corpora = ("--content", folders[0], "--style", folders[1])
    straight = found(run(model, *corpora, *SMALL, "--report", tmp_path / "straight"))
    made = found(run(model, *corpora, *SMALL, "--evaluation-set", place, "--report", tmp_path / "made"))
    used = found(run(model, "--evaluation-set", place, "--report", tmp_path / "used"))
    for one in (made, used):
        assert one["evaluation_set"] == straight["evaluation_set"]
        assert one["measures"] == straight["measures"]
    again = found(run(model, *corpora, "--evaluation-set", place, *SMALL, "--report", tmp_path / "again"))
    assert again["evaluation_set"] == straight["evaluation_set"]

    (tar,) = place.glob("*.tar")
    samples = list(WebDataset(str(tar), shardshuffle=False))
    assert [set(sample) - {"__key__", "__url__", "__local_path__"} for sample in samples] == [
        {"content.png", "style.png", "json"}
    ] * 4
    assert json.loads(samples[0]["json"])["content"]["name"].endswith(".png")

    for options, words in (
        (("--seed", 5), "another --seed: 0, not 5"),
        (("--pairs", 3), "another --pairs: 4, not 3"),
        (("--content", folders[1]), "another --content"),
    ):
        refused = run(model, "--evaluation-set", place, *options, "--report", tmp_path / "refused")
        assert refused.exit_code == 2
        assert words in refused.stderr
    tar.write_bytes(tar.read_bytes()[:-2000])
    damaged = run(model, "--evaluation-set", place, "--report", tmp_path / "refused")
    assert damaged.exit_code == 1
    assert "cut or altered" in damaged.stderr
    empty = run(model, "--evaluation-set", tmp_path / "none", "--report", tmp_path / "refused")
    assert empty.exit_code == 2
    assert "to make it, give --content" in empty.stderr
    assert not (tmp_path / "refused").exists()


def test_a_set_has_the_same_bytes_in_a_folder_and_in_a_bucket(
    s3: S3Server, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    sources = [open_pictures(str(folder)) for folder in folders]
    chosen = make_evaluation_set(*sources, num_pairs=4, size=64, seed=0)
    uri = f"{s3.create_bucket()}/sets/one"
    for place in (str(tmp_path / "set"), uri):
        publish_set(chosen, place)
    found = [list(storage.list_objects(place)) for place in (str(tmp_path / "set"), uri)]
    assert [one.key for one in found[0]] == [one.key for one in found[1]]
    for local, remote in zip(*found, strict=True):
        assert storage.read_bytes(local.uri) == storage.read_bytes(remote.uri)
    back = read_set(uri)
    assert back is not None
    assert back.identity() == chosen.identity()
    assert back.pairs() == chosen.pairs()
    assert back.content_references == chosen.content_references
    assert back.style_references == chosen.style_references
    assert torch.equal(back.style, chosen.style)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Works of four artists, and some of them again as style pictures in folders, compressed once more."""
    folder = tmp_path_factory.mktemp("labelled")
    corpus = make_corpus(folder / "corpus", "style", per_label=6)
    for artist, numbers in (("china", (1, 2)), ("flower", (3, 4))):
        (folder / "style" / f"{artist}-bright").mkdir(parents=True)
        for number in numbers:
            path = folder / "style" / f"{artist}-bright" / f"{number}.jpg"
            path.write_bytes(encode_jpeg(pieces()[artist][number], quality=70))
    (folder / "style" / "somebody.jpg").write_bytes(encode_jpeg(pieces()["china"][8]))
    return corpus, folder / "style"


def test_artists_are_judged_on_other_works(
    model: str,
    folders: tuple[Path, Path],
    labelled: tuple[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus, style = labelled
    judged = functools.partial(train_judge, num_steps=4)
    monkeypatch.setattr(evaluate_model, "train_judge", judged)  # else a minute
    options = ("--content", folders[0], "--style", style, "--pairs", 15, "--size", 64)
    result = run(model, *options, "--artists", corpus, "--report", tmp_path / "report")
    printed = found(result)
    kept = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    for measures in (kept["measures"], *kept["baselines"].values()):
        assert len(measures["artist_top1"]["values"]) == 12  # somebody is no artist of the corpus
        assert set(measures["artist_top1"]["values"]) <= {0.0, 1.0}
        assert {len(labels) for labels in measures["artist_top1"]["pairs"].values()} == {12}
    assert printed["evaluation_set"]["artists_digest"] == Corpus.open(corpus).manifest.digest
    before = judge_identity(corpus)
    monkeypatch.setattr(artist_judge, "NUM_STEPS", 10)
    assert judge_identity(corpus)["artists_training"] != before["artists_training"]
    assert "of 16 works (8 left out)" in result.stdout  # the four, and their dark twins
    assert "artist_top1" in (tmp_path / "report" / "report.html").read_text()


def test_artists_that_nobody_knows_are_refused(
    model: str, folders: tuple[Path, Path], labelled: tuple[str, Path], tmp_path: Path
) -> None:
    options = ("--content", folders[0], "--style", folders[1], *SMALL)
    result = run(model, *options, "--artists", labelled[0], "--report", tmp_path / "report")
    assert result.exit_code == 2, result.output
    assert "'unlabelled', and it has two works or more by 'china-bright'" in result.stderr
    assert not (tmp_path / "report").exists()


def test_the_report_says_what_the_gate_would_say(
    trained: Callable[[Mapping[str, str]], RegisteredVersion], tmp_path: Path
) -> None:
    """Beside the champion if it was measured too, and where a version comes from."""
    version = trained({"style": make_corpus(tmp_path / "style", "style", per_label=2)})
    kept, pixels = evaluation_of(GOOD), torch.zeros(24, 3, 8, 8)
    names = [[str(number) for number in kept["pairs"][side]] for side in ("content", "style")]
    reference = Reference(label="", sha256="", near_hash=None, phash="0")
    chosen = EvaluationSet(
        content=pixels, style=pixels, content_names=names[0], style_names=names[1],
        content_references=[reference] * 24, style_references=[reference] * 24,
        content_digest="", style_digest="", num_contents=24, num_styles=8, seed=0, size=8,
    )  # fmt: skip
    worse = measures_of((0.300, 0.600, 0.125, 0.500, -0.050, 0.120, 0.034))

    def model(title: str, measures: Summary, **known: Any) -> EvaluatedModel:
        made: dict[str, Any] = {"approach": "", "num_parameters": 0, "pictures": pixels.byte()}
        return EvaluatedModel(title=title, name="", digest=title, measures=measures, **made, **known)

    evaluation = Evaluation(
        chosen=chosen,
        models=[
            model("A", kept["measures"], seen=unknown(""), lineage=lineage(version)),
            model("B", worse, seen=unknown("gone")),
            model("C", kept["measures"], seen=unknown(""), aliases=("champion",)),
        ],
        baselines=kept["baselines"],
        identity=kept["evaluation_set"],
        code_digest="",
    )
    first, second, champion = (Page(card).text for card in verdicts(evaluation).split("<section")[1:])
    rules = load_gate().rules
    alone = [rule for rule in rules if rule.than != CHAMPION]
    assert (
        f"A  passes all {len(rules) + 1} beside C, the champion" in first
    )  # one more: what it was trained on
    assert "okstyle_distance is 0.100, must be at most 0.115 (0.015 more than the champion)" in first
    assert f"Version{version}" in first
    assert "Trained on, stylestyle, digest " in first
    assert re.search(rf"B  refused by \d+ of {len(rules) + 1} ", second)
    assert "cannot be told: gone" in second
    assert "NOstyle_distance is 0.125, must be at most 0.115" in second
    assert f"C  passes all {len(alone) + 1} without a champion beside it" in champion


def test_every_measure_is_explained() -> None:
    features = {"style_r11", "style_r21", "style_r31", "style_r41", "gram", "content_r31", "content_r41"}
    assert set(evaluate_model.MEASURES) == {*LOWER_IS_BETTER, *features, "artist_top1"}


def test_a_corpus_can_be_measured_on(model: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = make_corpus(tmp_path / "content", "content", per_label=2)
    printed = found(
        run(model, "--content", content, "--style", folders[1], "--report", tmp_path / "r", *SMALL)
    )
    digest = json.loads((tmp_path / "content" / "corpus.json").read_text())["digest"]
    assert printed["evaluation_set"]["content_digest"] == digest


@pytest.fixture
def trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, str]], RegisteredVersion]:
    """Makes a version of a run that was trained on those corpora, by their roles."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")

    def version_of(corpora: Mapping[str, str]) -> RegisteredVersion:
        run_of = TrackedRun.start(name="trained")
        for role, uri in corpora.items():
            run_of.log_corpus(role, uri, Corpus.open(uri).manifest.digest, context=role)
        assert run_of.finish() == {}
        name = f"m{len(corpora)}"
        client = tracking_server.client()
        client.create_registered_model(name)
        client.create_model_version(name, "nowhere", run_of.run_id)
        return registry.get_version(name, 1)

    return version_of


def test_pictures_that_a_version_was_trained_on_are_told(
    folders: tuple[Path, Path],
    tmp_path: Path,
    trained: Callable[[Mapping[str, str]], RegisteredVersion],
) -> None:
    """A part of the sources, compressed anew and in a folder of its own, beside pictures that are new."""
    corpora = {role: make_corpus(tmp_path / role, role, per_label=4) for role in ("content", "style")}
    version = trained(corpora)
    known = tmp_path / "known"
    known.mkdir()
    for number in (1, 2, 9):  # the last is in no corpus
        (known / f"{number}.jpg").write_bytes(encode_jpeg(pieces()["flower"][number], quality=70))
    new, new_styles = (open_pictures(str(folder)) for folder in folders)
    held_out = make_evaluation_set(new, new_styles, num_pairs=6, size=64, seed=0)
    publish_set(held_out, str(tmp_path / "set"))
    published = read_set(str(tmp_path / "set"))
    assert published is not None
    for chosen in (held_out, published):
        assert seen_pictures(version, chosen) == unknown("")
    some = make_evaluation_set(open_pictures(str(known)), new_styles, num_pairs=6, size=64, seed=0)
    seen = seen_pictures(version, some)
    assert (seen["content"], seen["style"], seen["unknown"]) == (2, 0, "")
    told = sorted(seen["pictures"])
    assert told[0].startswith("the content 1.jpg is 'flower-bright/1.jpg' of ")
    assert len(told) == 2
    stored = tmp_path / "stored"
    stored.mkdir()
    for row in range(3):
        (stored / f"{row}.jpg").write_bytes(Corpus.open(corpora["style"]).read(row))
    styles = make_evaluation_set(new, open_pictures(str(stored)), num_pairs=6, size=64, seed=0)
    assert seen_pictures(version, styles)["style"] == 3

    assert (
        "names no corpus of content"
        in seen_pictures(trained({"style": corpora["style"]}), held_out)["unknown"]
    )
    shutil.rmtree(corpora["content"])
    assert (
        "content, which it was trained on, is not there as it was: gone"
        in (seen_pictures(version, held_out)["unknown"])
    )


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


def test_pictures_that_are_not_chosen_are_not_read(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the sources of a published set none at all."""
    for number in range(30):
        shutil.copy(folders[1] / "0.jpg", tmp_path / f"{number}.jpg")
    read_bytes, seen = storage.read_bytes, Counter[str]()

    def watched(uri: str, **options: Any) -> bytes:
        seen[uri] += uri.endswith((".jpg", ".png"))
        return read_bytes(uri, **options)

    monkeypatch.setattr(storage, "read_bytes", watched)
    wanted = (str(tmp_path / "set"), str(folders[0]), str(tmp_path), 4, 64, 0)
    made = find_or_make_set(*wanted)
    assert seen.total() == 3 + 4
    seen.clear()
    assert find_or_make_set(*wanted).identity() == made.identity()
    assert seen.total() == 0


def test_sensitivity_is_measured_for_each_content(model: str, folders: tuple[Path, Path]) -> None:
    content, style = (open_pictures(str(folder)) for folder in folders)
    chosen = make_evaluation_set(content, style, num_pairs=6, size=64, seed=0)
    parts, pairs = sensitivities(chosen, model_method(Stylizer.load(model)))
    assert len(parts) == 6
    assert pairs == {"content": [0, 0, 1, 1, 2, 2], "style": [0, 1] * 3}
    assert max(sensitivities(chosen, baseline_method("content"))[0]) == pytest.approx(0, abs=1e-6)
    assert min(sensitivities(chosen, baseline_method("style"))[0]) > 0.05


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


def unreachable(*_: object) -> None:
    raise MlflowException("connection refused")


@pytest.mark.slow
def test_figures_of_a_registered_version_are_kept_with_it(
    model: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    version = register_checkpoint(model)
    arguments = ("--content", folders[0], "--style", folders[1], "--report", tmp_path / "report", *SMALL)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "set_model_version_tag", unreachable)
        failed = run(version, *arguments)
        assert failed.exit_code == 1
        assert "the same command records them without measuring again" in failed.stderr
    assert evaluations.evaluation(registry.get_version("nst", version)) is None  # nothing half counts
    with monkeypatch.context() as idle:
        idle.setattr(evaluate_model, "measure", None)
        assert found(run(version, *arguments))["recorded"] == f"models:/nst/{version}"

    other = tiny_checkpoint(tmp_path / "other", seed=1)
    printed = found(run(f"models:/nst/{version}", other, *arguments))
    assert [one["recorded"] for one in printed["models"]] == [f"models:/nst/{version}", None]
    registered = registry.get_version("nst", version)
    kept = evaluations.evaluation(registered)
    written = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert kept == {key: value for key, value in written.items() if key not in ("models", "code_digest")}
    run_id, _, path = registered.tags["report"].removeprefix("runs:/").partition("/")
    client = tracking_server.client()
    folder = Path(client.download_artifacts(run_id, str(Path(path).parent), str(tmp_path)))
    assert {file.name for file in folder.iterdir()} == {"evaluation.json", "grid.jpg", "report.html"}
    assert (folder / "report.html").read_bytes() == (tmp_path / "report" / "report.html").read_bytes()


@pytest.mark.faults
def test_a_server_that_goes_away_costs_no_figures(
    model: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow is gone when all is measured: waited for, then told; the same command measures nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registration, "SECONDS_BETWEEN_TRIES", 0.5)
    arguments = ("--content", folders[0], "--style", folders[1], "--report", tmp_path / "report", *SMALL)
    with contextlib.ExitStack() as servers, monkeypatch.context() as away:
        first = servers.enter_context(mlflow_server(tmp_path / "mlflow"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", first.uri)
        version = register_checkpoint(model)

        def write_then_stop(files: dict[str, bytes], report_uri: str) -> None:
            write_files(files, report_uri)
            servers.close()

        away.setattr(evaluate_model, "write_files", write_then_stop)
        away.setattr(registration, "SECONDS_WITHOUT_MLFLOW", 1.0)
        gone = run(version, *arguments)
        assert gone.exit_code == 1
        assert f"the figures are in {tmp_path}/report/evaluation.json, and the same command" in gone.stderr
        assert "Traceback" not in gone.output
    port = int(first.uri.rpartition(":")[2])
    with mlflow_server(tmp_path / "mlflow", port=port):
        monkeypatch.setattr(evaluate_model, "measure", None)
        assert found(run(version, *arguments))["recorded"] == f"models:/nst/{version}"
        assert evaluations.evaluation(registry.get_version("nst", version)) is not None
