"""Rolling hashes: a number for every window of n tokens, in a time that does not depend on n.

The hash of the tokens x_0, ..., x_(n-1) is the sum of mix(x_i) * BASE**i modulo 2**64. For all windows at once it comes
out of one running sum over the text. A window's part of that sum is divided by the power of the place where it begins,
which is possible because BASE is odd and so has an inverse.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

BASE = 0x9E3779B97F4A7C15
"""Any odd number: it has an inverse modulo 2**64."""

_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_STEP = 1 << 14  # windows at a time, so that all arrays of a step stay in the processor's cache


def window_hashes(tokens: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len(tokens) - n + 1]: the hash of each window of n >= 1 tokens; none where there are fewer than n."""
    hashes = np.empty(max(len(tokens) - n + 1, 0), np.uint64)
    for start, step in hash_steps(tokens, n):
        hashes[start : start + len(step)] = step
    return hashes


def hash_steps(tokens: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """What `window_hashes` returns, some at a time: where these windows begin, and their hashes."""
    n_windows = len(tokens) - n + 1
    if n_windows < 1:
        return
    n_step = min(max(_STEP, n), n_windows)
    up, down = powers(n_step + n - 1)
    for start in range(0, n_windows, n_step):
        terms = mix(tokens[start : start + n_step + n - 1])
        terms *= up[: len(terms)]
        sums = np.cumsum(terms, out=terms)
        hashes = sums[n - 1 :].copy()
        hashes[1:] -= sums[: len(hashes) - 1]
        hashes *= down[: len(hashes)]
        yield start, hashes


def mix(tokens: np.ndarray) -> np.ndarray:
    """uint64 [n] of any integers [n]: spread over all bits and not linear, unlike the sum that they go into."""
    values = tokens.astype(np.uint64)
    values += np.uint64(1)
    values *= _SPREAD
    values ^= values >> np.uint64(32)
    return values


def powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE**i and BASE**-i modulo 2**64 for i = 0, ..., n - 1, each uint64 [n]."""
    up, down = _powers(1 << n.bit_length())
    return up[:n], down[:n]


@cache
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    bases = (BASE, pow(BASE, -1, 2**64))
    up, down = (np.cumprod(np.full(n, base, np.uint64)) * np.uint64(pow(base, -1, 2**64)) for base in bases)
    return up, down
