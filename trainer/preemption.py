"""A signal that asks the run to stop for now: noted when it arrives, acted upon when a step has ended.

The handler only sets a number. Whoever owns the loop agrees on it with the other ranks, saves and exits with PREEMPTED,
which launch/slurm's files take for "requeue me". A script whose imports take seconds can block the signals before them
(`signal.pthread_sigmask`): they wait, and are delivered when a Preemption is entered.
"""

import os
import signal
import sys
import time
from types import FrameType
from typing import Self

PREEMPTED = 75
"""The exit code of a run that was asked to stop, has saved a checkpoint and wants to go on: EX_TEMPFAIL of C."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""What clusters send before they take a node away, or before the time of a job is over."""
AGAIN_S = 2.0
"""Seconds after which a second Ctrl-C counts: launchers pass on what the terminal sends to all, so one comes twice."""


class Preemption:
    """Between enter and exit, notes the signals of SIGNALS instead of ending the process. In the main thread only.

    Ctrl-C (SIGINT) is noted as they are, where it would raise KeyboardInterrupt; a second one does that.

    Afterwards a process that was to stop ignores them: when its first rank has ended with PREEMPTED, a launcher sends
    SIGTERM to the others, of which one would die that is about to end with PREEMPTED as well. So does a process that
    blocked them before: the former handlers would end it by way of a thread in which they are not blocked.
    """

    def __init__(self) -> None:
        self.signal = 0
        """The number of the last such signal that this process received, 0 for none; of one that another rank received,
        once it has been agreed upon."""

    def __enter__(self) -> Self:
        self._interrupted_s: float | None = None
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        # A shell has jobs in the background ignore it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            # None stands for a handler that was not set by Python, which Python cannot set again.
            former = signal.SIG_DFL if handler is None else handler
            is_ignored = number in self._blocked or (self.signal and number in SIGNALS)
            signal.signal(number, signal.SIG_IGN if is_ignored else former)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_s is None:
            self._interrupted_s = now
            if sys.stderr.isatty():  # not by print, which may be what was interrupted
                os.write(sys.stderr.fileno(), b"\nstopping after this step, with a checkpoint; Ctrl-C again: at once\n")
        elif now - self._interrupted_s > AGAIN_S:
            signal.default_int_handler(number, frame)
        self._note(number, frame)


def stopping(number: int, done: int, first_step: int) -> str:
    """What is said where a signal ends a run that began at first_step, after `done` steps."""
    early = (
        "" if done > first_step else "; not a step was made since the start: in a SLURM job, is --time above --signal?"
    )
    return f"{signal.Signals(number).name} after step {done}: stopping{early}"
