"""How much of the held-out documents stands in training documents too, token for token, as a part of larger ones.

A held-out token overlaps if it lies in a run of at least N = 50 tokens of its document that some training document has
too: the same ids in the same order, within the one document as within the other. This is the exact substring
duplication of Lee et al., "Deduplicating Training Data Makes Language Models Better", ACL 2022, section 4.1, between
two splits. BOS and EOS belong to no run.

A run of N or more is shared if and only if each of its windows of N tokens is. So the windows of the held-out documents
are indexed, and those of all training documents are looked up by their hashes; what is found is compared by its tokens.

Memory: 100 bytes for each held-out token, the tables of segments, and of each training document that goes on in a later
row up to 2 N of its tokens. Training rows are read once, in order, a million tokens at a time. Time grows with the
tokens alone, for repetitive data too (the runs of N in a genome, silence): equal windows are one, looked up and found
once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.document_tokens import read_documents
from data_pipeline.errors import DataError
from data_pipeline.longest_runs import Run, longest_runs
from data_pipeline.manifest import DocumentRecord
from data_pipeline.store import Store
from data_pipeline.tokenizer import token_dtype
from data_pipeline.window_index import WindowIndex
from data_pipeline.window_search import search

MIN_TOKENS = 50
"""N, as in Lee et al."""
TRAIN = "train"


class DocumentOverlap(NamedTuple):
    """How much of one held-out document overlaps."""

    name: str
    split: str
    tokens: int
    """Without BOS and EOS."""
    overlapping: int
    """Of these tokens, those that overlap."""
    longest: Run | None = None
    """Of the worst documents alone."""

    @property
    def share(self) -> float:
        """A fraction of 1; of no tokens it is 0."""
        return self.overlapping / self.tokens if self.tokens else 0.0


class HeldOut(NamedTuple):
    """The documents that are looked for, end to end."""

    documents: list[DocumentRecord]
    tokens: np.ndarray
    """uint16 or uint32 [n_tokens], with BOS and EOS."""
    start: np.ndarray
    """int64 [n_documents]: where each document begins in `tokens`, after BOS."""
    stop: np.ndarray
    """int64 [n_documents]: where it ends, before EOS."""


def find_overlap(
    store: Store, held_out: Sequence[str], train: Sequence[Store], min_tokens: int = MIN_TOKENS, n_worst: int = 10
) -> list[DocumentOverlap]:
    """The overlap of each document of the splits `held_out` of a store with the split train of the stores `train`.

    By split, in the order of `held_out`, each from the worst share on. For the first `n_worst` of each split the
    longest run is looked for, and for that the training documents which share something are read again.
    Raises DataError for min_tokens < 1, n_worst < 0, a split that is not there, is empty or is searched itself, stores
    with different tokenizers, and damaged rows.
    """
    _check(store, held_out, train, min_tokens, n_worst)
    texts = _read_held_out(store, held_out)
    n = min(min_tokens, len(texts.tokens) + 1)  # no document has runs of more
    n_windows = np.maximum(texts.stop - texts.start - n + 1, 0)
    starts = _ranges(texts.start, n_windows)
    index = WindowIndex(texts.tokens, starts, n)
    found = np.zeros(index.n_distinct, bool)
    sharing = [_search(index, one, found) for one in train]
    overlapping = _overlapping(starts[found[index.numbers]], n, len(texts.tokens))
    overlaps = _count(texts, overlapping)

    ranked = sorted(range(len(overlaps)), key=lambda i: _rank(overlaps[i], held_out))
    worst = [i for split in held_out for i in _of_split(overlaps, ranked, split)[:n_worst]]
    bounds = np.concatenate([[0], np.cumsum(n_windows)])
    runs = longest_runs(
        index,
        [texts.tokens[texts.start[i] : texts.stop[i]] for i in worst],
        [index.numbers[bounds[i] : bounds[i + 1]] for i in worst],
        found,
        list(zip(train, sharing, strict=True)),
    )
    longest = dict(zip(worst, runs, strict=True))
    return [overlaps[i]._replace(longest=longest.get(i)) for i in ranked]


def _check(store: Store, held_out: Sequence[str], train: Sequence[Store], min_tokens: int, n_worst: int) -> None:
    if min_tokens < 1:
        raise DataError(f"--min-tokens is {min_tokens}: expected 1 or more, such as {MIN_TOKENS}")
    if n_worst < 0:
        raise DataError(f"--worst is {n_worst}: expected 0 or more documents of each split")
    if not held_out:
        raise DataError(
            f"{store.path} has no split that is held out: build it with --split, --val-input or --test-input, or name "
            "one with --held-out and another store with --train"
        )
    for split in held_out:
        store.split_rows(split)
        if held_out.count(split) > 1:
            raise DataError(f"--held-out names {split!r} twice: name it once")
    for other in train:
        if TRAIN not in other.manifest.splits:
            raise DataError(f"{other.path} has no split {TRAIN!r}: name the stores that are trained on with --train")
        if not any(stop > start for start, stop in other.split_rows(TRAIN)):
            raise DataError(f"the split {TRAIN!r} of {other.path} has no rows: name another store with --train")
        if TRAIN in held_out and other.manifest.fingerprint == store.manifest.fingerprint:
            raise DataError(
                f"--held-out {TRAIN} is what is searched in {other.path}, where all of it would be found: name another "
                "split, or other stores with --train"
            )
        tokenizers = [(one.manifest.tokenizer_sha256, one.vocab_size) for one in (store, other)]
        if tokenizers[0] != tokenizers[1]:
            raise DataError(
                f"{other.path} and {store.path} have different tokenizers ({_tokenizer(other)} and "
                f"{_tokenizer(store)}), so the same text has different tokens: build one of them with the tokenizer "
                "of the other"
            )


def _tokenizer(store: Store) -> str:
    manifest = store.manifest
    return f"{manifest.tokenizer_kind} of {manifest.vocab_size:,}, sha256 {manifest.tokenizer_sha256[:8]}"


def _read_held_out(store: Store, splits: Sequence[str]) -> HeldOut:
    documents = [document for document in store.each_document() if document.split in splits]
    stop = np.cumsum([document.tokens for document in documents], dtype=np.int64)
    start = stop - np.array([document.tokens for document in documents], np.int64)
    tokens = np.empty(int(stop[-1]) if len(stop) else 0, token_dtype(store.vocab_size))
    place = dict(zip((document.id for document in documents), start.tolist(), strict=True))
    for split in splits:
        for stretch in read_documents(store, split, "read"):
            begin = place[stretch.document]
            place[stretch.document] = end = begin + len(stretch.tokens)
            tokens[begin:end] = stretch.tokens
    filled = stop > start  # a store without marks may have documents without tokens
    return HeldOut(documents, tokens, start + store.manifest.bos * filled, stop - store.manifest.eos * filled)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [sum of lengths]: for each of `starts` [n] as many numbers, from it on, as `lengths` [n] says."""
    first = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)


def _search(index: WindowIndex, store: Store, found: np.ndarray) -> np.ndarray:
    """Looks through the training documents of a store, and notes in `found` bool [n_distinct] which windows they have.

    Returns bool [n_documents of the store]: those that have any. Perhaps others too, where hashes collide.
    """
    sharing = np.zeros(store.parts[-1].stop_document, bool)
    for hits in search(index, store, TRAIN, "search", known=found) if index.n_distinct else ():
        found[hits.number] = True
        sharing[hits.document] = True
    return sharing


def _overlapping(starts: np.ndarray, n: int, n_tokens: int) -> np.ndarray:
    """bool [n_tokens]: which tokens are in one of the windows of n that begin at `starts`, each there once."""
    change = np.zeros(n_tokens + 1, np.int8)
    change[starts] += 1
    change[starts + n] -= 1
    return np.cumsum(change[:-1], dtype=np.int32) > 0


def _count(texts: HeldOut, overlapping: np.ndarray) -> list[DocumentOverlap]:
    return [
        DocumentOverlap(document.name, document.split, int(stop - start), int(overlapping[start:stop].sum()))
        for document, start, stop in zip(texts.documents, texts.start, texts.stop, strict=True)
    ]


def _rank(overlap: DocumentOverlap, splits: Sequence[str]) -> tuple[int, float, int, str]:
    """What sorts by split, and then the worst first."""
    return splits.index(overlap.split), -overlap.share, -overlap.tokens, overlap.name


def _of_split(overlaps: Sequence[DocumentOverlap], ranked: Sequence[int], split: str) -> list[int]:
    """Which of the overlaps are in a split and not nothing, in the order of `ranked`."""
    return [i for i in ranked if overlaps[i].split == split and overlaps[i].overlapping]
