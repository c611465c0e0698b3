"""How large the crops of a step are, and how many classes its batch then takes: the same pixels at every
size, so that memory and time of a step stay about the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nst.config import BatchConfig
from nst.permutation import mix_bits, permute


@dataclass(frozen=True)
class StepShape:
    """The shape of one global batch.

    Attributes:
        step: which step.
        size: side of the crops in pixels.
        num_classes: P of this step.
        entry: which entry of `batch.sizes` the step takes.
        turn: how many steps before took the same entry.
        classes_before: class draws of all earlier steps; K times as many are their content images.
    """

    step: int
    size: int
    num_classes: int
    entry: int
    turn: int
    classes_before: int


class SizeSchedule:
    """`schedule.at(step)`: a pure function of seed and step; its cost grows with the number of sizes only.

    Each cycle of len(sizes) steps takes every entry of `batch.sizes` once, in an order of its own. A size
    that is named twice comes twice as often.

    P at a size is as large as the pixels of `batch.num_classes` classes at `batch.size` allow, and as the
    corpus has classes, rounded down to a multiple of `unit`. The unit is the largest divisor of
    gcd(P at batch.size, 8) whose pixels fit at the largest size: ranks that share the base batch then share
    all others too, wherever the budget lets them.

    Args:
        config: P, base size and sizes.
        num_available: classes in the corpus.
        seed: of the whole training.
    """

    def __init__(self, config: BatchConfig, num_available: int, seed: int) -> None:
        self.sizes = config.sizes or (config.size,)
        room = [config.classes_within_budget(size) for size in self.sizes]
        common = math.gcd(min(config.num_classes, num_available), 8) if config.sizes else 1
        self.unit = max(unit for unit in (1, 2, 4, 8) if common % unit == 0 and unit <= min(room))
        self.num_classes = tuple(min(fits, num_available) // self.unit * self.unit for fits in room)
        self._seed = seed

    def __len__(self) -> int:
        return len(self.sizes)

    def at(self, step: int) -> StepShape:
        turn, place = divmod(step, len(self))
        order = permute(np.arange(len(self)), len(self), mix_bits(self._seed, 6, turn)).tolist()
        earlier = sum(self.num_classes[entry] for entry in order[:place])
        entry = order[place]
        return StepShape(
            step=step,
            size=self.sizes[entry],
            num_classes=self.num_classes[entry],
            entry=entry,
            turn=turn,
            classes_before=turn * sum(self.num_classes) + earlier,
        )
