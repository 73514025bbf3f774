"""Held-out documents are chosen by their content alone."""

import hashlib
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import parse_split
from data_pipeline.errors import DataError
from data_pipeline.splits import assign_splits

UNHURRIED = settings(deadline=None)  # a busy machine is no failure


def digests(n: int) -> np.ndarray:
    return stack(hashlib.sha256(bytes([i // 256, i % 256])).hexdigest() for i in range(n))


def stack(hexes: Iterable[str]) -> np.ndarray:
    return np.stack([np.frombuffer(bytes.fromhex(text), np.uint8) for text in hexes])


def test_shares_are_about_what_was_asked_for() -> None:
    codes, names, notes = assign_splits(digests(10_000), {"val": 0.1, "test": 0.2})
    assert names == ["train", "test", "val"]
    assert 900 < (codes == names.index("val")).sum() < 1100
    assert 1850 < (codes == names.index("test")).sum() < 2150
    assert notes == []


@UNHURRIED
@given(
    n=st.integers(0, 300), fractions=st.lists(st.floats(0.01, 0.3), min_size=1, max_size=3), seed=st.integers(0, 2**32)
)
def test_the_slow_obvious_way_agrees(n: int, fractions: list[float], seed: int) -> None:
    split = dict(zip(["val", "test", "dev"], fractions, strict=False))
    content = np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)
    codes, names, _ = assign_splits(content, split, fill_empty=False)
    expected = []
    for digest in content:
        point = int(digest.tobytes().hex()[:16], 16) / 2**64
        for name in sorted(split):
            point -= split[name]
            if point < 0:
                expected.append(name)
                break
        else:
            expected.append("train")
    assert [names[code] for code in codes] == expected


def test_a_split_that_is_added_moves_the_others_unless_its_name_comes_last() -> None:
    """As docs/data.md says. The layout cannot be another: stores that have been built are appended to by it."""
    before, _, _ = assign_splits(digests(1000), {"val": 0.1})
    last, names, _ = assign_splits(digests(1000), {"val": 0.1, "val_2": 0.1})
    assert np.array_equal(last == names.index("val"), before == 1)
    first, names, _ = assign_splits(digests(1000), {"val": 0.1, "test": 0.1})
    assert np.array_equal(first == names.index("test"), before == 1)
    assert not before[first == names.index("val")].any()


@pytest.mark.parametrize("fill_empty", [True, False])
def test_adding_documents_moves_none(fill_empty: bool) -> None:
    few, _, _ = assign_splits(digests(500), {"val": 0.1, "test": 0.05}, fill_empty)
    many, _, _ = assign_splits(digests(1000), {"val": 0.1, "test": 0.05}, fill_empty)
    assert np.array_equal(many[:500], few)


def test_one_by_one_is_as_all_at_once() -> None:
    """A document's split may not depend on what else is built: that is what parts appended to a store rely on."""
    content = digests(200)
    alone = [assign_splits(content[i : i + 1], {"val": 0.3}, fill_empty=False)[0][0] for i in range(200)]
    assert assign_splits(content, {"val": 0.3}, fill_empty=False)[0].tolist() == alone


def test_the_only_move_is_back_from_an_empty_split() -> None:
    few, names, notes = assign_splits(digests(20), {"val": 0.001})
    assert len(notes) == 1
    many, _, notes = assign_splits(digests(5000), {"val": 0.001})
    assert notes == []
    moved = np.flatnonzero(many[:20] != few)
    assert [names[code] for code in few[moved]] == ["val"]
    assert [names[code] for code in many[moved]] == ["train"]


def test_the_order_of_names_does_not_matter() -> None:
    one, names, _ = assign_splits(digests(500), {"val": 0.1, "test": 0.2})
    other, same_names, _ = assign_splits(digests(500), {"test": 0.2, "val": 0.1})
    assert names == same_names
    assert np.array_equal(one, other)


def test_an_empty_split_takes_the_lowest_hash_and_says_so() -> None:
    content = stack(["bb" * 32, "cc" * 24 + "00" * 8, "aa" * 31 + "01", "aa" * 31 + "00", "aa" * 31 + "00"])
    codes, names, notes = assign_splits(content, {"val": 0.01})
    assert [names[code] for code in codes] == ["train"] * 3 + ["val"] * 2  # copies of one text stay together
    assert len(notes) == 1
    assert "val=0.01 caught none of 5 documents" in notes[0]


def test_documents_added_to_a_store_may_miss_a_split() -> None:
    codes, names, notes = assign_splits(stack(["bb" * 32]), {"val": 0.01}, fill_empty=False)
    assert (codes.tolist(), names, notes) == ([0], ["train", "val"], [])
    codes, _, _ = assign_splits(stack(["00" * 32]), {"val": 0.01}, fill_empty=False)
    assert codes.tolist() == [1]


@pytest.mark.parametrize("copies", [1, 5])
def test_one_document_cannot_be_split(copies: int) -> None:
    with pytest.raises(DataError, match="needs more different documents than the 1 there are"):
        assign_splits(stack(["ff" * 32] * copies), {"val": 0.5})
    with pytest.raises(DataError, match=r"val=0.5 needs more different documents than the 1 there are"):
        assign_splits(stack(["00" * 32] * copies), {"val": 0.5})


def test_there_must_be_more_documents_than_splits() -> None:
    split = {"val": 0.5, "test": 0.25}
    with pytest.raises(DataError, match=r"val=0.5,test=0.25 needs more different documents than the 2 there are"):
        assign_splits(stack(["00" * 32, "11" * 32]), split)
    codes, names, _ = assign_splits(stack(["00" * 32, "fe" * 32, "ff" * 32]), split)
    assert [names[code] for code in codes] == ["test", "val", "train"]


def test_no_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="needs more different documents than the 0 there are"):
        assign_splits(np.zeros((0, 32), np.uint8), {"val": 0.5})


def test_train_must_keep_something() -> None:
    with pytest.raises(DataError, match="leaves no document for train"):
        assign_splits(stack(["00" * 32, "11" * 32]), {"val": 0.5})


def test_a_million_documents_take_a_moment() -> None:
    content = np.random.default_rng(0).integers(0, 256, (1_000_000, 32), np.uint8)
    begin = time.perf_counter()
    assign_splits(content, {"val": 0.01, "test": 0.01})
    assert time.perf_counter() - begin < 3


def test_parse() -> None:
    assert parse_split("val=0.01, test=0.5") == {"val": 0.01, "test": 0.5}
