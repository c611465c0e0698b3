"""The gate and the verbs promote, rollback and history: what they let pass, refuse, say and leave behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infra import evaluations, promotions, publishing, registry, tracking_server
from infra.promotions import Grounds, move_champion
from infra.publishing import ModelInterface
from pipelines.cli import main
from pipelines.gate import load_gate

# Means over 24 pairs of photographs and paintings at 256 px, as nst.metrics gave them.
MEASURES = (
    "content_distance",
    "edge_ssim",
    "style_distance",
    "hist_style",
    "checkerboard",
    "style_sensitivity",
)
BASELINES = {
    "content": (0.000, 1.000, 0.162, 0.712, -0.111, 0.000),
    "style": (0.997, 0.195, 0.000, 0.000, -0.071, 0.208),
    "color_transfer": (0.011, 0.897, 0.118, 0.541, -0.111, 0.125),
}
BAD_MODELS = {
    "gives the content back": (
        (0.000, 1.000, 0.162, 0.712, -0.111, 0.000),
        {"style_distance", "style_sensitivity"},
    ),
    "copies the style": ((0.997, 0.195, 0.000, 0.000, -0.071, 0.208), {"content_distance", "edge_ssim"}),
    "makes noise": (
        (0.983, 0.032, 0.613, 0.851, -0.061, 0.256),
        {"content_distance", "edge_ssim", "style_distance"},
    ),
    "makes grey": (
        (0.931, 0.134, 0.373, 0.923, 0.000, 0.000),
        {"content_distance", "edge_ssim", "style_distance", "style_sensitivity"},
    ),
    "one look for all styles": ((0.300, 0.600, 0.130, 0.600, -0.100, 0.005), {"style_sensitivity"}),
    "leaves a grid": ((0.300, 0.600, 0.100, 0.500, 0.600, 0.120), {"checkerboard"}),
    "is undefined": (
        (math.nan,) * 6,
        {"content_distance", "edge_ssim", "style_distance", "style_sensitivity"},
    ),
}
GOOD = (0.300, 0.600, 0.100, 0.500, -0.050, 0.120)


def measures_of(means: tuple[float, ...]) -> dict[str, Any]:
    return {key: {"mean": mean, "low": mean, "high": mean} for key, mean in zip(MEASURES, means, strict=True)}


def evaluation_of(means: tuple[float, ...], digest: str | None = "", **evaluation_set: Any) -> dict[str, Any]:
    known = {"content_digest": "c", "style_digest": "s", "num_pairs": 24, "seed": 0, "size": 256}
    return {
        "measures": measures_of(means),
        "baselines": {name: measures_of(figures) for name, figures in BASELINES.items()},
        "evaluation_set": {**known, **evaluation_set},
        "model_digest": digest,
    }


@pytest.mark.parametrize("name", BAD_MODELS)
def test_the_gate_refuses_what_is_no_stylization(name: str) -> None:
    means, expected = BAD_MODELS[name]
    failed = {
        finding.rule.measure
        for finding in load_gate().check(evaluation_of(means), None)
        if not finding.passed
    }
    assert failed >= expected


def test_the_gate_lets_a_stylization_pass() -> None:
    findings = load_gate().check(evaluation_of(GOOD), None)
    assert [str(finding) for finding in findings if not finding.passed] == []
    assert "champion" not in " ".join(str(finding) for finding in findings)


def test_the_gate_compares_with_the_champion() -> None:
    gate = load_gate()
    worse = (0.300, 0.600, 0.118, 0.500, -0.050, 0.120)
    (failed,) = [f for f in gate.check(evaluation_of(worse), evaluation_of(GOOD)) if not f.passed]
    assert str(failed) == (
        "style_distance is 0.118, must be at most 0.115 (0.015 more than the champion): 0.003 too high "
        "- not clearly further from the style than the version in use"
    )
    assert all(f.passed for f in gate.check(evaluation_of(GOOD), evaluation_of(worse)))
    with pytest.raises(ValueError, match=r"different sets \(seed 0 and 1\); evaluate both"):
        gate.check(evaluation_of(GOOD), evaluation_of(GOOD, seed=1))
    with pytest.raises(ValueError, match=r"has 3 pairs and gate\.toml asks for 8"):
        gate.check(evaluation_of(GOOD, num_pairs=3), None)


def test_a_measure_that_is_missing_fails() -> None:
    evaluation = evaluation_of(GOOD)
    del evaluation["measures"]["style_distance"]
    del evaluation["baselines"]["style"]["edge_ssim"]
    failed = [str(finding) for finding in load_gate().check(evaluation, None) if not finding.passed]
    assert failed == [
        "style_distance was not measured",
        "edge_ssim is 0.600, but was not measured for a copy of the style",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"a gate that cannot refuse is none"),
        ("min_pair = 3", "unknown min_pair"),
        ("= 3", "is not TOML"),
        ("[[rule]]\nmeasure = 'a'", "has 0 limits"),
        ("[[rule]]\nmeasure = 'a'\nmax = 1\nmin = 0", "has 2 limits"),
        ("[[rule]]\nmeasure = 'a'\nmax = nan", "max is nan"),
        ("[[rule]]\nmeasure = 'a'\nmax = '1'", "max is '1'"),
        ("[[rule]]\nmeasure = 'a'\nmax_times = 1\nthan = 'nobody'", "than is 'nobody'"),
        ("[[rule]]\nmeasure = 'a'\nmax_times = 1", "than is None"),
        ("[[rule]]\nmeasure = 'a'\nmax = 1\nthan = 'content'", "write max_times or max_plus"),
        ("[[rule]]\nmax = 1", "names no measure"),
        ("[[rule]]\nmeasure = 'a'\nmax = 1\nmaximum = 1", "unknown maximum"),
        ("min_pairs = 0\n[[rule]]\nmeasure = 'a'\nmax = 1", "min_pairs is 0"),
    ],
)
def test_a_gate_file_with_a_mistake_is_no_gate(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_gate(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    tracking_server.client(uri)
    return uri


@pytest.fixture
def model(store: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered model with the versions 1, 2 and 3; 1 and 2 are evaluated and good."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setattr(promotions, "SECONDS_TO_MOVE", 0.0)
    name = request.node.name
    code = tmp_path / "code.py"
    code.write_text(
        "import pandas\nfrom mlflow.models import set_model\nfrom mlflow.pyfunc.model import PythonModel\n"
        "class Nothing(PythonModel):\n"
        "    def predict(self, context, model_input: pandas.DataFrame, params=None):\n"
        "        return model_input\n"
        "set_model(Nothing())\n"
    )
    for version in (1, 2, 3):
        (tmp_path / "model.safetensors").write_text(str(version))
        (tmp_path / "config.json").write_text("{}")
        publishing.register(
            tmp_path,
            digest=f"digest {version}",
            python_model_path=code,
            code_paths=[],
            pip_requirements=["pandas"],
            interface=ModelInterface(inputs=("content",), outputs=("content",)),
            name=name,
        )
    for version in (1, 2):
        evaluations.record_evaluation(name, version, evaluation_of(GOOD, f"digest {version}"))
    return name


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
    for expected in ({"champion": 1, "previous": 2}, {"champion": 2, "previous": 1}):
        assert run("rollback", "--model", model, "--reason", "faces smear").exit_code == 0
        assert aliases(model) == expected

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
    evaluations.record_evaluation(model, 3, evaluation_of(means, "digest 3"))
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
