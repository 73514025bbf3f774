"""A rank that hangs while others train with it: it is named, all write their stacks, and the run goes on later."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed.conftest import torchrun_variables
from side_by_side import free_port

from trainer.run_lock import holder
from trainer.watchdog import HUNG

ROOT = Path(__file__).parents[2]
STEPS = 10
SETTINGS = (f"run.steps={STEPS}", "run.eval_every=0", "run.save_every=5", "run.watchdog_factor=3")
PATIENCE = "run.watchdog_min_s=6"


@contextmanager
def processes(commands: list[list[str]], variables: list[dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Commands side by side, each with its variables; none is left at the end."""
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    started = [
        subprocess.Popen(command, env=environ | own, **pipes)  # type: ignore[call-overload]
        for command, own in zip(commands, variables, strict=True)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def command(config: Path, run_dir: Path) -> list[str]:
    return ["tests/distributed/hanging_train.py", "--config", str(config), f"run.dir={run_dir}", *SETTINGS, PATIENCE]


def ranks(config: Path, run_dir: Path, hang: str, *settings: str) -> tuple[list[list[str]], list[dict[str, str]]]:
    """Two ranks that nothing started, so that nothing ends them either."""
    each = [own | {"HANG": hang} for own in torchrun_variables(2)]
    return [[sys.executable, *command(config, run_dir), *settings]] * 2, each


def stacks(run_dir: Path, rank: int) -> str:
    return (run_dir / "stacks" / f"rank_{rank:05d}.txt").read_text()


def status(run_dir: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "launch/status.py", str(run_dir), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_rank_that_waits_for_its_data_under_deepspeeds_launcher(train, config: Path, tmp_path: Path) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    start = [*launcher, "--master_port", str(free_port()), *command(config, tmp_path)]
    with processes([start], [{"HANG": "data 1"}]) as (process,):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == HUNG
    assert "error: the run hangs: the others wait for rank 1 (pid" in errors
    assert "in 'data' of step" in errors and "data_pipeline/loader.py" in errors
    assert f"the same command goes on from {tmp_path / 'checkpoints' / 'step_00000005'}" in errors
    assert "Traceback" not in errors
    assert "in stuck" in stacks(tmp_path, 1)  # in a thread that reads ahead
    assert "all_reduce" in stacks(tmp_path, 0)

    found = status(tmp_path)
    assert (found["state"], found["checkpoint"]["step"], found["furthest_back"]) == ("hung", 5, [1])

    again = train(2, tmp_path, *SETTINGS)
    assert again.code == 0, again.errors
    assert [line["step"] for line in again.metrics] == list(range(1, STEPS + 1))
    found = status(tmp_path)
    assert (found["state"], found["step"], found["hang"]) == ("finished", STEPS, None)


def test_a_rank_that_does_not_come_to_a_collective(config: Path, tmp_path: Path) -> None:
    """Both are in the same phase of the same step, one of them in a collective of ZeRO-3."""
    gathered = [f"deepspeed.zero_optimization.{name}" for name in ("stage=3", "stage3_param_persistence_threshold=0")]
    with processes(*ranks(config, tmp_path, "forward 1", *gathered)) as started:
        errors = "".join(process.communicate(timeout=200)[1] for process in started)
        assert [process.returncode for process in started] == [HUNG, HUNG]
    assert errors.count("error: the run hangs: the others wait for rank 1 (pid") == 1
    states = [json.loads((tmp_path / "ranks" / f"rank_{rank:05d}.json").read_text()) for rank in range(2)]
    assert [state["phase"] for state in states] == ["forward", "forward"]
    assert [state["waiting"] for state in states] == [True, False]
    assert "in stuck" in stacks(tmp_path, 1)


def test_a_rank_that_is_stopped_with_its_watchdog(config: Path, tmp_path: Path) -> None:
    """It is rank 0, so the folder stays taken until it is gone."""
    with processes(*ranks(config, tmp_path, "stop 0")) as (stopped, other):
        _, errors = other.communicate(timeout=200)
        assert other.returncode == HUNG
        assert f"error: the run hangs: the others wait for rank 0 (pid {stopped.pid} on " in errors
        assert "rank 0 gives no sign of life" in errors
        assert "Thread" in stacks(tmp_path, 1)
        assert f"pid {stopped.pid} " in (holder(tmp_path) or "")
        stopped.kill()
        stopped.wait()
        assert holder(tmp_path) is None
