"""The longest run of tokens that a held-out document shares with any one training document, and which that is.

If each window in a stretch of a training document is somewhere in the held-out document, the stretch is as long as any
run in it that they share, or longer, as its windows may come from several places. So stretches are compared with the
held-out document from the longest on, until none is left that is longer than the longest run, or that run is as long as
any of windows that are somewhere in training documents. Mostly one stretch is compared.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.document_tokens import read_part
from data_pipeline.store import Store
from data_pipeline.window_index import WindowIndex, longest_common_run
from data_pipeline.window_search import search

_PART_TOKENS = 1 << 20  # of a stretch that are compared at a time, at least


class Run(NamedTuple):
    """A run of tokens that a training document has too."""

    tokens: int
    document: str
    """The name of a training document that has it; others may."""
    store: str
    """The path of its store."""


class Stretches(NamedTuple):
    """Tokens [start:stop] of documents: four int64 [n_stretches]."""

    store: np.ndarray
    """Which of several stores the document is in."""
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def longest_runs(
    index: WindowIndex,
    texts: Sequence[np.ndarray],
    numbers: Sequence[np.ndarray],
    is_found: np.ndarray,
    train: Sequence[tuple[Store, np.ndarray]],
) -> list[Run | None]:
    """The longest run of each of some texts; None for one that shares none of index.n tokens or more.

    `texts` are the tokens of each, and `numbers` int64 the numbers in the index of the windows at its places 0, 1, ….
    `is_found` bool [index.n_distinct] says which windows training documents have.
    `train` are stores, with bool [n_documents of the store] that says which documents of their split train to look at.
    """
    stretches = _find_stretches(index, numbers, train)
    stores = [store for store, _ in train]
    most = [_most(index.n, is_found[one]) for one in numbers]
    return [_longest(index, *one, stores) for one in zip(texts, numbers, stretches, most, strict=True)]


def _most(n: int, is_found: np.ndarray) -> int:
    """Tokens of a text in the longest run of windows of n all of which are found; is_found: bool [n_windows]."""
    return max((stop - start + n - 1 for start, stop in _runs(np.flatnonzero(is_found))), default=0)


def _find_stretches(
    index: WindowIndex, numbers: Sequence[np.ndarray], train: Sequence[tuple[Store, np.ndarray]]
) -> list[Stretches]:
    """For each text the stretches of training documents all of whose windows it has."""
    found = [[Stretches(*np.zeros((4, 0), np.int64))] for _ in numbers]
    of_text = [np.unique(one) for one in numbers]
    for place, (store, wanted) in enumerate(train if numbers else ()):
        for hits in search(index, store, "train", "longest runs", wanted=wanted):
            for stretches, members in zip(found, of_text, strict=True):
                mine = members[np.searchsorted(members[:-1], hits.number)] == hits.number
                document, start = hits.document[mine], hits.start[mine]
                windows = Stretches(np.full_like(document, place), document, start, start + index.n)
                stretches.append(_joined(windows, index.n))
    return [_joined(_sorted(Stretches(*map(np.concatenate, zip(*one, strict=True)))), index.n) for one in found]


def _joined(stretches: Stretches, n: int) -> Stretches:
    """Those whose windows of n tokens follow on each other without a gap become one, if they are next to each other."""
    store, document, start, stop = stretches
    joins = (np.diff(store) == 0) & (np.diff(document) == 0) & (stop[:-1] - n + 1 == start[1:])
    first, last = np.ones(len(store), bool), np.ones(len(store), bool)
    first[1:], last[:-1] = ~joins, ~joins
    return Stretches(store[first], document[first], start[first], stop[last])


def _sorted(stretches: Stretches) -> Stretches:
    order = np.lexsort((stretches.start, stretches.document, stretches.store))
    return Stretches(*(column[order] for column in stretches))


def _longest(
    index: WindowIndex, text: np.ndarray, numbers: np.ndarray, stretches: Stretches, most: int, stores: Sequence[Store]
) -> Run | None:
    """The longest run of one text in any of its stretches; none has more than `most` tokens."""
    longest, found_in = index.n - 1, None
    lengths = stretches.stop - stretches.start
    for i in np.argsort(-lengths, kind="stable").tolist():
        if min(lengths[i], most) <= longest:
            break
        store, document, start, stop = (int(column[i]) for column in stretches)
        # In parts such that any run is within one of them: memory does not grow with the stretch.
        for begin in range(start, stop, max(most, _PART_TOKENS)):
            if longest == most:
                break
            part = read_part(stores[store], document, begin, min(begin + max(most, _PART_TOKENS) + most, stop))
            if found := _longest_shared(index, text, numbers, part, longest + 1):
                longest, found_in = found, (store, document)
    if found_in is None:
        return None
    store, document = found_in
    return Run(longest, stores[store].names_of([document])[document], str(stores[store].path))


def _longest_shared(index: WindowIndex, text: np.ndarray, numbers: np.ndarray, other: np.ndarray, at_least: int) -> int:
    """`longest_common_run` of the text and another, for which only those parts of the text matter that are in both."""
    is_shared = np.zeros(index.n_distinct, bool)
    is_shared[index.find(other)[1]] = True
    places = np.flatnonzero(is_shared[numbers])
    longest = 0
    for start, stop in _runs(places):
        piece = text[start : stop + index.n - 1]
        longest = max(longest, longest_common_run(piece, other, max(at_least, longest + 1)))
    return longest


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of numbers that follow on each other among sorted ones, int64 [n]."""
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
