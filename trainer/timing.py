"""Where the time of the steps goes: seconds by phase, without making the device wait.

On GPUs a phase is timed by events on the device's own clock, which are looked at when they are asked for. The host runs
ahead of the device, so its clock would blame whichever phase comes to wait for it. The time of the phase "data" is then
that for which the device had nothing to do, and the phases that are within no other add up to the step. On CPUs, where
a call returns when its work is done, the host's clock says the same.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Stopwatch:
    """Seconds by phase, on one rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []  # phases that have begun, the outermost first
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is done inside; a profile (profiling.py) shows it under the same name.

        Phases may follow each other in any order and as often as they like, and a phase counts if it ends in an error.
        One within another is a part of it, and is read as "outer/inner".
        """
        with record_function(name), self._opened(name) as path:
            if self._device.type == "cuda":
                begin = self._mark()
                try:
                    yield
                finally:
                    self._pending.append((path, begin, self._mark()))
                    self._settle()
            else:
                begun = time.perf_counter()
                try:
                    yield
                finally:
                    self._seconds[path] += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last time that this was called; waits for the device to be through with them."""
        if self._pending:
            self._pending[-1][2].synchronize()
        self._settle()
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds

    @contextmanager
    def _opened(self, name: str) -> Iterator[str]:
        self._open.append(name)
        try:
            yield "/".join(self._open)
        finally:
            self._open.pop()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _settle(self) -> None:
        """Count what the device is through with, so that no more events are kept than it is behind the host."""
        while self._pending and self._pending[0][2].query():
            path, begin, end = self._pending.popleft()
            self._seconds[path] += begin.elapsed_time(end) / 1000.0
