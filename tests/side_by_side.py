"""What processes of pytest that run side by side each have for themselves."""

import os
from collections.abc import Sequence
from typing import TypeVar
from unittest import mock

from trainer import distributed

T = TypeVar("T")

_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_SHARES = 16
"""More processes share them, which seldom matters: what is chosen is chosen at random."""


def own_share(numbers: Sequence[T]) -> Sequence[T]:
    """Of numbers to choose from, those of this process."""
    n_each = len(numbers) // _SHARES
    first = _PROCESS % _SHARES * n_each
    return numbers[first : first + n_each]


def free_port() -> int:
    """As a run chooses one, but that no other process of pytest does between its choice and the listening on it."""
    with mock.patch.object(distributed, "_PORTS", own_share(distributed._PORTS)):
        return distributed.free_port()
