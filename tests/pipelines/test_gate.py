"""The promotion gate: what it lets pass, what it refuses, and what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nst.intervals import summarize
from pipelines.gate import load_gate
from tests.evaluations import BAD_MODELS, GOOD, MEASURES, evaluation_of


@pytest.mark.parametrize("name", BAD_MODELS)
def test_it_refuses_what_is_no_stylization(name: str) -> None:
    means, expected = BAD_MODELS[name]
    findings = load_gate().check(evaluation_of(means), None)
    assert {finding.rule.measure for finding in findings if not finding.passed} >= expected


def test_it_lets_a_stylization_pass() -> None:
    findings = load_gate().check(evaluation_of(GOOD), None)
    assert [str(finding) for finding in findings if not finding.passed] == []
    assert "champion" not in " ".join(str(finding) for finding in findings)


def test_it_compares_with_the_champion() -> None:
    gate = load_gate()
    worse = (0.300, 0.600, 0.1075, 0.500, -0.050, 0.120, 0.034)
    better = (0.300, 0.600, 0.090, 0.500, -0.050, 0.120, 0.034)
    (failed,) = [f for f in gate.check(evaluation_of(worse), evaluation_of(better)) if not f.passed]
    assert str(failed) == (
        "style_distance is 0.107, must be at most 0.105 (0.015 more than the champion): 0.003 too high "
        "- not clearly further from the style than the version in use"
    )
    assert all(f.passed for f in gate.check(evaluation_of(better), evaluation_of(worse)))
    # Nearer to the style, and paid for with this; each within what the rules without a champion allow.
    for measure, figure, expected in (
        ("edge_ssim", 0.500, "edge_ssim is 0.500, must be at least 0.550 (0.05 less than the champion)"),
        ("checkerboard", 0.200, "checkerboard is 0.200, must be at most 0.100 (0.15 more than the champion)"),
        (
            "style_sensitivity",
            0.080,
            "style_sensitivity is 0.080, must be at least 0.096 (0.8 times the champion)",
        ),
        (
            "structure_copied",
            0.120,
            "structure_copied is 0.120, must be at most 0.084 (0.05 more than the champion)",
        ),
    ):
        means = [*GOOD[:2], 0.05, *GOOD[3:]]
        means[MEASURES.index(measure)] = figure
        candidate = evaluation_of(tuple(means))
        assert all(f.passed for f in gate.check(candidate, None)), measure
        (failed,) = [f for f in gate.check(candidate, evaluation_of(GOOD)) if not f.passed]
        assert failed.comparison.startswith(expected)
    with pytest.raises(ValueError, match=r"different sets \(seed 0 and 1\); evaluate both"):
        gate.check(evaluation_of(GOOD), evaluation_of(GOOD, seed=1))
    with pytest.raises(ValueError, match=r"measures_version 1 and 2, vgg_digest None and abcd"):
        gate.check(evaluation_of(GOOD), evaluation_of(GOOD, measures_version=2, vgg_digest="abcd"))
    with pytest.raises(ValueError, match=r"has 3 pairs and gate\.toml asks for 8"):
        gate.check(evaluation_of(GOOD, num_pairs=3), None)


SLIGHTLY_BETTER = (0.300, 0.600, 0.112, 0.500, -0.050, 0.120, 0.034)
COLORS_RULE = (
    "[[rule]]\nmeasure = 'style_distance'\nmax_times = 0.98\nthan = 'color_transfer'\nwhy = 'textures'\n"
)


@pytest.mark.parametrize(
    ("text", "spread", "passed"),
    [
        (COLORS_RULE, 0.0, True),
        (COLORS_RULE, 0.02, False),
        (f"confidence = 0.999\n{COLORS_RULE}", 0.014, False),
        (f"confidence = 0.5\n{COLORS_RULE}", 0.014, True),
        (f"{COLORS_RULE}confidence = 0", 0.02, True),
    ],
)
def test_what_chance_may_have_brought_is_no_proof(
    tmp_path: Path, text: str, spread: float, passed: bool
) -> None:
    """The same mean, a little within the limit: the pairs agree, or scatter, and the gate is more or less
    strict."""
    (tmp_path / "gate.toml").write_text(text)
    evaluation = evaluation_of(SLIGHTLY_BETTER, spread=spread)
    (finding,) = load_gate(tmp_path / "gate.toml").check(evaluation, None)
    assert finding.passed == passed
    assert str(finding).startswith(
        "style_distance is 0.112, must be at most 0.116 (0.98 times a mere transfer of colours)"
    )
    if not passed:
        assert ": it is, but 24 figures of 24 contents and 8 styles leave room for -0.0" in str(finding)
        assert str(finding).endswith(
            "of that; evaluate with more --pairs, of more contents and styles - textures"
        )


def test_a_measure_that_is_missing_fails() -> None:
    evaluation = evaluation_of(GOOD)
    del evaluation["measures"]["style_distance"]
    del evaluation["baselines"]["style"]["edge_ssim"]
    evaluation["measures"]["checkerboard"]["values"][3] = math.nan
    evaluation["baselines"]["content"]["structure_copied"]["values"][:6] = [None] * 6
    failed = [str(finding) for finding in load_gate().check(evaluation, None) if not finding.passed]
    assert failed == [
        "style_distance was not measured",
        "style_distance was not measured",
        "edge_ssim is 0.600, but was not measured for a copy of the style",
        "structure_copied is 0.034, but is no number in 6 of 24 pairs (pair 1, 2, 3, 4, 5, …) for the "
        "unchanged content",
        "checkerboard is no number in 1 of 24 pairs (pair 4)",
    ]


def test_a_share_without_a_miss_is_no_proof_of_a_share_of_one(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_text("[[rule]]\nmeasure = 'artist_top1'\nmin = 0.7\n")
    gate, told = load_gate(tmp_path / "gate.toml"), []
    for num_styles in (4, 24):
        pairs = {"content": list(range(24)), "style": [place % num_styles for place in range(24)]}
        found = summarize({"artist_top1": [1.0] * 24}, pairs, {"artist_top1": pairs}, ["artist_top1"])
        assert found["artist_top1"]["high"] == 1
        (finding,) = gate.check(evaluation_of(GOOD) | {"measures": found}, None)
        told.append((finding.passed, str(finding)))
    assert [passed for passed, _ in told] == [False, True]
    assert "it is, but 24 figures of 24 contents and 4 styles leave room" in told[0][1]


def test_it_asks_for_enough_contents_and_styles(tmp_path: Path) -> None:
    text = "min_contents = 24\nmin_styles = 9\n[[rule]]\nmeasure = 'edge_ssim'\nmin = 0\n"
    (tmp_path / "gate.toml").write_text(text)
    with pytest.raises(ValueError, match=r"has 8 different styles and gate\.toml asks for 9"):
        load_gate(tmp_path / "gate.toml").check(evaluation_of(GOOD), None)
    evaluation = evaluation_of(GOOD)
    del evaluation["evaluation_set"]["measures_version"]
    with pytest.raises(ValueError, match=r"the version's evaluation is of an earlier format"):
        load_gate().check(evaluation, None)


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
        ("min_styles = 0\n[[rule]]\nmeasure = 'a'\nmax = 1", "min_styles is 0"),
        ("min_pairs = 0\n[[rule]]\nmeasure = 'a'\nmax = 1", "min_pairs is 0"),
        ("confidence = 95\n[[rule]]\nmeasure = 'a'\nmax = 1", "confidence is 95; give 0.95"),
        ("[[rule]]\nmeasure = 'a'\nmax = 1\nconfidence = 1", "confidence is 1; give 0.95"),
        ("held_out = 1\n[[rule]]\nmeasure = 'a'\nmax = 1", "held_out is 1; give true or false"),
    ],
)
def test_a_file_with_a_mistake_is_no_gate(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "gate.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_gate(path)
