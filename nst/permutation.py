"""Randomness as arithmetic: hashes and permutations of any length that are computed where they are needed,
so that nothing random has to be remembered between steps."""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def mix_bits(*parts: int) -> int:
    """A 64-bit hash of integers (splitmix64 finaliser): the same on every machine and Python version."""
    value = 0
    for part in parts:
        value = (value + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def permute(positions: np.ndarray, num: int, key: int) -> np.ndarray:
    """Where each position goes in a random permutation of range(num), without making the permutation: a
    four-round Feistel network over the next even number of bits, walked until it lands inside.

    Cost and memory do not grow with `num`.

    Args:
        positions: int64, each in [0, num).
        num: up to 2^60.
        key: which permutation.
    """
    if num <= 1:
        return np.zeros_like(positions)
    half = max(1, ((num - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix_bits(key, turn)) for turn in range(4)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for turn_key in keys:
            left, right = right, left ^ (scramble(right ^ turn_key) & mask)
        values[outside] = (left << np.uint64(half)) | right
        outside = values >= np.uint64(num)
    return values.astype(np.int64)


def scramble(values: np.ndarray) -> np.ndarray:
    """A hash of each of these uint64 values (the same finaliser)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
