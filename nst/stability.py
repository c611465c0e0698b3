"""What keeps the two sides of a GAN in balance, and says so when they are not: the success gate, and alarms
in plain language. Both remember a few numbers, which belong to the checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

log = logging.getLogger(__name__)

SLOWNESS = 0.8  # of the running means over reports
MIN_REPORTS = 10  # before an alarm: a training that begins looks like one that has collapsed
GATE_STEPS = 500  # that the accuracy must have stayed above the gate (method: alarms)

COLLAPSED, SAME_VECTOR, STYLE_IGNORED, TOO_STRONG = (
    "style_encoder_collapsed",
    "embeddings_alike",
    "style_ignored",
    "discriminator_too_strong",
)
WARNINGS = {
    COLLAPSED: "the style encoder no longer tells artists apart: its matrix loss is that of guessing. Try a "
    "lower optim.encoder_lr, or more classes in a batch",
    SAME_VECTOR: "the style encoder gives nearly the same vector for every picture (mean cosine above 0.9)",
    STYLE_IGNORED: "one content looks the same in every style: the generator ignores the style. Early in a "
    "training that is usual; later, raise loss.statistics or loss.bands",
    TOO_STRONG: "the discriminator is right nearly always; it waits for the generator to catch up",
}


class SuccessGate:
    """Lets a discriminator learn only while it can still be fooled (AST, Sanakoyeu et al. 2018; method:
    alarms): after 500 steps of an accuracy above the threshold it stops, until the accuracy falls below.

    Args:
        threshold: accuracy in (0.5, 1]; 1 never closes.
        num_steps: of accuracy above the threshold before it closes.
    """

    def __init__(self, threshold: float, num_steps: int = GATE_STEPS) -> None:
        self._threshold, self._num_steps = threshold, num_steps
        self._steps_above = 0

    @property
    def is_open(self) -> bool:
        return self._steps_above < self._num_steps

    def observe(self, accuracy: float) -> None:
        """The newest accuracy, the same on every rank."""
        self._steps_above = self._steps_above + 1 if accuracy > self._threshold else 0

    def memory(self) -> dict[str, float]:
        return {"steps_above": float(self._steps_above)}

    def recall(self, memory: Mapping[str, float]) -> None:
        self._steps_above = int(memory["steps_above"])


class Alarms:
    """Watches running means of what a training reports. Each alarm is a figure of 0 or 1 in the metrics, and
    one warning in the log each time that it goes up."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}
        self._num_reports = 0
        self._raised: set[str] = set()

    def observe(self, figures: Mapping[str, float], *, gate_is_open: bool) -> dict[str, float]:
        """Takes in one report of a training.

        Args:
            figures: of those that there are: `guessing`, the matrix loss over what guessing scores; `cosine`,
                the mean off-diagonal one; `sensitivity`, the standard deviation over styles of one stylized
                content, in [-1, 1] units.

        Returns:
            alarm/NAME -> 0 or 1.
        """
        for name, value in figures.items():
            if math.isfinite(value):
                self._means[name] = value + SLOWNESS * (self._means.get(name, value) - value)
        self._num_reports += 1
        up = dict.fromkeys(WARNINGS, False)
        up[TOO_STRONG] = not gate_is_open
        if self._num_reports >= MIN_REPORTS:
            up[COLLAPSED] = self._means.get("guessing", 0.0) > 0.97
            up[SAME_VECTOR] = self._means.get("cosine", 0.0) > 0.9
            up[STYLE_IGNORED] = self._means.get("sensitivity", 1.0) < 0.02
        for name, is_up in up.items():
            if is_up and name not in self._raised:
                log.warning("%s", WARNINGS[name])
        self._raised = {name for name, is_up in up.items() if is_up}
        return {f"alarm/{name}": float(is_up) for name, is_up in up.items()}

    def memory(self) -> dict[str, float]:
        return {"num_reports": float(self._num_reports), **self._means}

    def recall(self, memory: Mapping[str, float]) -> None:
        means = dict(memory)
        self._num_reports = int(means.pop("num_reports"))
        self._means = means
