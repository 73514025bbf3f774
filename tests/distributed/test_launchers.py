"""One run that goes from launcher to launcher, each of them real: asked to stop, it saves, and the next continues it.

Whoever is sent the signal (the launcher, all its processes, a single rank) and whatever exit code arrives, the run
becomes the one that nothing stopped, to the bit: all of them start two ranks.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from bench.process import AS_ROOT
from distributed.conftest import LAUNCHER_VARIABLES, ROOT, Train, script
from side_by_side import free_port

SETTINGS = ("run.steps=60", "run.save_every=1000", "run.eval_every=30", "run.sample_tokens=0", "run.ablation_rows=0")
BIN = Path(sys.executable).parent
TAGS = ("train/loss", "train/lr", "train/grad_norm", "eval/loss")
BLOCKED = ("env", "--block-signal=USR1,USR2,TERM")
"""How docs/slurm.md has DeepSpeed's launcher started where signals go to all processes: it would die of them before its
ranks have saved. The ranks unblock them."""
PREEMPTED = 75
Curves = dict[str, list[tuple[int, float]]]


def curves(run_dir: Path) -> Curves:
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return {tag: [(line["step"], line[tag]) for line in lines if tag in line] for tag in TAGS}


@pytest.fixture(scope="module")
def undisturbed(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Curves:
    result = train(2, tmp_path_factory.mktemp("undisturbed") / "run", *SETTINGS)
    assert result.code == 0, result.errors
    found = curves(result.dir)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 61))
    return found


class Launched:
    """A launcher and all the processes that it started, in a group of their own."""

    def __init__(self, run_dir: Path, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.run_dir, self.log, self.process = run_dir, log, process

    def said(self) -> str:
        return self.log.read_text()

    def wait_for_steps(self, number: int) -> None:
        """Until so many more steps than now are reported."""
        aim = len(curves(self.run_dir)["train/loss"]) + number
        deadline = time.monotonic() + 120
        while len(curves(self.run_dir)["train/loss"]) < aim:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def rank(self, number: int) -> psutil.Process:
        return psutil.Process(json.loads((self.run_dir / f"ranks/rank_{number:05d}.json").read_text())["pid"])

    def ends(self) -> int:
        """With which exit code."""
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None


@contextmanager
def launched(folder: Path, name: str, *command: str | Path) -> Iterator[Launched]:
    """Starts a command that works on `folder / "run"`; afterwards nothing is left of it."""
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environ |= {"OMP_NUM_THREADS": "1", **AS_ROOT}
    log = folder / f"{name}.log"
    words = [str(word) for word in command]
    with log.open("wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True)
    try:
        yield Launched(folder / "run", log, process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def deepspeed(*options: str | Path) -> list[str | Path]:
    return [BIN / "deepspeed", "--master_port", str(free_port()), *options]


@pytest.fixture
def command(config: Path, tmp_path: Path) -> list[str]:
    """launch/train.py, on the run in tmp_path."""
    return [*script(config, tmp_path / "run"), *SETTINGS]


def test_from_launcher_to_launcher(tmp_path: Path, command: list[str], undisturbed: Curves) -> None:
    stops_under_deepspeed(tmp_path, command)
    stops_under_a_launcher_on_each_of_two_hosts(tmp_path, command)
    stops_under_mpirun_and_torchrun(tmp_path, command)
    with launched(tmp_path, "rest", *deepspeed("--num_accelerators", "2"), *command) as run:
        assert run.ends() == 0, run.said()
    assert curves(tmp_path / "run") == undisturbed


def stops_under_deepspeed(folder: Path, command: list[str]) -> None:
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    two = deepspeed("--num_accelerators", "2")
    by_hostfile = deepspeed("--hostfile", hostfile, "--no_ssh_check", "--master_addr", "127.0.0.1")
    with launched(folder, "all", *BLOCKED, *two, *command) as run:
        run.wait_for_steps(3)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.ends() == PREEMPTED, run.said()
        assert "2 processes, 2 on this node at 127.0.0.1" in run.said()
        assert "SIGTERM after step" in run.said()
    with launched(folder, "rank", *by_hostfile, *command) as run:
        run.wait_for_steps(3)
        run.rank(1).send_signal(signal.SIGUSR2)
        assert run.ends() == PREEMPTED, run.said()
    with launched(folder, "launcher", *two, *command) as run:
        run.wait_for_steps(3)
        [launcher] = psutil.Process(run.process.pid).children()
        launcher.terminate()
        assert run.ends() == 1, "it passes TERM on and waits, but says 1, whatever they say"
        assert "SIGTERM after step" in run.said()


def stops_under_a_launcher_on_each_of_two_hosts(folder: Path, command: list[str]) -> None:
    """As `deepspeed --hostfile` has them started by ssh; both are here."""
    hostfile = folder / "hostfile"
    hostfile.write_text("alpha slots=1\nbeta slots=1\n")
    place = deepspeed("--hostfile", hostfile, "--no_ssh", "--master_addr", "127.0.0.1")
    alpha, beta = ([*place, "--node_rank", str(rank), *command] for rank in range(2))
    with launched(folder, "alpha", *alpha) as first, launched(folder, "beta", *beta) as second:
        first.wait_for_steps(3)
        second.rank(1).terminate()
        assert first.ends() == PREEMPTED, first.said()
        assert second.ends() == PREEMPTED, second.said()
        assert "2 processes, 1 on this node" in first.said()


def stops_under_mpirun_and_torchrun(folder: Path, command: list[str]) -> None:
    """mpirun passes USR1 and USR2 on, and the code; torchrun passes TERM on, and says 1 whatever the ranks say."""
    mpirun = [BIN / "mpirun", "--oversubscribe", "-n", "2", sys.executable, *command]
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node=2", *command]
    for signalled in (signal.SIGUSR1, signal.SIGUSR2):
        with launched(folder, f"mpirun{signalled}", *mpirun) as run:
            run.wait_for_steps(3)
            run.process.send_signal(signalled)
            assert run.ends() == PREEMPTED, run.said()
            assert "mpirun: 2 processes, 2 on this node" in run.said()
    with launched(folder, "torchrun", *torchrun) as run:
        run.wait_for_steps(3)
        run.process.terminate()
        assert run.ends() == 1, run.said()
        assert "SIGTERM after step" in run.said()
