"""Which token of which document goes to which place of which row: pure functions on integers.

Three ways, none of which loses a token. The first two place each of them exactly once:

    bestfit   Each document fills rows of its own; what is left at its end shares rows with other leftovers. Novels
              lose 0.3-1.3% of the space to padding, and no training row joins unrelated texts without need.
    stream    All documents end to end, cut every `seq_len` tokens. No padding but in the last row; documents cross
              rows wherever the cut falls.
    book      Windows of `seq_len` tokens of one document, one starting every `stride` tokens until its end is reached;
              each is a row of its own, the last one padded. No row ever holds two documents.

With a stride below `seq_len` the windows of "book" overlap: a token is placed, and trained on, up to
ceil(seq_len / stride) times, and for that the store grows by about seq_len / stride. What it buys is context: each
token of a document stands at least once behind `seq_len - stride` tokens of it, or behind all there are before it,
instead of at the start of a row. A document of up to `seq_len` tokens is one window, whatever the stride.
"""

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Segments(NamedTuple):
    """Stretches of documents in rows, sorted by (row, start): five int64 arrays of one length."""

    row: Array
    start: Array
    """First token's place in the row."""
    length: Array
    document: Array
    document_start: Array
    """First token's place in the document."""


def pack(lengths: Array, seq_len: int, packing: str, stride: int | None = None) -> Segments:
    """Lays documents of `lengths` [n_documents] tokens into rows 0, 1, ... of `seq_len` tokens.

    `stride`, of 1 to `seq_len` tokens, is for "book" alone; None is `seq_len`, windows that touch. Every row that is
    used starts at place 0 and is filled without gaps; what is left at its end is padding. A document of no tokens has
    no segment.
    """
    lengths = np.asarray(lengths, np.int64)
    match packing:
        case "bestfit":
            return _pack_bestfit(lengths, seq_len)
        case "stream":
            return _pack_stream(lengths, seq_len)
        case "book":
            return _pack_book(lengths, seq_len, stride or seq_len)
    raise ValueError(f"packing is {packing!r}: expected bestfit, stream or book")


def _pack_book(lengths: Array, seq_len: int, stride: int) -> Segments:
    beyond_first = np.maximum(lengths - seq_len, 0)
    n_windows = np.where(lengths > 0, 1 + -(-beyond_first // stride), 0)
    document = np.repeat(np.arange(len(lengths)), n_windows)
    row = np.arange(len(document))
    first_row = np.cumsum(n_windows) - n_windows
    document_start = (row - first_row[document]) * stride
    length = np.minimum(lengths[document] - document_start, seq_len)
    return Segments(row, np.zeros_like(row), length, document, document_start)


def _pack_stream(lengths: Array, seq_len: int) -> Segments:
    end = np.cumsum(lengths)
    begin = end - lengths
    first_row = begin // seq_len
    n_rows = np.where(lengths > 0, (end - 1) // seq_len - first_row + 1, 0)
    document = np.repeat(np.arange(len(lengths)), n_rows)
    row = np.arange(len(document)) + (first_row - np.cumsum(n_rows) + n_rows)[document]
    segment_begin = np.maximum(row * seq_len, begin[document])
    segment_end = np.minimum((row + 1) * seq_len, end[document])
    return Segments(
        row, segment_begin - row * seq_len, segment_end - segment_begin, document, segment_begin - begin[document]
    )


def _pack_bestfit(lengths: Array, seq_len: int) -> Segments:
    n_full, tail = np.divmod(lengths, seq_len)
    full_document = np.repeat(np.arange(len(lengths)), n_full)
    full_row = np.arange(len(full_document))
    first_row = np.cumsum(n_full) - n_full
    full = Segments(
        row=full_row,
        start=np.zeros_like(full_row),
        length=np.full_like(full_row, seq_len),
        document=full_document,
        document_start=(full_row - first_row[full_document]) * seq_len,
    )

    tail_document = np.flatnonzero(tail)
    tail_document = tail_document[np.argsort(-tail[tail_document], kind="stable")]  # longest first
    row, start = _best_fit(tail[tail_document].tolist(), seq_len)
    tails = Segments(
        row=np.array(row, np.int64) + len(full_row),
        start=np.array(start, np.int64),
        length=tail[tail_document],
        document=tail_document,
        document_start=(n_full * seq_len)[tail_document],
    )
    by_place = np.lexsort((tails.start, tails.row))
    return Segments(*(np.concatenate((a, b[by_place])) for a, b in zip(full, tails, strict=True)))


def _best_fit(lengths: list[int], seq_len: int) -> tuple[list[int], list[int]]:
    """Puts each length, in the given order, into the row with the least room that still holds it.

    Rows with the same room are interchangeable, so the search runs over distinct amounts of room: at most `seq_len`
    of them, kept sorted. Returns the row and the start of each.
    """
    rooms: list[int] = []
    rows_with_room: dict[int, list[int]] = {}
    rows: list[int] = []
    starts: list[int] = []
    n_rows = 0
    for length in lengths:
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = n_rows, seq_len
            n_rows += 1
        else:
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        rows.append(row)
        starts.append(seq_len - room)
        left = room - length
        if left in rows_with_room:
            rows_with_room[left].append(row)
        elif left:
            rooms.insert(bisect_left(rooms, left), left)
            rows_with_room[left] = [row]
    return rows, starts
