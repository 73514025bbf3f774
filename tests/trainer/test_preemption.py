"""Signals are noted instead of ending the process, at any moment, and only in the meantime."""

import os
import signal
import subprocess
import sys

import pytest

from trainer.preemption import SIGNALS, Preemption

USR1 = signal.SIGUSR1
COUNTS = """
import signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
print("blocked", flush=True)
sys.stdin.readline()
from trainer.preemption import PREEMPTED, Preemption
with Preemption() as preemption:
    print("ready", flush=True)
    deadline = time.monotonic() + 20
    while not preemption.signal and time.monotonic() < deadline:
        sum(range(1000))
sys.exit(PREEMPTED if preemption.signal else 1)
"""


def test_none() -> None:
    with Preemption() as preemption:
        assert preemption.signal == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_is_noted(number: signal.Signals) -> None:
    with Preemption() as preemption:
        os.kill(os.getpid(), number)
        assert preemption.signal == number
        os.kill(os.getpid(), USR1)
        assert preemption.signal == USR1, "the last one"
    assert preemption.signal == USR1, "it stays when the handlers are gone"


def test_former_handlers_and_mask_come_back() -> None:
    received = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    former = signal.signal(USR1, lambda number, frame: received.append(number))
    try:
        with pytest.raises(KeyError), Preemption():
            os.kill(os.getpid(), USR1)
            raise KeyError
        assert received == []
        os.kill(os.getpid(), USR1)
        assert received == [USR1]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked | {signal.SIGUSR2}
    finally:
        signal.signal(USR1, former)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


@pytest.mark.parametrize("moment", ["blocked", "ready"])
@pytest.mark.parametrize("ignored", ["", "trap '' USR1;"])
def test_a_process_that_is_signalled_ends_in_order(moment: str, ignored: str) -> None:
    """During its imports, which it protects, and later; also where a shell ignored the signal before."""
    command = ["sh", "-c", f'{ignored} exec "$@"', "sh", sys.executable, "-c", COUNTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for said in ("blocked", "ready"):
            assert process.stdout.readline() == f"{said}\n"
            if said == moment:
                process.send_signal(USR1)
            if said == "blocked":
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.wait(timeout=30) == 75
