"""A rank that is slow, here because it is stopped again and again from outside, is named."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from trainer.rank_faults import SLOW


def slowed(run_dir: Path, rank: int, over: threading.Event) -> None:
    """From the first report to the fourth, let a rank run for a fifth of the time only."""
    reports = run_dir / "metrics.jsonl"
    while not (reports.exists() and reports.stat().st_size):
        if over.wait(0.05):
            return
    pid = json.loads((run_dir / "ranks" / f"rank_{rank:05d}.json").read_text(encoding="utf-8"))["pid"]
    with suppress(ProcessLookupError):
        while not over.is_set() and len(reports.read_text().splitlines()) < 4:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.04)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)


@pytest.mark.parametrize("n_parts", [1, 2])
def test_a_slow_rank_is_named(train, tmp_path: Path, n_parts: int) -> None:
    """Also where the other one shares its sequences, and waits for it in every attention."""
    over = threading.Event()
    thread = threading.Thread(target=slowed, args=(tmp_path / "run", 1, over))
    thread.start()
    try:
        options = (
            "run.steps=25",
            "run.log_every=5",
            "run.eval_every=0",
            "run.save_every=0",
            f"run.sequence_parallel={n_parts}",
        )
        run = train(2, tmp_path / "run", *options)
    finally:
        over.set()
        thread.join()
    assert run.code == 0, run.errors
    reported = zip(run.column("speed/slowest_rank"), run.column("speed/slowest_over_median"), strict=True)
    assert any(rank == 1 and ratio > SLOW for rank, ratio in reported)
    assert f"rank 1 on {socket.gethostname()} is slow: busy for " in run.output
