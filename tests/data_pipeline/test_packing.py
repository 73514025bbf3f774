"""Which token goes where: every one of them exactly once."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import Segments, pack

LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=40)


@given(lengths=LENGTHS, seq_len=st.integers(2, 40), packing=st.sampled_from(["bestfit", "stream"]))
def test_every_token_lands_exactly_once(lengths: list[int], seq_len: int, packing: str) -> None:
    segments = pack(np.array(lengths), seq_len, packing)
    n_rows = segments.row[-1] + 1
    rows = [[None] * seq_len for _ in range(n_rows)]
    for row, start, length, document, document_start in zip(*segments, strict=True):
        assert length > 0
        assert start + length <= seq_len
        for i in range(length):
            assert rows[row][start + i] is None
            rows[row][start + i] = (document, document_start + i)
    placed = [token for row in rows for token in row if token is not None]
    assert sorted(placed) == [(document, i) for document, n in enumerate(lengths) for i in range(n)]
    for row in rows:  # filled from the left, never empty
        filled = [token is not None for token in row]
        assert filled[0]
        assert filled == sorted(filled, reverse=True)


@given(lengths=LENGTHS, seq_len=st.integers(2, 40), packing=st.sampled_from(["bestfit", "stream"]))
def test_segments_are_in_order_and_reproducible(lengths: list[int], seq_len: int, packing: str) -> None:
    segments = pack(np.array(lengths), seq_len, packing)
    places = list(zip(segments.row.tolist(), segments.start.tolist(), strict=True))
    assert places == sorted(places)
    for document in range(len(lengths)):  # reading rows in order meets each document's tokens in order
        starts = segments.document_start[segments.document == document]
        assert (np.diff(starts) > 0).all()
    again = pack(np.array(lengths), seq_len, packing)
    assert all(np.array_equal(one, other) for one, other in zip(segments, again, strict=True))


@given(lengths=LENGTHS, seq_len=st.integers(2, 40))
def test_stream_pads_the_last_row_only(lengths: list[int], seq_len: int) -> None:
    assert pack(np.array(lengths), seq_len, "stream").row[-1] + 1 == -(-sum(lengths) // seq_len)


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
    segments = pack(np.full(5000, 6), 10, "bestfit")
    assert segments.document.tolist() == list(range(5000))


def test_bestfit_wastes_little_on_novels() -> None:
    lengths = np.random.default_rng(0).integers(50_000, 500_000, 95)
    assert padding(pack(lengths, 65_536, "bestfit"), 65_536) < 0.02


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_a_hundred_thousand_documents_take_seconds(packing: str) -> None:
    lengths = np.random.default_rng(0).lognormal(9, 2, 100_000).astype(int) + 2
    begin = time.perf_counter()
    pack(lengths, 65_536, packing)
    assert time.perf_counter() - begin < 10


def padding(segments: Segments, seq_len: int) -> float:
    return 1 - segments.length.sum() / ((segments.row[-1] + 1) * seq_len)
