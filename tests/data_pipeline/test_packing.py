"""Which token goes where: every one of them exactly once."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.packing import Segments, pack

UNHURRIED = settings(deadline=None)  # a busy machine is no failure
LENGTHS = st.lists(st.integers(0, 70), max_size=40)
SEQ_LENS = st.integers(2, 40)


@st.composite
def any_packing(draw: st.DrawFn) -> tuple[list[int], int, str, int | None]:
    """Lengths, seq_len, packing and stride."""
    seq_len = draw(SEQ_LENS)
    packing = draw(st.sampled_from(["bestfit", "stream", "book"]))
    stride = draw(st.integers(1, seq_len)) if packing == "book" else None
    return draw(LENGTHS), seq_len, packing, stride


def fill(segments: Segments, seq_len: int) -> list[list[tuple[int, int] | None]]:
    """The rows, token by token: (document, place in it), or None for padding. No place is filled twice."""
    n_rows = int(segments.row.max()) + 1 if len(segments.row) else 0
    rows: list[list[tuple[int, int] | None]] = [[None] * seq_len for _ in range(n_rows)]
    for row, start, length, document, document_start in zip(*(c.tolist() for c in segments), strict=True):
        assert length > 0
        assert start >= 0
        assert start + length <= seq_len
        for i in range(length):
            assert rows[row][start + i] is None
            rows[row][start + i] = (document, document_start + i)
    return rows


def all_tokens(lengths: list[int]) -> list[tuple[int, int]]:
    return [(document, i) for document, n in enumerate(lengths) for i in range(n)]


@UNHURRIED
@given(any_packing())
def test_every_token_lands_and_rows_fill_from_the_left(case: tuple[list[int], int, str, int | None]) -> None:
    lengths, seq_len, packing, stride = case
    rows = fill(pack(np.array(lengths), seq_len, packing, stride), seq_len)
    placed = [token for row in rows for token in row if token is not None]
    if stride is None or stride == seq_len:
        assert sorted(placed) == all_tokens(lengths)  # exactly once
    else:
        assert sorted(set(placed)) == all_tokens(lengths)
    for row in rows:
        filled = [token is not None for token in row]
        assert filled[0]
        assert filled == sorted(filled, reverse=True)


@UNHURRIED
@given(any_packing())
def test_segments_are_in_order_and_reproducible(case: tuple[list[int], int, str, int | None]) -> None:
    lengths, seq_len, packing, stride = case
    segments = pack(np.array(lengths), seq_len, packing, stride)
    assert all(column.dtype == np.int64 for column in segments)
    places = list(zip(segments.row.tolist(), segments.start.tolist(), strict=True))
    assert places == sorted(places)
    for document in range(len(lengths)):  # reading rows in order meets each document's tokens in order
        starts = segments.document_start[segments.document == document]
        assert (np.diff(starts) > 0).all()
    again = pack(np.array(lengths), seq_len, packing, stride)
    assert all(np.array_equal(one, other) for one, other in zip(segments, again, strict=True))


@UNHURRIED
@given(any_packing())
def test_documents_of_no_tokens_change_nothing_else(case: tuple[list[int], int, str, int | None]) -> None:
    lengths, seq_len, packing, stride = case
    kept = [i for i, n in enumerate(lengths) if n]
    segments = pack(np.array(lengths), seq_len, packing, stride)
    without = pack(np.array([lengths[i] for i in kept]), seq_len, packing, stride)
    assert set(segments.document.tolist()) == set(kept)
    renamed = without._replace(document=np.array(kept, np.int64)[without.document])
    assert all(np.array_equal(one, other) for one, other in zip(segments, renamed, strict=True))


@UNHURRIED
@given(lengths=LENGTHS, seq_len=SEQ_LENS, data=st.data())
def test_windows_give_every_token_its_context(lengths: list[int], seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len))
    rows = fill(pack(np.array(lengths), seq_len, "book", stride), seq_len)
    context: dict[tuple[int, int], int] = {}
    for row in rows:
        tokens = [token for token in row if token is not None]
        assert len({document for document, _ in tokens}) == 1
        for place, token in enumerate(tokens):
            context[token] = max(place, context.get(token, 0))
    assert all(context[document, i] >= min(i, seq_len - stride) for document, i in context)


@UNHURRIED
@given(lengths=LENGTHS, seq_len=SEQ_LENS, data=st.data())
def test_windows_end_when_the_document_does(lengths: list[int], seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len))
    segments = pack(np.array(lengths), seq_len, "book", stride)
    for document, length in enumerate(lengths):
        mine = segments.document == document
        starts = segments.document_start[mine].tolist()
        assert starts == list(range(0, stride * len(starts), stride))
        ends = (segments.document_start + segments.length)[mine].tolist()
        assert [end == length for end in ends] == [False] * (len(ends) - 1) + [True] * bool(ends)


@UNHURRIED
@given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_stream_pads_the_last_row_only(lengths: list[int], seq_len: int) -> None:
    rows = fill(pack(np.array(lengths), seq_len, "stream"), seq_len)
    assert len(rows) == -(-sum(lengths) // seq_len)
    assert all(None not in row for row in rows[:-1])


@UNHURRIED
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_bestfit_is_best_fit(lengths: list[int], seq_len: int) -> None:
    """Against the slow, obvious twin: every leftover, longest first, goes where the least room is left."""
    rooms: list[int] = []
    for tail in sorted((n % seq_len for n in lengths if n % seq_len), reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= tail]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= tail
        else:
            rooms.append(seq_len - tail)
    rows = fill(pack(np.array(lengths), seq_len, "bestfit"), seq_len)
    n_full = sum(n // seq_len for n in lengths)
    assert all(len({token and token[0] for token in row}) == 1 and None not in row for row in rows[:n_full])
    assert sorted(row.count(None) for row in rows[n_full:]) == sorted(rooms)


def test_book_by_hand() -> None:
    segments = pack(np.array([25, 0, 10, 11]), 10, "book", 6)
    assert list(zip(*(column.tolist() for column in segments), strict=True)) == [
        (0, 0, 10, 0, 0),
        (1, 0, 10, 0, 6),
        (2, 0, 10, 0, 12),
        (3, 0, 7, 0, 18),  # 22 would start a window whose tokens were all in the last one
        (4, 0, 10, 2, 0),
        (5, 0, 10, 3, 0),
        (6, 0, 5, 3, 6),
    ]


def test_an_unknown_packing_is_an_error() -> None:
    with pytest.raises(ValueError, match="bestfit, stream or book"):
        pack(np.array([3]), 10, "best")


def test_bestfit_by_hand() -> None:
    segments = pack(np.array([25, 4, 6, 3]), 10, "bestfit")
    # two full rows of document 0; its tail of 5 shares a row with the 4 that fits best, the 6 with the 3
    assert list(zip(*(column.tolist() for column in segments), strict=True)) == [
        (0, 0, 10, 0, 0),
        (1, 0, 10, 0, 10),
        (2, 0, 6, 2, 0),
        (2, 6, 4, 1, 0),
        (3, 0, 5, 0, 20),
        (3, 5, 3, 3, 0),
    ]


def test_equal_lengths_keep_their_order() -> None:
    """A sort that is free to swap them would make stores depend on the machine."""
    segments = pack(np.tile([4, 6], 2500), 10, "bestfit")  # of two: numbers that are all equal any sort leaves
    assert segments.document[segments.length == 6].tolist() == list(range(1, 5000, 2))


def test_bestfit_wastes_little_on_novels() -> None:
    lengths = np.random.default_rng(0).integers(50_000, 500_000, 95)
    assert padding(pack(lengths, 65_536, "bestfit"), 65_536) < 0.02


@pytest.mark.parametrize("packing", ["bestfit", "stream", "book"])
@pytest.mark.parametrize(
    ("seq_len", "mean_tokens"), [(65_536, 250_000), (65_536, 300), (2**25, 2**24)], ids=["books", "tiny", "long-rows"]
)
def test_a_hundred_thousand_documents_take_a_moment(packing: str, seq_len: int, mean_tokens: int) -> None:
    spread = np.random.default_rng(0).lognormal(0, 1.5, 100_000)
    lengths = (spread * mean_tokens / spread.mean()).astype(np.int64)
    begin = time.perf_counter()
    pack(lengths, seq_len, packing)
    assert time.perf_counter() - begin < 3


def padding(segments: Segments, seq_len: int) -> float:
    return 1 - segments.length.sum() / ((segments.row[-1] + 1) * seq_len)
