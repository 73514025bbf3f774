"""Where the documents of a store have windows of an index, documents that go on over several rows included."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.document_tokens import Continuation, read_documents
from data_pipeline.store import Store
from data_pipeline.window_index import WindowIndex

_BATCH_TOKENS = 1 << 20  # looked up at a time


class Hits(NamedTuple):
    """Windows that were found: three int64 [n_hits]."""

    document: np.ndarray
    start: np.ndarray
    """Where in the document the window begins, BOS counted."""
    number: np.ndarray
    """Its number in the index."""


class _Piece(NamedTuple):
    """Tokens of a document from place `start` on."""

    document: int
    start: int
    tokens: np.ndarray


def search(
    index: WindowIndex,
    store: Store,
    split: str,
    what: str,
    known: np.ndarray | None = None,
    wanted: np.ndarray | None = None,
) -> Iterator[Hits]:
    """All hits in a split, a batch at a time; those of a document in order.

    `known` saves time, see `WindowIndex.find`; `what` and `wanted` are those of `read_documents`.
    """
    n = index.n
    for batch in _batches(_pieces(read_documents(store, split, what, wanted), n)):
        documents, starts, texts = zip(*batch, strict=True)
        ends = np.cumsum([len(text) for text in texts])
        places, numbers = index.find(np.concatenate(texts), known)
        piece = np.searchsorted(ends, places, side="right")
        inside = places + n <= ends[piece]  # the others begin in one piece and end in the next
        places, piece = places[inside], piece[inside]
        shift = np.array(starts) - ends + [len(text) for text in texts]
        yield Hits(np.array(documents)[piece], places + shift[piece], numbers[inside])


def _pieces(continuations: Iterable[Continuation], n: int) -> Iterator[_Piece]:
    """The same in pieces that begin with the last n - 1 tokens of the one before: each window is in exactly one.

    A piece that its document goes on after has 2 * n tokens or more, so that a token is in no more than two or three.
    """
    held: dict[int, np.ndarray] = {}  # of documents that go on, what comes before what is next
    for document, start, tokens, last in continuations:
        before = held.pop(document, tokens[:0])
        joined = np.concatenate([before, tokens]) if len(before) else tokens
        if last or len(joined) >= 2 * n:
            yield _Piece(document, start - len(before), joined)
            joined = joined[max(len(joined) - n + 1, 0) :]
        if not last:
            held[document] = joined.copy()


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.tokens)
        if size >= _BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
