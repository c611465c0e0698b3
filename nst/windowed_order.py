"""Random orders of a corpus that keep to a few shards at a time, as arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nst.permutation import mix_bits, permute, scramble

NUM_KEPT = 4  # passes whose tables are kept: batches of different sizes are each in a pass of their own


class WindowedOrder:
    """A permutation of the samples of S shards for each key, in which only `window` shards are open at once.

    The shards come in random order. Each is cut into as many stripes as the window has shards, and block t
    of the order takes, shuffled, one stripe of each of the last `window` shards: the first of shard t, the
    second of shard t - 1, and so on. From block to block one shard enters and one leaves. The first blocks
    take what is left of the last shards, so that every sample comes once.

    What is given up against a permutation of everything: a sample only ever meets samples of its own shard
    and of the 2 * window - 2 shards before and behind it in the order of the pass; and samples of one shard
    whose rows are the same modulo the window always come in the same block. With no more shards than the
    window has, it is a permutation of everything.

    Memory and the cost of a new pass grow with S; the cost of a batch does not.

    Args:
        lengths: int [S], samples of each shard.
        window: W, shards that are open at once.
    """

    def __init__(self, lengths: np.ndarray, window: int) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        self._lengths, self._starts = sizes[sizes > 0], starts[sizes > 0]
        self._window = window
        self.num_samples = int(sizes.sum())
        self._passes: dict[int, _Pass] = {}

    def at(self, positions: np.ndarray, key: int) -> np.ndarray:
        """The samples [n] int64 at these positions, each in [0, num_samples), of the order of `key`."""
        if len(self._lengths) <= self._window:
            return permute(positions, self.num_samples, key)
        one = self._pass(key)
        blocks = np.searchsorted(one.ends, positions, side="right")
        samples = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            mine = blocks == block
            sizes = one.stripes[block]
            first, num = int(one.ends[block] - sizes.sum()), int(sizes.sum())
            places = permute(positions[mine] - first, num, mix_bits(key, 1, block))
            ends = np.cumsum(sizes)
            stripes = np.searchsorted(ends, places, side="right")
            turns = (block - stripes) % len(one.order)
            within = (places - (ends - sizes)[stripes]) * self._window
            within += (stripes + one.shifts[turns]) % self._window
            samples[mine] = self._starts[one.order[turns]] + within
        return samples

    def _pass(self, key: int) -> _Pass:
        if key not in self._passes:
            while len(self._passes) >= NUM_KEPT:
                del self._passes[next(iter(self._passes))]
            self._passes[key] = _Pass.of(self._lengths, self._window, key)
        return self._passes[key]


class _Pass(NamedTuple):
    """One key's tables.

    Attributes:
        order: [S] shards in the order of this pass.
        shifts: [S] which rows, modulo W, are the first stripe of each of them.
        stripes: [S, W] samples that each block takes of the shards that are open.
        ends: [S] where each block ends.
    """

    order: np.ndarray
    shifts: np.ndarray
    stripes: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, window: int, key: int) -> _Pass:
        turns, places = np.arange(len(lengths)), np.arange(window)
        order = permute(turns, len(turns), mix_bits(key, 2))
        hashes = scramble(turns.astype(np.uint64) ^ np.uint64(mix_bits(key, 3)))
        shifts = (hashes % np.uint64(window)).astype(np.int64)
        opened = (turns[:, None] - places) % len(turns)  # [S, W]
        phases = (places + shifts[opened]) % window
        stripes = (lengths[order[opened]] - phases + window - 1) // window
        return cls(order, shifts, stripes, np.cumsum(stripes.sum(axis=1)))
