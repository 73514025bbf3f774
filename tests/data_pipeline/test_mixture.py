"""Mixtures: as many samples of each source as its weight says, each of them once, by the position alone."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.mixture import BLOCK_SAMPLES, Mixture, block_counts


class Counted(NamedTuple):
    """A source whose samples say who they are."""

    name: str
    seq_len: int = 8

    @property
    def form(self) -> dict[str, str | int]:
        return {"seq_len": self.seq_len}

    @property
    def identity(self) -> dict[str, str | int]:
        return {"store": self.name}

    def slice_of(self, position: int, part: int, n_parts: int) -> tuple[str, int, int, int]:
        return self.name, position, part, n_parts

    def blank_of(self, position: int, part: int, n_parts: int) -> tuple[str, int, int, int]:
        return f"blank {self.name}", position, part, n_parts


def make_mixture(weights: dict[str, float], seed: int = 0) -> Mixture:
    return Mixture({name: Counted(name) for name in weights}, weights, seed)  # type: ignore[misc]


def test_sources_must_be_alike() -> None:
    sources: Any = {"a": Counted("a"), "b": Counted("b", seq_len=16)}
    with pytest.raises(DataError, match="seq_len of b is 16, and of a 8"):
        Mixture(sources, {"a": 1.0, "b": 1.0})
    assert Mixture({"a": sources["a"]}, {"a": 1.0}).form == {"seq_len": 8}


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 0.7, "b": 0.3}, {"a": 700, "b": 300}),
        ({"a": 1, "b": 1, "c": 1}, {"a": 333, "b": 333, "c": 334}),
        ({"a": 1e9, "b": 1e-9}, {"a": 999, "b": 1}),
        ({"a": 0.0126, "b": 0.9874}, {"a": 13, "b": 987}),
        ({"a": 5}, {"a": 1000}),
        ({"a": np.int64(5), "b": np.float32(5)}, {"a": 500, "b": 500}),
        ({f"s{i}": 1e-3**i for i in range(1000)}, {f"s{i}": 1 for i in range(1000)}),
    ],
)
def test_counts_are_weights_in_thousandths(weights: dict[str, float], counts: dict[str, int]) -> None:
    weights = {name: weight or 5e-324 for name, weight in weights.items()}
    found = block_counts(weights)
    assert sum(found.values()) == BLOCK_SAMPLES
    assert found == pytest.approx(counts, abs=1 if len(weights) == 3 else 0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "a mixture of 0 sources: expected 1 to 1000"),
        ({f"s{i}": 1.0 for i in range(1001)}, "a mixture of 1001 sources"),
        ({"a": 1.0, "b": 0.0}, "the weight of b in the mixture is 0.0: expected a number above 0"),
        ({"a": float("nan")}, "the weight of a in the mixture is nan"),
        ({"a": float("inf")}, "the weight of a in the mixture is inf"),
        ({"a": -1.0, "b": 2.0}, "the weight of a in the mixture is -1.0"),
    ],
)
def test_weights_that_cannot_be_followed(weights: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_mixture(weights)


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_a_source_without_a_weight_or_the_reverse(weights: dict[str, float]) -> None:
    (name,) = weights.keys() ^ {"a", "b"}
    with pytest.raises(DataError, match=f"a source and a weight of each name: one lacks {name}"):
        Mixture({"a": Counted("a"), "b": Counted("b")}, weights)  # type: ignore[dict-item]


def test_every_block_is_exact_and_each_source_comes_in_its_own_order() -> None:
    """So that no epoch of a source begins before the last one has ended."""
    mixture = make_mixture({"a": 0.7, "b": 0.299, "c": 0.001})
    samples = [mixture.slice_of(position, 0, 1)[:2] for position in range(4 * BLOCK_SAMPLES)]
    for block in range(4):
        names = Counter(name for name, _ in samples[block * BLOCK_SAMPLES : (block + 1) * BLOCK_SAMPLES])
        assert names == {"a": 700, "b": 299, "c": 1}
    for name, count in mixture.counts.items():
        assert [position for source, position in samples if source == name] == list(range(4 * count))


def test_sources_are_spread_over_a_block_and_each_block_is_in_an_order_of_its_own() -> None:
    mixture = make_mixture({"a": 1, "b": 1})
    blocks = [[mixture.slice_of(b * BLOCK_SAMPLES + i, 0, 1)[0] for i in range(BLOCK_SAMPLES)] for b in range(2)]
    assert blocks[0] != blocks[1]
    assert [make_mixture({"a": 1, "b": 1}, seed=1).slice_of(i, 0, 1)[0] for i in range(BLOCK_SAMPLES)] != blocks[0]
    for names in blocks:
        assert all(30 < names[start : start + 100].count("a") < 70 for start in range(0, BLOCK_SAMPLES, 100))


def test_any_position_is_reached_at_once() -> None:
    mixture = make_mixture({"a": 0.7, "b": 0.3})
    name, position, *_ = mixture.slice_of(10**15 + 123, 1, 4)
    block_first = 10**12 * mixture.counts[name]
    assert block_first <= position < block_first + mixture.counts[name]
    assert mixture.slice_of(10**15 + 123, 1, 4) == (name, position, 1, 4)
    assert mixture.blank_of(10**15 + 123, 1, 4) == (f"blank {name}", position, 1, 4)
    with pytest.raises(IndexError, match="position -1 is negative"):
        mixture.slice_of(-1, 0, 1)


def test_the_order_of_names_decides_and_not_that_of_the_configuration() -> None:
    one, other = make_mixture({"a": 0.7, "b": 0.3}), make_mixture({"b": 0.3, "a": 0.7})
    assert [one.slice_of(i, 0, 1) for i in range(100)] == [other.slice_of(i, 0, 1) for i in range(100)]
    assert one.identity == other.identity


def test_the_order_never_changes() -> None:
    """Runs that are resumed with a later version must see the same samples."""
    mixture = make_mixture({"a": 0.7, "b": 0.3})
    assert [mixture.place(i) for i in range(990, 1002)] == [
        (1, 298),
        (0, 692),
        (0, 693),
        (0, 694),
        (0, 695),
        (0, 696),
        (0, 697),
        (1, 299),
        (0, 698),
        (0, 699),
        (0, 700),
        (1, 300),
    ]


def test_identity_names_every_store_and_share() -> None:
    assert make_mixture({"a": 2, "b": 1}, seed=3).identity == {
        "seed": 3,
        "order": 2,
        "a.store": "a",
        "a.per_thousand": 667,
        "b.store": "b",
        "b.per_thousand": 333,
    }
