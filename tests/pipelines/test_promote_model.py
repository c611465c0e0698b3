"""The verbs promote, rollback and history: what they let pass, refuse, say and leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infra import evaluations, promotions, registry, tracking_server
from infra.promotions import Grounds, move_champion
from infra.registry import RegisteredVersion
from pipelines.cli import main
from pipelines.gate import DEFAULT_GATE, load_gate
from pipelines.registration import register_checkpoint
from tests.checkpoints import tiny_checkpoint
from tests.evaluations import BAD_MODELS, GOOD, evaluation_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RegisteredVersion]]:
    """Three registered versions, in a store of their own."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(promotions, "SECONDS_TO_MOVE", 0.0)
        for seed in range(3):
            register_checkpoint(tiny_checkpoint(folder / str(seed), seed), model_name="shared")
        yield registry.list_versions("shared")[::-1]


@pytest.fixture
def model(store: list[RegisteredVersion], request: pytest.FixtureRequest) -> str:
    """A registered model of its own with those versions as 1, 2 and 3; 1 and 2 are evaluated and good."""
    name, client = request.node.name.replace("[", "-").replace("]", ""), tracking_server.client()
    client.create_registered_model(name)
    for shared in store:
        client.create_model_version(name, shared.source, shared.run_id, shared.tags, model_id=shared.model_id)
    registry.set_alias(name, registry.CHALLENGER, 3)
    for version in (1, 2):
        record(name, version, GOOD)
    return name


def record(model: str, version: int, means: tuple[float, ...], **evaluation_set: Any) -> None:
    digest = registry.get_version(model, version).digest
    evaluations.record_evaluation(model, version, evaluation_of(means, digest, **evaluation_set))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def answer(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def aliases(model: str) -> dict[str, int]:
    names = (registry.CHAMPION, registry.PREVIOUS, registry.CHALLENGER)
    found = {name: registry.with_alias(model, name) for name in names}
    return {name: version.version for name, version in found.items() if version is not None}


def test_promote_rollback_history(model: str) -> None:
    dry = run("promote", "1", "--model", model, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"models:/{model}/1 would become the champion, the first one; nothing was changed" in dry.stdout
    assert aliases(model) == {"challenger": 3}
    assert promotions.events(model) == []

    first = run("promote", "1", "--model", model, "--reason", "the first", "--json")
    assert first.exit_code == 0, first.output
    assert answer(first)["promoted"] is True
    assert (
        "ok  style_distance is 0.100, must be at most 0.146 (0.9 times the unchanged content)" in first.stdout
    )
    registry.set_alias(model, "challenger", 2)
    second = run("promote", "challenger", "--model", model)
    assert second.exit_code == 0, second.output
    assert aliases(model) == {"champion": 2, "previous": 1}

    again = run("promote", "2", "--model", model, "--json")
    assert (again.exit_code, answer(again)["promoted"]) == (0, False)
    back = run("rollback", "--model", model, "--reason", "faces smear")
    assert back.exit_code == 0, back.output
    assert back.stdout == (
        f"models:/{model}/1 is the champion again in place of 2\nno champion came before it\n"
    )
    assert aliases(model) == {"champion": 1}
    assert "there is nothing before version 1" in run("rollback", "--model", model).stderr
    assert run("promote", "2", "--model", model).exit_code == 0
    assert aliases(model) == {"champion": 2, "previous": 1}

    shown = run("history", "--model", model, "--json")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["#", "when", "(UTC)", "what", "version", "who", "figures", "reason"]
    assert "promote" in lines[1]
    assert "- -> 1" in lines[1]
    assert "style_distance 0.100" in lines[1]
    assert lines[1].endswith("the first")
    assert "rollback" in lines[3]
    assert lines[3].endswith("faces smear")
    events = answer(shown)["events"]
    assert [event["to_version"] for event in events] == [1, 2, 1, 2]
    assert events[0]["grounds"]["gate_digest"] == load_gate().digest


def test_a_refusal_names_the_measure_and_moves_nothing(model: str) -> None:
    assert run("promote", "1", "--model", model).exit_code == 0
    means, _ = BAD_MODELS["gives the content back"]
    record(model, 3, means)
    before = aliases(model)
    refused = run("promote", "3", "--model", model, "--json")
    assert refused.exit_code == 3
    assert "style_distance is 0.162, must be at most 0.146" in refused.stderr
    assert "0.016 too high" in refused.stderr
    assert answer(refused)["exit_code"] == 3
    assert run("promote", "3", "--model", model, "--dry-run").exit_code == 3
    assert aliases(model) == before
    assert len(promotions.events(model)) == 1

    assert "--force needs a --reason" in run("promote", "3", "--model", model, "--force").stderr
    forced = run("promote", "3", "--model", model, "--force", "--reason", "an emergency")
    assert forced.exit_code == 0, forced.output
    assert aliases(model)["champion"] == 3
    event = promotions.events(model)[-1]
    assert event.grounds.is_forced
    assert any(finding.startswith("NO style_distance") for finding in event.grounds.findings)
    assert "promote, forced" in run("history", "--model", model).stdout


def test_the_champion_counts_by_its_figures_on_the_candidates_set(model: str) -> None:
    """Whatever else it was evaluated on since."""
    assert run("promote", "1", "--model", model).exit_code == 0
    record(model, 1, BAD_MODELS["makes noise"][0], seed=1)
    promoted = run("promote", "2", "--model", model)
    assert promoted.exit_code == 0, promoted.output
    assert "style_distance is 0.100, must be at most 0.115 (0.015 more than the champion)" in promoted.stdout
    record(model, 1, GOOD, seed=2)
    refused = run("promote", "1", "--model", model)
    assert refused.exit_code == 2
    assert "evaluated on different sets (seed 2 and 0)" in refused.stderr


def test_figures_of_one_evaluation_stand_with_the_version(model: str) -> None:
    """None of an earlier one that measured more."""
    kept = evaluation_of(GOOD, registry.get_version(model, 1).digest)
    evaluations.record_evaluation(
        model, 1, kept | {"measures": {**kept["measures"], "gram": kept["measures"]["hist_style"]}}
    )
    assert registry.get_version(model, 1).tags["gram"] == "0.5000"
    evaluations.record_evaluation(model, 1, kept)
    tags = registry.get_version(model, 1).tags
    assert "gram" not in tags
    assert tags["hist_style"] == "0.5000"
    assert tags["digest"]


def test_mistakes_exit_with_2_and_the_remedy(model: str, tmp_path: Path) -> None:
    for arguments, expected in (
        (("promote", "3"), f"models:/{model}/3 was not evaluated; run: nst evaluate models:/{model}/3"),
        (("promote", "7"), "has no version 7; the newest are: 3, 2, 1"),
        (("promote", "champion"), "has no @champion; it has: @challenger (version 3)"),
        (("promote", "1", "--gate", str(tmp_path / "none.toml")), "there is no such gate file"),
        (("rollback",), "no previous champion to bring back"),
    ):
        result = run(*arguments, "--model", model)
        assert (result.exit_code, expected in result.stderr) == (2, True), result.output
        assert "Traceback" not in result.output
    assert run("history", "--model", "unknown").exit_code == 2
    assert "nothing was promoted yet" in run("history", "--model", model).stdout

    move_champion(model, 3, kind="promote", grounds=Grounds(is_forced=True, reason="by hand"))
    result = run("promote", "1", "--model", model)
    assert result.exit_code == 2
    assert f"models:/{model}/3 was not evaluated" in result.stderr, (
        "the champion's own figures are needed too"
    )


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (
            {"content": 0, "style": 2, "pictures": ["the style a.jpg is 'x.jpg' of s3://art"], "unknown": ""},
            "trained on: 0 contents and 2 styles; the style a.jpg is 'x.jpg' of s3://art; evaluate it on",
        ),
        (
            {"content": 0, "style": 0, "pictures": [], "unknown": "s3://art is gone"},
            "it cannot be told whether models:/{model}/3 was trained on the pictures that it was evaluated "
            "on: s3://art is gone; evaluate it where",
        ),
        (None, "does not say what it was trained on; evaluate it again"),
    ],
    ids=["seen", "unknown", "old"],
)
def test_figures_of_pictures_that_were_trained_on_count_for_nothing(
    model: str, tmp_path: Path, seen: dict[str, Any] | None, words: str
) -> None:
    kept = evaluation_of(GOOD, registry.get_version(model, 3).digest) | {"seen": seen}
    evaluations.record_evaluation(model, 3, {key: value for key, value in kept.items() if value is not None})
    refused = run("promote", "3", "--model", model)
    assert refused.exit_code == 2
    assert words.format(model=model) in refused.stderr
    (tmp_path / "gate.toml").write_text(
        "held_out = false\n" + DEFAULT_GATE.read_text().replace("held_out = true", "")
    )
    assert run("promote", "3", "--model", model, "--gate", str(tmp_path / "gate.toml")).exit_code == 0


def test_history_shows_what_was_done_behind_its_back(model: str) -> None:
    assert run("promote", "1", "--model", model).exit_code == 0
    registry.set_alias(model, "champion", 2)
    shown = run("history", "--model", model, "--json")
    assert shown.exit_code == 1
    assert "the champion is version 2, but the history says 1: moved by hand" in shown.stderr
    assert len(answer(shown)["problems"]) == 1


def test_an_unreachable_server_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for arguments in (("promote", "1"), ("rollback",), ("history",)):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert "Connection refused; start that server, correct MLFLOW_TRACKING_URI" in result.stderr
