"""An evaluation: what was measured, of which models, on which pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipelines.evaluation_set import EvaluationSet, Identity
from pipelines.measures import BASELINE_TITLES, Summary

LETTERS = "ABCDEFGHIJ"
MAX_MODELS = len(LETTERS)


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One model: `title` is short, for columns and plots; `pictures` are uint8 [N, 3, H, W], a pair each;
    `seen` says which of the set's pictures it was trained on, as `pipelines.seen_pictures` tells it;
    `aliases` are those of a registered version, `lineage` is where that comes from, in words."""

    title: str
    name: str
    digest: str
    approach: str
    num_parameters: int
    measures: Summary
    pictures: Tensor
    seen: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    lineage: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models side by side, the first of them the one that others are compared with.

    Attributes:
        baselines: measures by baseline.
        identity: what makes figures comparable, of the set and of whatever else took part.
        code_digest: of the sources that measured.
        facts: what else the report should say.
    """

    chosen: EvaluationSet
    models: list[EvaluatedModel]
    baselines: Mapping[str, Summary]
    identity: Identity
    code_digest: str
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def summaries(self) -> dict[str, Summary]:
        """Measures by method: the models by their titles, then the baselines by their names."""
        return {**{model.title: model.measures for model in self.models}, **self.baselines}

    def kept(self, model: EvaluatedModel) -> dict[str, Any]:
        """What is kept of one model, as JSON holds it."""
        return {
            "measures": model.measures,
            "baselines": self.baselines,
            "pairs": self.chosen.pairs(),
            "evaluation_set": dict(self.identity),
            "model_digest": model.digest,
            "seen": dict(model.seen),
        }

    def as_json(self) -> dict[str, Any]:
        """What is kept of the first model; of several, what is kept of all under "models"."""
        values = {**self.kept(self.models[0]), "code_digest": self.code_digest}
        if len(self.models) > 1:
            values["models"] = [
                {
                    "model": model.name,
                    "model_digest": model.digest,
                    "measures": model.measures,
                    "seen": dict(model.seen),
                }
                for model in self.models
            ]
        return values


def model_title(number: int, num_models: int) -> str:
    """How the model of that number, from 0, is called in a report on so many."""
    return "model" if num_models == 1 else f"model {LETTERS[number]}"


def title_of(method: str) -> str:
    """How a method is called in tables and plots."""
    return BASELINE_TITLES.get(method, method)
