"""The verbs promote, rollback and history: what they let pass, refuse, say and leave behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infra import evaluations, promotion_log, promotions, registry, tracking_server
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
    digest = promotions.events(model)[-1].digest
    assert back.stdout == (
        f"models:/{model}/1 is the champion again in place of 2\nno champion came before it\n"
        f"event 3, digest {digest}\n"
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
    head = promotions.events(model)[-1].digest
    assert lines[-2] == f"head: event 4, digest {head}"
    for expected, exit_code in ((digest, 0), (head.upper(), 0), ("0" * 64, 1), (head[:12], 2)):
        assert run("history", "--model", model, "--expect", expected).exit_code == exit_code
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

    blank = run("promote", "3", "--model", model, "--force", "--reason", "  ")
    assert "--force needs a --reason" in blank.stderr
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
        (("rollback", "--force"), "--force needs a --reason"),
        (("promote", "1", "--reason", "a\nb"), "the reason is 'a\\nb': it holds line breaks"),
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
    record(model, 1, BAD_MODELS["gives the content back"][0])
    forced = run("promote", "1", "--model", model, "--force", "--reason", "an emergency")
    assert forced.exit_code == 0, forced.output
    findings = promotions.events(model)[-1].grounds.findings
    assert sum(text.startswith("NO style_distance") for text in findings) == 2, (
        "the other rules count all the same"
    )
    assert sum(text.startswith("ok ") for text in findings) >= 4
    assert findings[-1].startswith("-- not checked: style_distance, content_distance")
    assert f"of the champion: models:/{model}/3 was not evaluated" in findings[-1]


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


def test_the_champion_is_who_the_history_says(model: str) -> None:
    """Else a champion could be got rid of, and with it the rules about it, by its alias."""
    assert run("promote", "1", "--model", model).exit_code == 0
    record(model, 2, (0.300, 0.600, 0.130, 0.500, -0.050, 0.120, 0.034))
    for move in (
        lambda: registry.delete_alias(model, "champion"),
        lambda: registry.set_alias(model, "champion", 3),
    ):
        move()
        refused = run("promote", "2", "--model", model)
        assert refused.exit_code == 2
        assert "but the history says 1: moved by hand; `nst promote 1` puts that back" in refused.stderr
        assert run("promote", "1", "--model", model).exit_code == 0, "as it was told"
        assert aliases(model) == {"champion": 1, "challenger": 3}
    registry.delete_alias(model, "champion")
    assert run("promote", "2", "--model", model, "--force", "--reason", "trial").exit_code == 0
    event = promotions.events(model)[-1]
    assert event.grounds.is_forced
    assert event.grounds.findings[0] == "NO there is no champion, but the history says 1: moved by hand"
    assert any(
        text.startswith("NO style_distance") and "more than the champion" in text
        for text in event.grounds.findings
    )


def test_nothing_moves_on_a_history_that_was_altered(model: str) -> None:
    for version in ("1", "2"):
        assert run("promote", version, "--model", model).exit_code == 0
    record(model, 3, GOOD)
    tracking_server.client().set_model_version_tag(model, "1", "promotion", f"1 {'0' * 64}")
    problem = "version 1 was promoted by event 1, but the history has not that event"
    for arguments in (("promote", "3"), ("rollback",), ("history",), ("history", "--version", "3")):
        refused = run(*arguments, "--model", model)
        assert refused.exit_code == 1, (arguments, refused.output)
        assert f"the history of {model} does not add up: {problem}" in refused.stderr
    assert "--force --reason TEXT" in run("rollback", "--model", model).stderr
    assert aliases(model)["champion"] == 2
    dry = run("promote", "3", "--model", model, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert f"  NO  {problem}" in dry.stdout

    forced = run("rollback", "--model", model, "--force", "--reason", "2 smears faces")
    assert forced.exit_code == 0, forced.output
    assert aliases(model)["champion"] == 1
    assert any(text.startswith(f"NO {problem}") for text in promotions.events(model)[-1].grounds.findings)


def test_a_version_that_cannot_be_fetched_is_brought_back_by_force(
    model: str, store: list[RegisteredVersion]
) -> None:
    known = store[0]
    tracking_server.client().create_model_version(model, "s3://nowhere/at-all", known.run_id, known.tags)
    for version in (4, 1):
        move_champion(model, version, kind="promote", grounds=Grounds(reason="by hand"))
    refused = run("rollback", "--model", model)
    assert refused.exit_code == 1
    assert "`nst rollback --force --reason TEXT` brings it back without that check" in refused.stderr
    assert aliases(model)["champion"] == 1
    forced = run("rollback", "--model", model, "--force", "--reason", "no bucket here", "--json")
    assert (forced.exit_code, answer(forced)["forced"]) == (0, True), forced.output
    event = promotions.events(model)[-1]
    assert event.grounds.is_forced
    assert event.grounds.findings == ("-- not checked: the files of version 4, and what it draws",)
    assert "rollback, forced" in run("history", "--model", model).stdout


def test_nobody_writes_lines_into_what_a_history_shows(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "mallory\n9  2026-01-01 00:00  promote")
    version = registry.get_version(model, 1)
    append = {"kind": "promote", "from_version": None, "recorded_version": None, "after": (0, "")}
    grounds = Grounds(reason="fine\x1b[2K\r\u202eenif")  # past what a command would take
    event = promotion_log.append(model, to=version, grounds=grounds, **append)
    promotion_log.conclude(event, "done")
    registry.set_alias(model, "champion", 1)
    for arguments, num_lines in ((("history",), 3), (("history", "--version", "1"), None)):
        shown = run(*arguments, "--model", model)
        assert shown.exit_code == 0, shown.output
        assert "mallory\\n9" in shown.stdout
        assert "fine\\x1b[2K\\r\\u202eenif" in shown.stdout
        assert not {"\x1b", "\r", "\u202e"} & set(shown.stdout)
        assert num_lines in (None, len(shown.stdout.splitlines()))


def test_a_history_that_was_replaced_adds_up_and_is_another(model: str) -> None:
    """All that MLflow's interface lets one write is enough: only what is kept elsewhere shows it."""
    for version in ("1", "2"):
        assert run("promote", version, "--model", model, "--reason", "as it was").exit_code == 0
    kept = promotions.events(model)[-1].digest
    assert run("history", "--model", model, "--expect", kept).exit_code == 0

    client = tracking_server.client()
    old = client.get_run(promotions.events(model)[0].run_id)
    new, digest = client.create_run(old.info.experiment_id).info.run_id, ""
    for number in ("000001", "000002"):
        event = json.loads(old.data.params[f"event-{number}"])
        event["grounds"]["reason"], event["previous_digest"] = "another", digest
        text = json.dumps(event)
        digest = hashlib.sha256(f"{text}\ndone".encode()).hexdigest()
        client.log_param(new, f"event-{number}", text)
        client.log_param(new, f"outcome-{number}", "done")
        mark = f"{int(number)} {digest}"
        client.set_model_version_tag(model, str(event["to_version"]), "promotion", mark)
    experiment = client.get_experiment_by_name(f"{promotion_log.EXPERIMENT}/{model}")
    assert experiment is not None
    client.set_experiment_tag(experiment.experiment_id, "history", new)
    client.set_registered_model_tag(model, "history", new)

    shown = run("history", "--model", model)
    assert shown.exit_code == 0, shown.output
    assert "another" in shown.stdout
    missed = run("history", "--model", model, "--expect", kept)
    assert missed.exit_code == 1
    assert f"has no event with the digest {kept}: it is another history" in missed.stderr


def test_an_unreachable_server_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for arguments in (("promote", "1"), ("rollback",), ("history",)):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert "Connection refused; start that server, correct MLFLOW_TRACKING_URI" in result.stderr
