"""The watchdog of one process: what it writes, what it takes for a hang, and what it must never take down."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer import ranks, watchdog
from trainer.distributed import COLLECTIVE_TIMEOUT, Launch
from trainer.ranks import RankState, state_path
from trainer.run_files import LOCK
from trainer.watchdog import HUNG, Watchdog

ALONE = Launch("no launcher")
Body = Callable[[Watchdog], object]
STATE = RankState(1, 2, "n1", 100, 7, 3, "forward", 1.0, 30.0, "trainer/loop.py:12 in step", True, 1e9)


class Child:
    """A forked process, which has everything loaded: a few steps under a watchdog, and what `body` does then."""

    def __init__(self, run_dir: Path, body: Body, factor: float = 5, min_s: float = 2, launch: Launch = ALONE) -> None:
        self._log = run_dir.with_name("stderr.txt")
        arguments = (run_dir, body, factor, min_s, launch)
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def _run(self, run_dir: Path, body: Body, factor: float, min_s: float, launch: Launch) -> None:
        with self._log.open("w") as log:
            sys.stderr = log
            with Watchdog(run_dir, launch, factor, min_s) as watching:
                for step in range(50):
                    watching.mark(step, "data")
                    watching.mark(step, "forward")
                    time.sleep(0.01)
                watching.mark(60, "between")
                body(watching)

    def end(self) -> tuple[int | None, str]:
        """The exit code and what was written to stderr."""
        self.process.join(30)
        self.process.kill()
        self.process.join()
        return self.process.exitcode, self._log.read_text()


def stay(phase: str, seconds: float) -> Body:
    """Spend some time in a phase of step 60."""

    def body(watching: Watchdog) -> None:
        watching.mark(60, phase)
        time.sleep(seconds)

    return body


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def state(run_dir: Path, rank: int = 0) -> RankState:
    found = ranks.parse_state(state_path(run_dir, rank).read_bytes())
    assert found is not None
    return found


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_hang_ends_with_its_place_and_the_stacks_of_all_threads(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step_00000012").mkdir(parents=True)

    def hang(watching: Watchdog) -> None:
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
        stay("forward", 60)(watching)

    child = Child(run_dir, hang, factor=0.1)
    code, errors = child.end()
    assert code == HUNG
    assert f"error: the run hangs: rank 0 (pid {child.pid} on " in errors
    assert "(at most 2 s) in 'forward' of step 60, at" in errors
    assert f"the same command goes on from {run_dir / 'checkpoints' / 'step_00000012'}" in errors
    stacks = (run_dir / "stacks" / "rank_00000.txt").read_text()
    assert "in hang" in stacks and stacks.count("Thread 0x") >= 3 and f"pid {child.pid}" in stacks
    assert state(run_dir).stacks_written and state(run_dir).ended == "failed: ended by the watchdog"
    about = json.loads((run_dir / "ranks" / "hang.json").read_text())
    assert about["pid"] == child.pid and "in 'forward' of step 60" in about["verdict"]

    assert Child(run_dir, stay("forward", 0)).end() == (0, "")  # the same command again: all is well
    assert state(run_dir).ended == "finished" and not state(run_dir).stacks_written
    assert not (run_dir / "ranks" / "hang.json").exists()
    assert (run_dir / "stacks" / "rank_00000.txt").read_text() == stacks  # kept


@pytest.mark.parametrize(
    ("phase", "seconds", "options"),
    [
        ("forward", 3.5, {"factor": 1000}),  # a thousand times 10 ms is more
        ("forward", 2.5, {"min_s": 5}),
        ("evaluate", 3.5, {}),  # the first of its kind
        ("forward", 3.5, {"factor": 0}),
    ],
)
def test_what_is_no_hang(run_dir: Path, phase: str, seconds: float, options: dict[str, Any]) -> None:
    assert Child(run_dir, stay(phase, seconds), **options).end() == (0, "")
    assert state(run_dir).ended == "finished"


def test_an_earlier_hang_that_rank_0_removes_later_is_none(run_dir: Path) -> None:
    (run_dir / "ranks").mkdir(parents=True)
    alarm = run_dir / "ranks" / "hang.json"
    alarm.write_text('{"verdict": "the run hangs"}')

    def body(_: Watchdog) -> None:
        time.sleep(1)
        alarm.unlink()
        time.sleep(1)

    assert Child(run_dir, body, launch=Launch("x", rank=1, world_size=2)).end() == (0, "")


def test_a_hang_that_another_rank_noticed_ends_this_one(run_dir: Path) -> None:
    def body(_: Watchdog) -> None:
        (run_dir / "ranks" / "hang.json").write_text('{"verdict": "the run hangs"}')
        time.sleep(60)

    assert Child(run_dir, body, launch=Launch("x", rank=1, world_size=2)).end() == (HUNG, "")
    assert "in body" in (run_dir / "stacks" / "rank_00001.txt").read_text()
    assert state(run_dir, 1).stacks_written and state(run_dir, 1).ended == "failed: ended by the watchdog"


def test_a_run_that_was_suspended_has_not_hung(run_dir: Path) -> None:
    def body(watching: Watchdog) -> None:
        watching.mark(60, "forward")
        for _ in range(10):  # one long sleep would be over when the process goes on
            time.sleep(0.1)

    child = Child(run_dir, body, min_s=5)
    wait_for(lambda: state_path(run_dir, 0).exists() and state(run_dir).step == 60)
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(7)
    os.kill(child.pid, signal.SIGCONT)
    assert child.end() == (0, "")


def test_nor_has_one_that_was_suspended_while_the_watchdog_looked(run_dir: Path) -> None:
    """Between its clock and its judgement, which a busy machine makes long: a slow write in their place."""

    def body(watching: Watchdog) -> None:
        write = watching._write

        def slow() -> None:
            watching._write = write
            time.sleep(4)
            write()

        watching.mark(60, "forward")
        watching._write = slow
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.1)

    assert Child(run_dir, body, min_s=3).end() == (0, "")


@pytest.mark.parametrize("never", [False, True])
def test_where_nothing_can_be_written_the_run_goes_on(run_dir: Path, never: bool) -> None:
    """A folder that is gone and one that never was; said once, however often it is tried."""
    if never:
        run_dir.write_text("a file in its place")

    def body(watching: Watchdog) -> None:
        if not never:
            run_dir.rename(run_dir.with_name("elsewhere"))
        time.sleep(1)

    code, errors = Child(run_dir, body).end()
    assert code == 0
    assert errors.count("\n") == 1 and errors.startswith("note: rank 0 cannot say how it is: ")


def test_a_hang_ends_though_nothing_can_be_written(run_dir: Path) -> None:
    def body(watching: Watchdog) -> None:
        run_dir.rename(run_dir.with_name("elsewhere"))
        stay("forward", 60)(watching)

    code, errors = Child(run_dir, body, factor=0.1).end()
    assert code == HUNG
    assert "error: the run hangs" in errors and "(at most 2 s) in 'forward'" in errors


def test_no_time_in_a_phase_is_below_0(tmp_path: Path) -> None:
    """Where time that began before the phase is taken out of the clock."""
    with Watchdog(tmp_path, ALONE, factor=4.0, min_s=60) as watching:
        watching.mark(1, "forward")
        watching._paused_s += 100
        assert watching._state().in_phase_s == 0


def test_what_a_rank_says_while_it_runs(tmp_path: Path) -> None:
    with Watchdog(tmp_path, Launch("x", rank=1, world_size=3), factor=4.0, min_s=0.1) as watching:
        for step in (4, 5):
            watching.mark(step, "data")
            watching.mark(step, "forward")
            time.sleep(0.2)
        watching.mark(5, "forward")
        wait_for(lambda: state(tmp_path, 1).turn == 2)
        found = state(tmp_path, 1)
        assert (found.rank, found.world_size, found.pid, found.step) == (1, 3, os.getpid(), 5)
        assert found.phase == "forward" and 0.8 <= (found.limit_s or 0) < 2
        assert abs(found.time - time.time()) < 5 and 0 <= found.in_phase_s < 5
        assert "waiting" not in found.at and not found.waiting and found.ended is None
        wait_for(lambda: state(tmp_path, 1).time > found.time)
        watching.mark(5, "save")
        wait_for(lambda: state(tmp_path, 1).phase == "save")
        assert state(tmp_path, 1).limit_s == COLLECTIVE_TIMEOUT.total_seconds()
    assert state(tmp_path, 1).ended == "finished"
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_without_a_factor_there_is_no_limit(tmp_path: Path) -> None:
    with Watchdog(tmp_path, ALONE, factor=0.0, min_s=0.1):
        pass
    assert state(tmp_path).limit_s is None


def test_how_it_ended(tmp_path: Path) -> None:
    with Watchdog(tmp_path, ALONE, 20.0, 300.0) as watching:
        watching.outcome = "preempted"
    assert state(tmp_path).ended == "preempted"
    with pytest.raises(ZeroDivisionError), Watchdog(tmp_path, ALONE, 20.0, 300.0):
        print(1 / 0)
    assert state(tmp_path).ended == "failed: ZeroDivisionError: division by zero"
    assert state(tmp_path).at.endswith("in test_how_it_ended"), "not where the watchdog wrote it"


def test_rank_0_removes_what_was_said_by_ranks_that_there_are_no_more(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for rank in range(4):
        state_path(tmp_path, rank).write_text("{}")
    with Watchdog(tmp_path, Launch("x", rank=1, world_size=2), 20.0, 300.0):
        assert state_path(tmp_path, 3).exists()
    with Watchdog(tmp_path, Launch("x", rank=0, world_size=2), 20.0, 300.0):
        assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["rank_00000.json", "rank_00001.json"]


def test_a_mark_costs_microseconds(tmp_path: Path) -> None:
    with Watchdog(tmp_path, ALONE, 20.0, 300.0) as watching:
        begun = time.perf_counter()
        for step in range(100_000):
            watching.mark(step, "data")
        assert (time.perf_counter() - begun) / 100_000 < 20e-6  # measured: 0.6; the machine may be busy


class Neighbour:
    """Another rank's file, and what is made of it at the times of our clock that the test says."""

    def __init__(self, run_dir: Path) -> None:
        (run_dir / "ranks").mkdir()
        (run_dir / LOCK).touch()
        self.run_dir = run_dir
        self.write(time=1e9)
        self.listener = watchdog._Listener(run_dir, 1)

    def write(self, **changes: object) -> None:
        ranks.write_state(self.run_dir, replace(STATE, **changes))  # type: ignore[arg-type]

    def silent_s(self, now_s: float, excused: bool = False, begun: bool = False) -> float:
        return self.listener.silent_s(now_s, excused, begun)


@pytest.fixture
def neighbour(tmp_path: Path) -> Neighbour:
    return Neighbour(tmp_path)


def test_a_file_that_never_changed_may_be_of_an_earlier_process(neighbour: Neighbour) -> None:
    assert neighbour.silent_s(1000.0) == 0
    assert neighbour.silent_s(2000.0) == 0


def test_a_rank_that_stopped_before_its_second_word_is_missed(neighbour: Neighbour) -> None:
    """It was there when the run began, since all ranks begin together."""
    assert neighbour.silent_s(1000.0) == 0
    assert neighbour.silent_s(1003.0, begun=True) == 0
    assert neighbour.silent_s(1010.0, begun=True) == 7
    neighbour.write(time=5e8)
    assert neighbour.silent_s(1011.0, begun=True) == 0


def test_a_rank_that_cannot_write_is_not_missed_for_what_a_killed_one_left(neighbour: Neighbour) -> None:
    """Its file is older than the hold on the folder."""
    path = state_path(neighbour.run_dir, 1)
    os.utime(path, ns=(path.stat().st_atime_ns, (neighbour.run_dir / LOCK).stat().st_mtime_ns - 1))
    assert neighbour.silent_s(1000.0, begun=True) == 0
    assert neighbour.silent_s(2000.0, begun=True) == 0


def test_silence_is_counted_from_the_last_change_whatever_time_the_file_says(neighbour: Neighbour) -> None:
    neighbour.write(time=5e8)  # a clock that is years behind, and was set back
    assert neighbour.silent_s(1000.0) == 0
    assert neighbour.silent_s(1007.0) == 7
    neighbour.write(time=4e8)
    assert neighbour.silent_s(1010.0) == 0
    assert neighbour.silent_s(1400.0) == 390


def test_who_has_ended_may_be_silent(neighbour: Neighbour) -> None:
    neighbour.write(time=2e9)
    assert neighbour.silent_s(1000.0) == 0
    neighbour.write(ended="finished")
    assert neighbour.silent_s(1001.0) == 0
    assert neighbour.silent_s(9000.0) == 0


def test_who_cannot_write_or_read_holds_nothing_against_others(neighbour: Neighbour) -> None:
    neighbour.write(time=2e9)
    assert neighbour.silent_s(1000.0) == 0
    assert neighbour.silent_s(1100.0, excused=True) == 0
    assert neighbour.silent_s(1110.0) == 10
    state_path(neighbour.run_dir, 1).unlink()
    assert neighbour.silent_s(1120.0) == 0
    assert neighbour.silent_s(1200.0) == 0
