"""Who holds which part of what, in plain integers; the exchange itself is in tests/distributed."""

import pytest

from reformer.sequence_part import WHOLE
from trainer.sequence_parallel import Place


@pytest.mark.parametrize(("world_size", "n_parts"), [(1, 1), (4, 1), (4, 2), (4, 4), (12, 3)])
def test_every_part_of_every_share_has_one_rank_and_neighbours_share(world_size: int, n_parts: int) -> None:
    places = [Place.of(rank, world_size, n_parts) for rank in range(world_size)]
    assert [(place.replica, place.part) for place in places] == [
        (replica, part) for replica in range(world_size // n_parts) for part in range(n_parts)
    ]
    assert {(place.n_replicas, place.n_parts) for place in places} == {(world_size // n_parts, n_parts)}


def test_rows_that_ranks_share_are_counted_once() -> None:
    assert Place.of(0, 6, n_parts=1).rows_of([1, 0, 2, 0, 0, 3]) == 6
    assert Place.of(3, 6, n_parts=2).rows_of([1, 1, 2, 0, 0, 3]) == 6


def test_a_rank_that_shares_nothing_joins_nobody() -> None:
    place = Place.of(1, 2, n_parts=1)
    assert place.joined() is place and place.sequence is WHOLE
