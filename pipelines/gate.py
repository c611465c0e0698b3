"""The promotion gate: rules in a TOML file, held against an evaluation. The format is told in gate.toml."""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_GATE = Path(__file__).with_name("gate.toml")

ABSOLUTE, FACTOR, OFFSET = ("max", "min"), ("max_times", "min_times"), ("max_plus", "min_plus")
LIMITS = (*ABSOLUTE, *FACTOR, *OFFSET)
BASELINES = {
    "content": "the unchanged content",
    "style": "a copy of the style",
    "color_transfer": "a mere transfer of colours",
}
CHAMPION = "champion"

Evaluation = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One limit to one measure's mean."""

    measure: str
    limit: str
    number: float
    than: str | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says of an evaluation. `value` and `bound` are NaN where they were not measured."""

    rule: Rule
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        # In this form a NaN on either side fails.
        return self.value <= self.bound if self.rule.limit.startswith("max") else self.value >= self.bound

    def __str__(self) -> str:
        rule = self.rule
        if math.isnan(self.value):
            return f"{rule.measure} was not measured"
        other = {**BASELINES, CHAMPION: "the champion"}.get(rule.than or "", "")
        if math.isnan(self.bound):
            return f"{rule.measure} is {self.value:.3f}, but was not measured for {other}"
        direction = "most" if rule.limit.startswith("max") else "least"
        text = f"{rule.measure} is {self.value:.3f}, must be at {direction} {self.bound:.3f}"
        if rule.limit in FACTOR:
            text += f" ({rule.number:g} times {other})"
        elif rule.limit in OFFSET:
            text += f" ({rule.number:g} more than {other})"
        if not self.passed:
            side = "high" if rule.limit.startswith("max") else "low"
            text += f": {abs(self.value - self.bound):.3f} too {side}"
            text += f" - {rule.why}" if rule.why else ""
        return text


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A checked gate file. `digest` is the sha256 of its bytes."""

    name: str
    digest: str
    min_pairs: int
    rules: tuple[Rule, ...]

    @property
    def compares_with_champion(self) -> bool:
        return any(rule.than == CHAMPION for rule in self.rules)

    def check(self, evaluation: Evaluation, champion: Evaluation | None) -> list[Finding]:
        """One finding a rule, in the file's order; rules about the champion only where there is one.

        Raises:
            ValueError: the two evaluations are of different sets, or the set is too small.
        """
        num_pairs = evaluation["evaluation_set"]["num_pairs"]
        if num_pairs < self.min_pairs:
            raise ValueError(
                f"the evaluation has {num_pairs} pairs and {self.name} asks for {self.min_pairs}; "
                "evaluate the version on more images"
            )
        if champion is not None and champion["evaluation_set"] != evaluation["evaluation_set"]:
            raise ValueError(
                "the version and the champion were evaluated on different sets "
                f"({_differences(evaluation['evaluation_set'], champion['evaluation_set'])}); "
                "evaluate both with the same options"
            )
        findings = []
        for rule in self.rules:
            if rule.than == CHAMPION and champion is None:
                continue
            value = _mean(evaluation["measures"], rule.measure)
            findings.append(Finding(rule=rule, value=value, bound=_bound(rule, evaluation, champion)))
        return findings


def _bound(rule: Rule, evaluation: Evaluation, champion: Evaluation | None) -> float:
    if rule.than is None:
        return rule.number
    if rule.than == CHAMPION:
        measures = champion["measures"] if champion else {}
    else:
        measures = evaluation["baselines"].get(rule.than, {})
    reference = _mean(measures, rule.measure)
    return reference * rule.number if rule.limit in FACTOR else reference + rule.number


def _mean(measures: Mapping[str, Mapping[str, float]], name: str) -> float:
    found = measures.get(name, {}).get("mean")
    return math.nan if found is None else float(found)


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
    unknown = sorted(set(values) - {"min_pairs", "rule"})
    if unknown:
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; a gate holds min_pairs and [[rule]] tables")
    rules = values.get("rule", [])
    if not isinstance(rules, list) or not rules:
        raise ValueError(f"{path} has no [[rule]]: a gate that cannot refuse is none")
    min_pairs = values.get("min_pairs", 1)
    if not isinstance(min_pairs, int) or isinstance(min_pairs, bool) or min_pairs < 1:
        raise ValueError(f"{path}: min_pairs is {min_pairs!r}; give a whole number from 1")
    return Gate(
        name=path.name,
        digest=hashlib.sha256(data).hexdigest(),
        min_pairs=min_pairs,
        rules=tuple(_rule_of(number, rule, path) for number, rule in enumerate(rules, start=1)),
    )


def _rule_of(number: int, values: Any, path: Path) -> Rule:
    where = f"{path}: rule {number}"
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no table; write [[rule]]")
    unknown = sorted(set(values) - {"measure", "than", "why", *LIMITS})
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
    return Rule(measure=measure, limit=limit, number=float(value), than=than, why=str(values.get("why", "")))
