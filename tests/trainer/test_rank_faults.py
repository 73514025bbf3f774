"""Which rank is slow, and which is gone."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import rank_faults, ranks
from trainer.rank_faults import lost_ranks, slow_ranks


def test_the_slowest_rank_is_named_with_its_host() -> None:
    slowest = slow_ranks([1.0, 1.1, 3.3, 0.9], ["n0", "n0", "n1", "n1"])
    assert (slowest.rank, slowest.over_median) == (2, 3.3)
    assert slowest.line == "rank 2 on n1 is slow: busy for 3.3 s where the median is 1 s (3.3 times)"


def test_of_two_ranks_the_other_is_the_median() -> None:
    assert slow_ranks([2.0, 1.0], ["a", "b"]).over_median == 2.0


@pytest.mark.parametrize("busy_s", [[1.0, 1.2, 1.4], [1.0], [0.0, 0.0], [0.0, 0.0, 1.0], [0.01, 0.09, 0.01]])
def test_no_rank_is_slow(busy_s: list[float]) -> None:
    slowest = slow_ranks(busy_s, ["a", "b", "c"])
    assert slowest.line is None and slowest.over_median >= 1


def said(folder: Path, rank: int, pid: int, **values: object) -> None:
    """Leave what a rank says about itself."""
    (folder / "ranks").mkdir(exist_ok=True)
    at = {"turn": 3, "phase": "backward", "in_phase_s": 0.1, "limit_s": None, "at": "engine.py:1 in backward"}
    state = {"rank": rank, "world_size": 3, "host": socket.gethostname(), "pid": pid, "step": 7, "waiting": True}
    ranks.write_state(folder, ranks.RankState(**{**state, **at, "time": 0.0, **values}))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="whether a process is no more is asked of Linux")
@pytest.mark.parametrize("reaped", [False, True])
def test_a_rank_that_was_killed_is_named(tmp_path: Path, reaped: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        dead.kill()
        if reaped:
            dead.wait()
        said(tmp_path, 0, alive.pid)
        said(tmp_path, 1, dead.pid)
        said(tmp_path, 2, 1, host="another", ended="finished")
        (tmp_path / "checkpoints/step_00000006").mkdir(parents=True)
        assert lost_ranks(tmp_path, 3) == (
            f"rank 1 (pid {dead.pid} on {socket.gethostname()}) was killed, perhaps for want of memory; last seen "
            "in 'backward' of step 7, at engine.py:1 in backward\n"
            f"the same command goes on from {tmp_path / 'checkpoints/step_00000006'}"
        )
        alive.communicate()
        dead.communicate()


def test_a_rank_that_failed_is_named_with_its_error_wherever_it_is(tmp_path: Path) -> None:
    said(tmp_path, 2, 1, host="another", ended="failed: OutOfMemoryError: of 8 GiB")
    assert lost_ranks(tmp_path, 3).startswith(
        "rank 2 (pid 1 on another) has ended (failed: OutOfMemoryError: of 8 GiB); last seen in 'backward' of step 7"
    )
    assert lost_ranks(tmp_path, 3).endswith("\nthere is no checkpoint yet to go on from")


def test_no_rank_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_faults, "LOOK_S", 0.1)
    assert lost_ranks(tmp_path, 3) == ""
    said(tmp_path, 1, 2**30, host="another")  # of which nothing is known here
    assert lost_ranks(tmp_path, 3) == ""
