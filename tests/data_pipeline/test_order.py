"""The permutation of training rows."""

import numpy as np
import pytest

from data_pipeline.order import permute


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 16, 17, 63, 64, 65, 255, 257, 1000, 4096, 4097])
def test_it_is_a_bijection(length: int) -> None:
    for epoch in (0, 1):
        assert sorted(permute(i, length, 3, epoch) for i in range(length)) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(i, 100, seed, epoch) for i in range(100)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_huge_lengths_take_no_memory() -> None:
    length = 10**12 + 39
    images = [permute(i, length, 0, 0) for i in range(1000)]
    assert len(set(images)) == 1000
    assert all(0 <= image < length for image in images)
    assert 0.4 < np.mean(images) / length < 0.6


def test_every_place_is_equally_likely() -> None:
    length, trials = 5, 2000
    counts = np.zeros((length, length))
    for seed in range(trials):
        for i in range(length):
            counts[i, permute(i, length, seed, 0)] += 1
    expected = trials / length
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 16 degrees of freedom: p = 0.0001


def test_the_order_never_changes() -> None:
    """Runs that are resumed with a later version must see the same samples."""
    assert [permute(i, 10, 0, 0) for i in range(10)] == [8, 5, 2, 7, 1, 0, 3, 6, 4, 9]


@pytest.mark.parametrize("index", [-1, 5])
def test_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="outside a permutation of 5"):
        permute(index, 5, 0, 0)
