"""The permutation of training rows, and their distribution over ranks."""

import numpy as np
import pytest

from data_pipeline import order
from data_pipeline.order import permute, shares


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 16, 17, 63, 64, 65, 255, 257, 1000, 4096, 4097])
def test_it_is_a_bijection(length: int) -> None:
    for epoch in (0, 1):
        assert sorted(permute(i, length, 3, epoch) for i in range(length)) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(i, 100, seed, epoch) for i in range(100)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_huge_lengths_take_no_memory_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    feistel = order._feistel
    monkeypatch.setattr(order, "_feistel", lambda *arguments: calls.append(arguments) or feistel(*arguments))
    length = 10**12 + 39
    images = [permute(i, length, 0, 0) for i in range(1000)]
    assert len(calls) < 2 * len(images)  # its domain, 2**40, is 1.1 times the length
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


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int8])
def test_numbers_of_numpy(kind: type) -> None:
    for i in range(100):
        assert permute(kind(i), kind(100), kind(3), kind(1)) == permute(i, 100, 3, 1)
    assert shares(kind(100), kind(3), kind(1), kind(50)) == shares(100, 3, 1, 50)
    for call in (lambda: permute(1.0, 5, 0, 0), lambda: shares(8, 2.0, 0, 1)):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            call()


@pytest.mark.parametrize("index", [-1, 5])
def test_outside_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="outside a permutation of 5"):
        permute(index, 5, 0, 0)


def test_shares_are_dealt_out_in_order() -> None:
    assert [list(share) for share in shares(8, 2, rank=0, world_size=2)] == [[0, 1], [4, 5]]
    assert [list(share) for share in shares(8, 2, rank=1, world_size=2)] == [[2, 3], [6, 7]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_shares_cover_the_batch_once(micro: int, world_size: int) -> None:
    batch = 24
    parts = [shares(batch, micro, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {batch // (micro * world_size)}
    assert sorted(i for part in parts for share in part for i in share) == list(range(batch))


@pytest.mark.parametrize(("batch", "micro", "world_size"), [(8, 1, 3), (8, 3, 2), (2, 1, 4), (5, 4, 3), (1, 8, 1)])
def test_shares_cover_a_batch_that_does_not_divide(batch: int, micro: int, world_size: int) -> None:
    parts = [shares(batch, micro, rank, world_size) for rank in range(world_size)]
    assert sorted(i for part in parts for share in part for i in share) == list(range(batch))
    assert all(1 <= len(share) <= micro for part in parts for share in part)


@pytest.mark.parametrize(
    ("batch", "micro", "rank", "world_size"), [(0, 1, 0, 1), (8, 0, 0, 1), (8, -1, 0, 1), (8, 1, 2, 2), (8, 1, -1, 2)]
)
def test_shares_that_would_leave_out_samples_or_repeat_them(batch: int, micro: int, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {world_size} with a batch of {batch}"):
        shares(batch, micro, rank, world_size)
