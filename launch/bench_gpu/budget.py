"""What of `launch/gpu_check.py` fits into the time and memory that there are, and how long a sequence is worth a try.

Plain arithmetic on seconds, GiB and lengths; nothing here knows of torch or of a GPU.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.prediction import predict

HALVINGS = 1
"""How often the gap between a length that trains and one that does not is halved."""


@dataclass
class Budget:
    """Seconds for everything, and for one measurement; GiB of the device's memory, where they are known."""

    total_s: float
    item_s: float
    memory_gib: float | None = None
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def left_s(self) -> float:
        return self.total_s - (self.clock() - self.begun)

    def objection(self, expected_s: float, reserve_s: float = 0.0) -> str | None:
        """Why a measurement that takes about so long is left out, or None."""
        if expected_s > self.item_s:
            return f"left out: about {expected_s:.0f} s expected, more than {self.item_s:.0f} s"
        return self.no_time(expected_s, reserve_s)

    def no_time(self, expected_s: float, reserve_s: float = 0.0) -> str | None:
        """The same for one that may take all the time that is left but for the reserve."""
        left_s = max(0.0, self.left_s() - reserve_s)
        return (
            f"left out: about {expected_s:.0f} s expected, {left_s:.0f} s were left" if expected_s >= left_s else None
        )

    def no_memory(self, earlier: Sequence[tuple[int, float]], seq_len: int) -> str | None:
        """The same for one whose memory, from (length, GiB) of shorter ones, is not there."""
        if self.memory_gib is None or not earlier or (gib := predict(earlier, seq_len)) <= self.memory_gib:
            return None
        return f"left out: about {gib:.0f} GiB expected, of {self.memory_gib:.0f} GiB"


def expected_call_s(earlier: Sequence[tuple[int, float]], seq_len: int) -> float:
    """Seconds of a call at seq_len, from (length, seconds) of shorter ones, the longest last.

    With the square where one alone is known; 0 where none is.
    """
    return predict(earlier, seq_len, power=2.0) if earlier else 0.0


def longest(trains: Callable[[int], bool], known: int) -> int:
    """The largest length found that trains, from one that does: doubled while it does, then bisected."""
    good, bad = known, 2 * known
    while trains(bad):
        good, bad = bad, 2 * bad
    for _ in range(HALVINGS):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if trains(middle) else (good, middle)
    return good
