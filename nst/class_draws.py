"""Which classes the batch of a step holds: never one twice, each in proportion to sqrt(n) of its n works.

`ClassPasses` remembers nothing, nor does `PicturePasses`, for which every picture is a class.
`AdaptiveClasses` also follows the losses, and so has a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nst.permutation import mix_bits, permute
from nst.size_schedule import SizeSchedule, StepShape
from nst.windowed_order import WindowedOrder

WINDOW = 64
"""Steps that adaptive drawing fixes at once; also how far ahead of training plans can be made."""

NEWEST = 0.1  # weight of a new loss in the running mean: the last ten draws or so count
BOUND = 3.0  # losses make a class at most so many times as frequent, or as rare, as sqrt(n) alone
RESOLUTION, ADAPTIVE_RESOLUTION = 4, 64  # visits that the rarest class gets in a pass


class Draw(NamedTuple):
    """The classes of one batch.

    Attributes:
        classes: [P] int64, distinct.
        visits: [P] int64, how often each was drawn before; counted for each lane apart.
        lane: draws of one lane walk through the works of a class together; 0 unless sizes vary.
    """

    classes: np.ndarray
    visits: np.ndarray
    lane: int


class Deck(NamedTuple):
    """A pass over the classes, to be dealt out to batches.

    The visits of all classes, classes in random order, lie in one row; batch b takes every B-th from the
    b-th on, B batches in all. As no class has more than B visits, no batch holds a class twice.

    Attributes:
        order: [C] classes in the order of this pass.
        ends: [C] where the visits of each end.
        num_batches: B.
    """

    order: np.ndarray
    ends: np.ndarray
    num_batches: int

    @classmethod
    def shuffled(cls, visits: np.ndarray, num_classes: int, key: int) -> Deck:
        order = permute(np.arange(len(visits)), len(visits), key)
        return cls(order, np.cumsum(visits[order]), int(visits.sum()) // num_classes)

    def deal(self, batch: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        """[P] classes of a batch, and [P] which visit of the pass each of them is."""
        slots = batch + np.arange(num_classes) * self.num_batches
        which = np.searchsorted(self.ends, slots, side="right")
        first = np.where(which > 0, self.ends[which - 1], 0)
        return self.order[which], slots - first


def visits_per_pass(shares: np.ndarray, num_classes: int, resolution: int) -> np.ndarray:
    """How often each class comes in one pass: in proportion to its share, but never more often than there
    are batches in the pass, so that no batch needs to hold a class twice.

    Args:
        shares: [C], above 0.
        num_classes: P, at most C.
        resolution: visits of the class with the smallest share.
    """
    visits = np.maximum(1, np.rint(resolution * (shares / shares.min()))).astype(np.int64)
    while visits.max() > (limit := int(visits.sum()) // num_classes):
        visits = np.minimum(visits, limit)
    return visits


class _Forgetful:
    """What draws without a memory answer."""

    def observe(self, step: int, labels: np.ndarray, losses: np.ndarray) -> None:
        """Losses change nothing here."""

    def memory(self) -> dict[str, Any]:
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Nothing was remembered."""


class ClassPasses(_Forgetful):
    """Rotating shuffled passes. Steps of different size (another P) go through passes of their own.

    Args:
        counts: [C] works of each class.
        schedule: P of every step.
        seed: of the whole training.
    """

    def __init__(self, counts: np.ndarray, schedule: SizeSchedule, seed: int) -> None:
        shares = np.sqrt(counts / counts.min())
        self._visits = [visits_per_pass(shares, num, RESOLUTION) for num in schedule.num_classes]
        self._decks: list[tuple[int, Deck] | None] = [None] * len(schedule)
        self._seed = seed

    def draw(self, shape: StepShape) -> Draw:
        lane, visits = shape.entry, self._visits[shape.entry]
        num_batches = int(visits.sum()) // shape.num_classes
        turn, place = divmod(shape.turn, num_batches)
        key = turn * len(self._visits) + lane
        deck = self._deck(lane, turn, shape.num_classes, mix_bits(self._seed, 1, key))
        batch = permute(np.array([place]), num_batches, mix_bits(self._seed, 2, key))[0]
        classes, visit = deck.deal(int(batch), shape.num_classes)
        return Draw(classes, turn * visits[classes] + visit, lane)

    def _deck(self, lane: int, turn: int, num_classes: int, key: int) -> Deck:
        """Made once a pass: its cost grows with the number of classes."""
        kept = self._decks[lane]
        if kept is None or kept[0] != turn:
            kept = self._decks[lane] = (turn, Deck.shuffled(self._visits[lane], num_classes, key))
        return kept[1]


class PicturePasses(_Forgetful):
    """`ClassPasses` where every class is one picture: all come equally often, so that a pass is arithmetic
    and nothing grows with their number.

    With `order`, a pass walks through the pictures in that order and visits each once: place p of a batch
    goes through the p-th part of it.

    Args:
        num_pictures: in all.
        schedule: P of every step.
        seed: of the whole training.
        order: keeps neighbouring batches to few shards; None: a permutation of everything.
    """

    def __init__(
        self, num_pictures: int, schedule: SizeSchedule, seed: int, order: WindowedOrder | None = None
    ) -> None:
        self._num_pictures, self._num_lanes, self._seed = num_pictures, len(schedule), seed
        self._order = order

    def draw(self, shape: StepShape) -> Draw:
        num_visits = RESOLUTION if self._order is None else 1
        num_batches = num_visits * self._num_pictures // shape.num_classes
        turn, place = divmod(shape.turn, num_batches)
        key = turn * self._num_lanes + shape.entry
        if self._order is None:
            place = int(permute(np.array([place]), num_batches, mix_bits(self._seed, 2, key))[0])
        which, visit = np.divmod(place + np.arange(shape.num_classes) * num_batches, num_visits)
        pass_key = mix_bits(self._seed, 1, key)
        if self._order is None:
            pictures = permute(which, self._num_pictures, pass_key)
        else:
            pictures = self._order.at(which, pass_key)
        return Draw(pictures, turn * num_visits + visit, shape.entry)


class Window(NamedTuple):
    """The draws of `WINDOW` steps, and what they leave to the next.

    Attributes:
        draws: one for each step.
        drawn: [C] int64, how often each class was drawn up to the end of the window.
        owed: [C], by how much that falls short of the class's share.
    """

    draws: list[Draw]
    drawn: np.ndarray
    owed: np.ndarray


class AdaptiveClasses:
    """Classes with a high recent loss come more often: in proportion to sqrt(n) * exp(strength * s), the
    exponential within [1/3, 3]; s is the class's running loss, standardised over all classes seen so far.

    Loader workers plan ahead of training, so what they plan may only depend on losses that are long known.
    Steps go in windows of `WINDOW`; what was learnt up to the end of a window decides the draws of the window
    after the next. At any time the draws of the current window and of the next one are fixed.

    What a window draws of a class is a whole number; the rest is owed to it and added to the next window, so
    that even a class with less than one draw a window comes at even distances and is never left out.

    A loss counts as what it is above the mean of its batch: losses fall during training and depend on P, and
    neither must make a class look hard for having been drawn early or in a large batch.

    Args:
        counts: [C] works of each class.
        schedule: P of every step.
        strength: 0 would draw in proportion to sqrt(n).
        seed: of the whole training.
    """

    def __init__(self, counts: np.ndarray, schedule: SizeSchedule, strength: float, seed: int) -> None:
        self._shares = np.sqrt(counts / counts.min())
        self._schedule, self._strength, self._seed = schedule, strength, seed
        num = len(counts)
        self._step = 0
        self._losses = np.zeros(num)  # running means
        self._seen = np.zeros(num, dtype=np.int64)  # how many losses each has had
        self._drawn = np.zeros(num, dtype=np.int64)  # draws before the current window
        self._owed = np.zeros(num)  # what those fall short of the share, in draws
        self._scores = (np.zeros(num), np.zeros(num))  # what decides the current window and the next
        self._windows = self._make_windows()

    def draw(self, shape: StepShape) -> Draw:
        step = shape.step
        ahead = step // WINDOW - self._step // WINDOW
        assert 0 <= ahead <= 1, (
            f"step {step} is not to be planned yet, or no more: observed {self._step} steps"
        )
        return self._windows[ahead].draws[step % WINDOW]

    def observe(self, step: int, labels: np.ndarray, losses: np.ndarray) -> None:
        """Learns from a step.

        Args:
            labels: [n] int64, classes of the whole global batch, in rank order.
            losses: [n] float64; what is not finite is left out.
        """
        assert step == self._step, f"steps are observed in order: {self._step} is next, not {step}"
        assert len(labels) == len(losses), (len(labels), len(losses))
        finite = np.isfinite(losses)
        labels, losses = labels[finite], losses[finite]
        if len(labels):
            present, row_class, num_rows = np.unique(labels, return_inverse=True, return_counts=True)
            means = np.bincount(row_class, losses - losses.mean()) / num_rows
            self._seen[present] += 1
            # the plain mean, until there are enough losses for a running one
            rate = np.maximum(NEWEST, 1 / self._seen[present])
            self._losses[present] += rate * (means - self._losses[present])
        self._step += 1
        if self._step % WINDOW == 0:
            self._drawn, self._owed = self._windows[0].drawn, self._windows[0].owed
            self._scores = (self._scores[1], self._standardised())
            self._windows = self._make_windows()

    def memory(self) -> dict[str, Any]:
        """All that later draws depend on, as JSON holds it (floats come back bit for bit)."""
        return {
            "step": self._step,
            "losses": self._losses.tolist(),
            "seen": self._seen.tolist(),
            "drawn": self._drawn.tolist(),
            "owed": self._owed.tolist(),
            "scores": [scores.tolist() for scores in self._scores],
        }

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Goes on where `memory` was taken.

        Raises:
            ValueError: it is of a training that was not adaptive, or of other classes.
        """
        if len(memory.get("losses", ())) != len(self._losses):
            raise ValueError(
                f"batch.adaptive follows {len(self._losses)} classes, the checkpoint remembers losses of "
                f"{len(memory.get('losses', ()))}: it is of another training; give this one another name"
            )
        self._step = int(memory["step"])
        self._losses = np.array(memory["losses"], dtype=np.float64)
        self._seen = np.array(memory["seen"], dtype=np.int64)
        self._drawn = np.array(memory["drawn"], dtype=np.int64)
        self._owed = np.array(memory["owed"], dtype=np.float64)
        now, after = (np.array(scores, dtype=np.float64) for scores in memory["scores"])
        self._scores = (now, after)
        self._windows = self._make_windows()

    def _standardised(self) -> np.ndarray:
        """[C] running losses with mean 0 and deviation 1; 0 for a class that had none yet."""
        scores, seen = np.zeros(len(self._losses)), self._seen > 0
        values = self._losses[seen]
        if len(values) and (deviation := float(values.std())) > 1e-12:
            scores[seen] = (values - values.mean()) / deviation
        return scores

    def _make_windows(self) -> tuple[Window, Window]:
        first = self._step // WINDOW
        now = self._window(first, self._scores[0], self._drawn, self._owed)
        return now, self._window(first + 1, self._scores[1], now.drawn, now.owed)

    def _window(self, window: int, scores: np.ndarray, drawn: np.ndarray, owed: np.ndarray) -> Window:
        shapes = [self._schedule.at(step) for step in range(window * WINDOW, (window + 1) * WINDOW)]
        places = [
            np.flatnonzero([shape.entry == entry for shape in shapes]) for entry in range(len(self._schedule))
        ]
        factors = np.clip(np.exp(self._strength * scores), 1 / BOUND, BOUND)
        expected = np.zeros(len(factors))
        for num_classes, mine in zip(self._schedule.num_classes, places, strict=True):
            visits = visits_per_pass(self._shares * factors, num_classes, ADAPTIVE_RESOLUTION)
            expected += len(mine) * visits / (int(visits.sum()) // num_classes)
        wanted = np.maximum(expected + owed, 0.01 * expected)
        dealt: dict[int, np.ndarray] = {}
        for entry, (num_classes, mine) in enumerate(zip(self._schedule.num_classes, places, strict=True)):
            visits = visits_per_pass(wanted, num_classes, ADAPTIVE_RESOLUTION)
            key = mix_bits(self._seed, 7, window, entry)
            deck = Deck.shuffled(visits, num_classes, key)
            # batches at even distances hit each class as often as it is wanted, rounded up or down
            turns = permute(np.arange(len(mine)), len(mine), mix_bits(key, 1))
            start = mix_bits(key, 2) % deck.num_batches
            for place, turn in zip(mine.tolist(), turns.tolist(), strict=True):
                dealt[place], _ = deck.deal((turn * deck.num_batches + start) // len(mine), num_classes)
        before, drawn, draws = drawn, drawn.copy(), []
        for place in range(WINDOW):
            classes = dealt[place]
            draws.append(Draw(classes, drawn[classes], lane=0))
            drawn[classes] += 1
        # each size rounds for itself
        limit = len(self._schedule)
        return Window(draws, drawn, np.clip(owed + expected - (drawn - before), -limit, limit))
