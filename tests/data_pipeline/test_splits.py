"""Held-out documents are chosen by their content alone."""

import hashlib

import pytest

from data_pipeline.config import parse_split
from data_pipeline.errors import DataError
from data_pipeline.splits import assign_splits


def digests(n: int) -> list[str]:
    return [hashlib.sha256(bytes([i // 256, i % 256])).hexdigest() for i in range(n)]


def test_shares_are_about_what_was_asked_for() -> None:
    names, notes = assign_splits(digests(10_000), {"val": 0.1, "test": 0.2})
    assert 900 < names.count("val") < 1100
    assert 1850 < names.count("test") < 2150
    assert notes == []


def test_adding_documents_moves_none() -> None:
    few, _ = assign_splits(digests(500), {"val": 0.1})
    many, _ = assign_splits(digests(1000), {"val": 0.1})
    assert many[:500] == few


def test_the_order_of_names_does_not_matter() -> None:
    one = assign_splits(digests(500), {"val": 0.1, "test": 0.2})
    assert one == assign_splits(digests(500), {"test": 0.2, "val": 0.1})


def test_an_empty_split_takes_the_lowest_hash_and_says_so() -> None:
    names, notes = assign_splits(["bb" * 32, "cc" * 32, "aa" * 32, "aa" * 32], {"val": 0.01})
    assert names == ["train", "train", "val", "val"]  # copies of one text stay together
    assert len(notes) == 1
    assert "val=0.01 caught none of 4 documents" in notes[0]


@pytest.mark.parametrize("copies", [1, 5])
def test_one_document_cannot_be_split(copies: int) -> None:
    with pytest.raises(DataError, match="needs more different documents than the 1"):
        assign_splits(["ff" * 32] * copies, {"val": 0.5})


def test_train_must_keep_something() -> None:
    with pytest.raises(DataError, match="leaves no document for train"):
        assign_splits(["00" * 32], {"val": 0.5})


def test_parse() -> None:
    assert parse_split("val=0.01, test=0.5") == {"val": 0.01, "test": 0.5}
