"""Which token of which document goes to which place of which row: pure functions on integers.

Two ways, both of which keep every token exactly once:

    bestfit   Each document fills rows of its own; what is left at its end shares rows with other leftovers. Novels
              lose 0.3-1.3% of the space to padding, and no training row joins unrelated texts without need.
    stream    All documents end to end, cut every `seq_len` tokens. No padding but in the last row; documents cross
              rows wherever the cut falls.
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


def pack(lengths: Array, seq_len: int, packing: str) -> Segments:
    """Lays documents of `lengths` [n_documents] tokens into rows 0, 1, ... of `seq_len` tokens.

    Every row that is used starts at place 0 and is filled without gaps; what is left at its end is padding.
    """
    lengths = np.asarray(lengths, np.int64)
    return {"bestfit": _pack_bestfit, "stream": _pack_stream}[packing](lengths, seq_len)


def _pack_stream(lengths: Array, seq_len: int) -> Segments:
    document_offsets = np.concatenate(([0], np.cumsum(lengths)))
    total = document_offsets[-1]
    cuts = np.union1d(document_offsets, np.arange(0, total, seq_len))
    begin, length = cuts[:-1], np.diff(cuts)
    document = np.searchsorted(document_offsets, begin, side="right") - 1
    return Segments(begin // seq_len, begin % seq_len, length, document, begin - document_offsets[document])


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
