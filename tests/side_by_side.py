"""What processes of pytest that run side by side each have for themselves."""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_SHARES = 16
"""More processes share them, which seldom matters: what is chosen is chosen at random."""


def own_share(numbers: Sequence[T]) -> Sequence[T]:
    """Of numbers to choose from, those of this process."""
    n_each = len(numbers) // _SHARES
    first = _PROCESS % _SHARES * n_each
    return numbers[first : first + n_each]
