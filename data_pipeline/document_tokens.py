"""The tokens of documents: of a whole split, in the order of its rows, or of a part of one document."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.bar import Bar
from data_pipeline.decode import fresh_stretches
from data_pipeline.part import StorePart
from data_pipeline.store import Store
from data_pipeline.tokenizer import token_dtype

_BATCH_TOKENS = 1 << 20  # read at a time


class Continuation(NamedTuple):
    """Tokens of a document that follow on those that came before of it; others' may have come in between."""

    document: int
    start: int
    """The place of the first of them in the document."""
    tokens: np.ndarray
    """uint16 or uint32 [n_tokens], as stored: with BOS and EOS."""
    last: bool
    """Whether the document ends with them."""


def read_documents(store: Store, split: str, what: str, wanted: np.ndarray | None = None) -> Iterator[Continuation]:
    """All tokens of the documents of a split, or of those that `wanted` bool [n_documents of the store] has.

    Each token comes once, also where windows overlap; each row is read once, or not at all if nothing in it is wanted.
    `what` says on the terminal what this is done for. Raises DataError for a split that is not there, and for a damaged
    row.
    """
    rows = store.rows_of(split)
    if wanted is not None:
        rows = np.intersect1d(rows, store.segments.row[wanted[store.segments.document]])
    with Bar(total=len(rows), desc=f"{what} {store.path.name}", unit="row") as bar:
        for part in store.parts:
            covered, lengths = np.zeros(part.stop_document, np.int64), _lengths(part)
            for batch in _batches(rows[(rows >= part.first_row) & (rows < part.stop_row)], store.seq_len):
                for row, tokens in zip(batch.tolist(), part.read_rows(batch[0], batch[-1] + 1), strict=True):
                    for document, start, stop, last in fresh_stretches(part.segments_of(row), covered, lengths):
                        if wanted is None or wanted[document]:
                            place = int(covered[document]) - (stop - start)
                            yield Continuation(document, place, tokens[start:stop], last)
                bar.update(len(batch))


def read_part(store: Store, document: int, start: int, stop: int) -> np.ndarray:
    """Tokens [start:stop] of a document, which has as many, as stored: uint16 or uint32 [stop - start]."""
    tokens = np.empty(stop - start, token_dtype(store.vocab_size))
    (part,) = (part for part in store.parts if part.first_document <= document < part.stop_document)
    for index in np.flatnonzero(part.segments.document == document):
        row, place, length, _, begin = (int(column[index]) for column in part.segments)
        first, end = max(begin, start), min(begin + length, stop)
        if first < end:
            tokens[first - start : end - start] = part.read_row(row, place + first - begin, place + end - begin)
    return tokens


def _batches(rows: np.ndarray, seq_len: int) -> Iterator[np.ndarray]:
    """Sorted rows [n] in series without gaps, short enough to be read at once."""
    at_once = max(_BATCH_TOKENS // seq_len, 1)
    for adjacent in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for start in range(0, len(adjacent), at_once):
            yield adjacent[start : start + at_once]


def _lengths(part: StorePart) -> np.ndarray:
    """int64 [stop_document]: tokens of each document of the part, as its segments say; 0 for those of other parts."""
    segments = part.segments
    lengths = np.zeros(part.stop_document, np.int64)
    lengths[segments.document] = segments.document_start + segments.length  # the last segment of each is what stays
    return lengths
