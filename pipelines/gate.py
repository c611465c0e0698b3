"""The promotion gate: rules in a TOML file, held against an evaluation. The format is told in gate.toml."""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nst.intervals import Interval, groups_for, paired_interval

DEFAULT_GATE = Path(__file__).with_name("gate.toml")

ABSOLUTE, FACTOR, OFFSET = ("max", "min"), ("max_times", "min_times"), ("max_plus", "min_plus")
LEAST = ("min_pairs", "min_contents", "min_styles")
NUM_NAMED = 5  # pairs in a line
LIMITS = (*ABSOLUTE, *FACTOR, *OFFSET)
BASELINES = {
    "content": "the unchanged content",
    "style": "a copy of the style",
    "color_transfer": "a mere transfer of colours",
}
CHAMPION = "champion"
OTHERS = {**BASELINES, CHAMPION: "the champion"}

Evaluation = Mapping[str, Any]
Measures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One limit to one measure's mean. With `confidence` 0 the mean decides, else the unfavourable end of its
    interval: what chance alone may have brought is no proof."""

    measure: str
    limit: str
    number: float
    confidence: float
    than: str | None = None
    why: str = ""

    @property
    def is_maximum(self) -> bool:
        return self.limit.startswith("max")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says of an evaluation.

    Attributes:
        value: the measure's mean; NaN where it was not measured.
        bound: what it is held against; NaN where the other was not measured.
        excess: `value - bound` with its interval over pairs; None where `problem` says why not.
        figures: what the measure has figures of, in words.
    """

    rule: Rule
    value: float
    bound: float
    excess: Interval | None
    problem: str
    figures: str

    @property
    def passed(self) -> bool:
        if self.excess is None:
            return False
        # In this form a NaN fails.
        return self.excess.high <= 0 if self.rule.is_maximum else self.excess.low >= 0

    def __str__(self) -> str:
        why = "" if self.passed or self.excess is None or not self.rule.why else f" - {self.rule.why}"
        return self.comparison + why

    @property
    def comparison(self) -> str:
        """The figures and what they amount to; what the rule is good for stands in the gate's file."""
        rule, excess = self.rule, self.excess
        if excess is None:
            return self.problem
        other = OTHERS.get(rule.than or "", "")
        text = f"{rule.measure} is {self.value:.3f}, must be at {'most' if rule.is_maximum else 'least'}"
        text += f" {self.bound:.3f}"
        if rule.limit in FACTOR:
            text += f" ({rule.number:g} times {other})"
        elif rule.limit in OFFSET:
            text += f" ({abs(rule.number):g} {'less' if rule.number < 0 else 'more'} than {other})"
        if self.passed:
            return text
        if excess.mean > 0 if rule.is_maximum else excess.mean < 0:
            return text + f": {abs(excess.mean):.3f} too {'high' if rule.is_maximum else 'low'}"
        return text + (
            f": it is, but {self.figures} leave room for {excess.low:+.3f} to {excess.high:+.3f} of that; "
            "evaluate with more --pairs, of more contents and styles"
        )


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A checked gate file. `digest` is the sha256 of its bytes; with `held_out`, figures of pictures that a
    version was trained on count for nothing."""

    name: str
    digest: str
    min_pairs: int
    min_contents: int
    min_styles: int
    held_out: bool
    rules: tuple[Rule, ...]

    @property
    def champion_measures(self) -> list[str]:
        """The measures that are held against the champion's."""
        return [rule.measure for rule in self.rules if rule.than == CHAMPION]

    def check(self, evaluation: Evaluation, champion: Evaluation | None) -> list[Finding]:
        """One finding a rule, in the file's order; rules about the champion only where there is one.

        Raises:
            ValueError: the two evaluations are of different sets, or the set is too small.
        """
        for one in (evaluation, champion or evaluation):
            if "measures_version" not in one["evaluation_set"]:
                whose = "version" if one is evaluation else "champion"
                raise ValueError(
                    f"the {whose}'s evaluation is of an earlier format; evaluate the {whose} again"
                )
        pairs = evaluation["pairs"]
        for what, num, least in (
            ("pairs", evaluation["evaluation_set"]["num_pairs"], self.min_pairs),
            ("different contents", len(set(pairs["content"])), self.min_contents),
            ("different styles", len(set(pairs["style"])), self.min_styles),
        ):
            if num < least:
                raise ValueError(
                    f"the evaluation has {num} {what} and {self.name} asks for {least}; "
                    "evaluate the version on more images"
                )
        if champion is not None and champion["evaluation_set"] != evaluation["evaluation_set"]:
            raise ValueError(
                "the version and the champion were evaluated on different sets "
                f"({_differences(evaluation['evaluation_set'], champion['evaluation_set'])}); "
                "evaluate both in one command: nst evaluate models:/NAME/VERSION models:/NAME@champion …"
            )
        methods = {**evaluation["baselines"], CHAMPION: champion["measures"] if champion else {}}
        return [
            self._find(rule, evaluation, methods.get(rule.than or "", {}))
            for rule in self.rules
            if rule.than != CHAMPION or champion is not None
        ]

    def _find(self, rule: Rule, evaluation: Evaluation, other: Measures) -> Finding:
        measured = evaluation["measures"].get(rule.measure, {})
        groups = groups_for(evaluation["pairs"], measured)
        values, problem = _values(evaluation["measures"], rule.measure)
        mean = float(np.mean(values)) if values else math.nan
        is_share = bool(measured.get("is_share"))
        factor, offset = (rule.number, 0.0) if rule.limit in FACTOR else (1.0, rule.number)
        if rule.than is None:
            others, bound = [0.0] * len(values), offset
        else:
            others, problem_of_other = _values(other, rule.measure)
            bound = factor * float(np.mean(others)) + offset if others else math.nan
            if problem_of_other and not problem:
                why = problem_of_other.removeprefix(f"{rule.measure} ")
                problem = f"{rule.measure} is {mean:.3f}, but {why} for {OTHERS[rule.than]}"
        excess = None
        if values and others and rule.confidence == 0:
            excess = Interval(mean=mean - bound, low=mean - bound, high=mean - bound)
        elif values and others:
            # Pair by pair: what is hard for both cancels.
            difference = paired_interval(
                values,
                others,
                factor=factor,
                groups=groups,
                confidence=rule.confidence,
                is_share=is_share,
            )
            excess = Interval(
                mean=difference.mean - offset, low=difference.low - offset, high=difference.high - offset
            )
        sides = " and ".join(
            f"{len(set(labels))} {side}s" for side, labels in zip(("content", "style"), groups, strict=False)
        )
        figures = f"{len(values)} figures of {sides}"
        return Finding(rule=rule, value=mean, bound=bound, excess=excess, problem=problem, figures=figures)


def _values(measures: Measures, name: str) -> tuple[list[float], str]:
    """Its figures, one a pair, and ""; none where one of them is no number (a mean without it would be of
    others), and why."""
    found = measures.get(name, {}).get("values", [])
    values = [math.nan if value is None else float(value) for value in found]
    undefined = [str(number) for number, value in enumerate(values, start=1) if math.isnan(value)]
    if undefined:
        what = "figure" if "pairs" in measures[name] else "pair"
        shown = ", ".join(undefined[:NUM_NAMED]) + (", …" if len(undefined) > NUM_NAMED else "")
        return [], f"{name} is no number in {len(undefined)} of {len(values)} {what}s ({what} {shown})"
    return values, "" if values else f"{name} was not measured"


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    return ", ".join(f"{key} {str(first.get(key))[:12]} and {str(second.get(key))[:12]}" for key in keys)


def load_gate(path: str | Path | None = None) -> Gate:
    """The gate in the file at `path`; None: the one that comes with this package.

    Raises:
        ValueError: the file is missing or is no gate; says what is wrong with it.
    """
    path = Path(path or DEFAULT_GATE)
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode())
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such gate file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    unknown = sorted(set(values) - {"confidence", "held_out", *LEAST, "rule"})
    if unknown:
        raise ValueError(
            f"{path}: unknown {', '.join(unknown)}; "
            f"a gate holds confidence, held_out, {', '.join(LEAST)} and [[rule]] tables"
        )
    rules = values.get("rule", [])
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{path} has no [[rule]]: a gate that cannot refuse is none")
    least = {name: values.get(name, 1) for name in LEAST}
    for name, value in least.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{path}: {name} is {value!r}; give a whole number from 1")
    confidence = _confidence(values.get("confidence", 0.95), str(path))
    held_out = values.get("held_out", True)
    if not isinstance(held_out, bool):
        raise ValueError(f"{path}: held_out is {held_out!r}; give true or false")
    return Gate(
        name=path.name,
        digest=hashlib.sha256(data).hexdigest(),
        **least,
        held_out=held_out,
        rules=tuple(_rule_of(number, rule, path, confidence) for number, rule in enumerate(rules, start=1)),
    )


def _confidence(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{where}: confidence is {value!r}; give 0.95, or 0 for the mean alone to decide")
    return float(value)


def _rule_of(number: int, values: Any, path: Path, confidence: float) -> Rule:
    where = f"{path}: rule {number}"
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no table; write [[rule]]")
    unknown = sorted(set(values) - {"measure", "than", "why", "confidence", *LIMITS})
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(unknown)}")
    measure, than = values.get("measure"), values.get("than")
    if not isinstance(measure, str) or not measure:
        raise ValueError(f"{where} names no measure")
    limits = [limit for limit in LIMITS if limit in values]
    if len(limits) != 1:
        raise ValueError(f"{where} ({measure}) has {len(limits)} limits; give one of {', '.join(LIMITS)}")
    (limit,) = limits
    value = values[limit]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where} ({measure}): {limit} is {value!r}; give a number")
    if limit in ABSOLUTE and than is not None:
        raise ValueError(
            f"{where} ({measure}): {limit} is absolute; with than, write {limit}_times or {limit}_plus"
        )
    if limit not in ABSOLUTE and than not in (*BASELINES, CHAMPION):
        raise ValueError(
            f"{where} ({measure}): than is {than!r}; give one of {', '.join((*BASELINES, CHAMPION))}"
        )
    return Rule(
        measure=measure,
        limit=limit,
        number=float(value),
        confidence=_confidence(values.get("confidence", confidence), where),
        than=than,
        why=str(values.get("why", "")),
    )
