"""The windows of n tokens that a text has, to be found in other texts: fast by hashes, exact by comparing tokens."""

from typing import NamedTuple

import numpy as np

from data_pipeline.rolling import hash_steps, window_hashes

_FILTER_BITS = 32
"""For each window, at least: of windows that are not in the index, 1 in 32 pass at most. With 8 it is 0.6 times as fast
(measured, 9 million windows)."""
_COMPARED_TOKENS = 1 << 20  # at a time


class WindowIndex:
    """Distinct windows of a text, numbered from 0 on.

    Built from tokens [n_tokens] and the places `starts` int64 [n_windows] where windows of n tokens begin in it. It
    takes 30 bytes a window, and about 90 while it is being built, however often windows are repeated.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, n: int) -> None:
        self.n = n
        self.numbers = np.zeros(len(starts), np.int64)
        """int64 [n_windows]: the number of the window that begins at each of `starts`; equal for equal windows."""
        self.n_distinct = 0
        self._tokens = tokens
        self._layers: list[_Layer] = []
        hashes = window_hashes(tokens, n)[starts]
        self._filter = _Filter(hashes)
        left = np.arange(len(starts))
        while len(left):  # once, unless different windows have the same hash: the first of them has it in this layer
            keys, first, key = np.unique(hashes[left], return_index=True, return_inverse=True)
            layer = _Layer(keys, starts[left[first]], self.n_distinct)
            same = equal_windows(tokens, starts[left], tokens, layer.starts[key], n)
            self.numbers[left[same]] = layer.first_number + key[same]
            self.n_distinct += len(keys)
            self._layers.append(layer)
            left = left[~same]

    def find(self, text: np.ndarray, known: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where windows of the index begin in another text, and their numbers: two int64 [n_found].

        `text` has the dtype of the index's tokens. `known` bool [n_distinct] saves time: tokens are not compared for
        windows that it has, so what is found of these, and only of these, may be another window with the same hash.
        """
        at, hashes = self._candidates(text)
        found: list[tuple[np.ndarray, np.ndarray]] = [(at[:0], at[:0])]
        for layer in self._layers:
            key = np.minimum(np.searchsorted(layer.keys, hashes), len(layer.keys) - 1)
            hit = layer.keys[key] == hashes
            at, hashes, key = at[hit], hashes[hit], key[hit]
            number = layer.first_number + key
            taken = np.zeros(len(at), bool) if known is None else known[number]
            same = np.zeros(len(at), bool)
            same[~taken] = equal_windows(text, at[~taken], self._tokens, layer.starts[key[~taken]], self.n)
            found.append((at[same | taken], number[same | taken]))
            at, hashes = at[~same], hashes[~same]
        places, numbers = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(places, kind="stable") if len(self._layers) > 1 else slice(None)
        return places[order], numbers[order]

    def _candidates(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where windows begin in a text that the filter lets through, int64 [n], and their hashes, uint64 [n]."""
        places, passed = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for start, hashes in hash_steps(text, self.n):
            at = np.flatnonzero(self._filter.may_hold(hashes))
            places.append(at + start)
            passed.append(hashes[at])
        return np.concatenate(places), np.concatenate(passed)


class _Layer(NamedTuple):
    """Distinct windows of which no two have the same hash."""

    keys: np.ndarray
    """uint64 [n_keys]: the hashes, sorted."""
    starts: np.ndarray
    """int64 [n_keys]: where the window of each hash begins."""
    first_number: int
    """The number of the first of them; those of the others follow."""


class _Filter:
    """A bit for each range of hashes: whether there is one in it. 4 to 8 bytes a window, few enough for a cache."""

    def __init__(self, hashes: np.ndarray) -> None:
        n_bits = max(len(hashes) * _FILTER_BITS - 1, 8).bit_length()
        self._shift = np.uint64(64 - n_bits)
        self._bits = np.zeros(1 << (n_bits - 3), np.uint8)
        slots = (hashes >> self._shift).view(np.int64)
        np.bitwise_or.at(self._bits, slots >> 3, np.left_shift(1, slots & 7).astype(np.uint8))

    def may_hold(self, hashes: np.ndarray) -> np.ndarray:
        """uint8 [n]: 0 for hashes uint64 [n] that are certainly not there, 1 for the others."""
        slots = (hashes >> self._shift).view(np.int64)
        bits = self._bits[slots >> 3]
        bits >>= (slots & 7).astype(np.uint8)
        bits &= 1
        return bits


def equal_windows(a: np.ndarray, at_a: np.ndarray, b: np.ndarray, at_b: np.ndarray, n: int) -> np.ndarray:
    """bool [m]: whether the n tokens of `a` from each place of `at_a` [m] on are those of `b` from `at_b` [m] on."""
    if not len(at_a):
        return np.zeros(0, bool)
    of_a, of_b = (np.lib.stride_tricks.sliding_window_view(tokens, n) for tokens in (a, b))
    equal = np.ones(len(at_a), bool)
    at_once = max(_COMPARED_TOKENS // n, 1)
    for start in range(0, len(at_a), at_once):
        part = slice(start, start + at_once)
        equal[part] = (of_a[at_a[part]] == of_b[at_b[part]]).all(axis=1)
    return equal


def longest_common_run(a: np.ndarray, b: np.ndarray, at_least: int) -> int:
    """Tokens in the longest run that the texts `a` and `b` share, if these are `at_least` or more (>= 1); else 0."""
    longest = 0
    while (places := _common_window(a, b, max(at_least, longest + 1))) is not None:
        on_a, on_b = a[places[0] :], b[places[1] :]
        n = min(len(on_a), len(on_b))
        differs = np.flatnonzero(on_a[:n] != on_b[:n])
        longest = int(differs[0]) if len(differs) else n
    return longest


def _common_window(a: np.ndarray, b: np.ndarray, n: int) -> tuple[int, int] | None:
    """Where in `a` and in `b` the same n tokens begin, of one such pair of places."""
    hashes = window_hashes(a, n)
    order = np.argsort(hashes, kind="stable")
    of_b = window_hashes(b, n)
    first, stop = (np.searchsorted(hashes[order], of_b, side) for side in ("left", "right"))
    for at_b in np.flatnonzero(first < stop).tolist():
        for at_a in order[first[at_b] : stop[at_b]].tolist():
            if np.array_equal(a[at_a : at_a + n], b[at_b : at_b + n]):
                return at_a, at_b
    return None
