"""Signals are noted instead of ending the process, at any moment, and only in the meantime."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from trainer.preemption import SIGNALS, Preemption, stopping

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
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
signal.raise_signal(signal.SIGTERM)
sys.exit(PREEMPTED if preemption.signal else 1)
"""


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    os.kill(os.getpid(), number)
    assert preemption.signal == USR1, "a process that is stopping ignores others"


def test_ctrl_c_stops_in_order_and_a_second_one_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.preemption.AGAIN_S", 0.2)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
            for _ in range(2):  # a launcher passes on what the terminal has sent already
                os.kill(os.getpid(), signal.SIGINT)
                assert preemption.signal == signal.SIGINT
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        with Preemption() as preemption:
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert preemption.signal == 0
    finally:
        signal.signal(signal.SIGINT, former)


def test_former_handlers_and_mask_come_back() -> None:
    """But not the handler of a signal that was blocked, which protects only the main thread."""
    received = []
    signal.signal(USR1, lambda number, frame: received.append(number))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        with pytest.raises(KeyError), Preemption():
            raise KeyError
        after = {number: signal.getsignal(number) for number in SIGNALS}
        assert after == handlers | {signal.SIGUSR2: signal.SIG_IGN}
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked | {signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.kill(os.getpid(), USR1)
    assert received == [USR1]


@pytest.mark.parametrize("moment", ["blocked", "ready"])
@pytest.mark.parametrize("ignored", ["", "trap '' USR1;"])
def test_a_process_that_is_signalled_ends_in_order(moment: str, ignored: str) -> None:
    """During its imports, which it protects, and later; also where a shell ignored the signal before.

    And what its launcher sends it at its end makes nothing else of it.
    """
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


def test_a_signal_before_the_first_step_is_no_usual_one() -> None:
    """SLURM would send it again, and the job come back, for ever."""
    assert stopping(signal.SIGUSR1, 7, 5) == "SIGUSR1 after step 7: stopping"
    assert stopping(signal.SIGUSR1, 5, 5).endswith(
        "not a step was made since the start: in a SLURM job, is --time above --signal?"
    )
