"""Who trains in a folder: one process, for as long as it lives, and anybody may ask."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from reformer.config import ConfigError
from trainer import run_lock
from trainer.run_files import LOCK
from trainer.run_lock import hold, holder

HOLD = """
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from trainer.run_lock import hold

with hold(Path(sys.argv[1])):
    {children}
    print("held", flush=True)
    time.sleep(60)
"""
CHILDREN = """
    spawned = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    forked = fork.Process(target=lambda: (begun.set(), time.sleep(60)))
    forked.start()
    begun.wait()
    print(spawned.pid, forked.pid)
"""


@contextmanager
def other_process(run_dir: Path, children: str = "", **environ: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that holds the lock, and what it printed before it said so."""
    command = [sys.executable, "-c", HOLD.format(children=children), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environ) as process:
        assert process.stdout is not None
        printed = ""
        while (line := process.stdout.readline()) != "held\n":
            assert line, "it ended"
            printed += line
        try:
            yield process, printed
        finally:
            process.kill()


def test_one_at_a_time_and_the_other_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.3)
    with other_process(tmp_path, SLURM_JOB_ID="4711") as (process, _):
        named = f"pid {process.pid} on {socket.gethostname()}, SLURM job 4711, since 20"
        with pytest.raises(ConfigError, match=f"is being trained by {named}.*: wait .* run.dir=…"), hold(tmp_path):
            pass
        found = holder(tmp_path)
        assert found is not None and found.startswith(named)
        assert holder(tmp_path) == found  # asking takes nothing away


def test_a_folder_that_nobody_trains_in(tmp_path: Path) -> None:
    assert holder(tmp_path / "nothing") is None
    with hold(tmp_path / "new" / "run"):
        assert f"pid {os.getpid()} on " in (holder(tmp_path / "new" / "run") or "")
    assert holder(tmp_path / "new" / "run") is None
    (tmp_path / "new" / "run" / LOCK).write_text(json.dumps({"host": "an earlier one"} | dict.fromkeys("abcdef", 1)))
    with hold(tmp_path / "new" / "run"):
        assert f"pid {os.getpid()} on " in (holder(tmp_path / "new" / "run") or "")


def test_one_who_asks_is_not_taken_for_one_who_trains(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    with (tmp_path / LOCK).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert holder(tmp_path) is None


def test_since_when_is_told_in_a_time_that_is_the_same_everywhere(tmp_path: Path) -> None:
    with hold(tmp_path):
        started = datetime.fromisoformat(json.loads((tmp_path / LOCK).read_text())["started"])
    assert started.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - started) < timedelta(minutes=1)


def test_it_ends_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold(tmp_path):
        raise RuntimeError
    assert holder(tmp_path) is None


def test_who_comes_waits_for_the_one_who_is_leaving(tmp_path: Path) -> None:
    with other_process(tmp_path) as (process, _):
        begun = time.monotonic()
        threading.Timer(0.5, process.terminate).start()
        with hold(tmp_path):
            assert time.monotonic() - begun > 0.3


def test_it_dies_with_its_process_and_children_do_not_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_S", 1.0)
    with other_process(tmp_path, CHILDREN) as (process, printed):
        children = [int(pid) for pid in printed.split()]
        try:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert holder(tmp_path) is None
            with hold(tmp_path):
                for pid in children:
                    os.kill(pid, 0)  # they are still there
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def test_a_child_that_is_forked_and_ends_takes_nothing_along(tmp_path: Path) -> None:
    with hold(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert holder(tmp_path) is not None


@pytest.mark.parametrize("content", ["", '{"host": "n1", "pi', '{"host": "n1"}', "[]", "null"])
def test_a_holder_that_has_not_introduced_itself_yet(tmp_path: Path, content: str) -> None:
    with (tmp_path / LOCK).open("w") as file:
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder(tmp_path) == "another process"


def test_without_locks_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"without locks \(No locks available\).*-o flock"), hold(tmp_path):
        pass
    with pytest.raises(ConfigError, match="without locks"):
        holder(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write to run\.dir=.*file/run: Not a directory"):
        hold(tmp_path / "file" / "run").__enter__()


def test_a_lock_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).symlink_to("/dev/full")
    monkeypatch.setattr(run_lock, "_try_lock", lambda *_: True)
    with pytest.raises(ConfigError, match=r"cannot write .*lock"), hold(tmp_path):
        pass
    assert not run_lock._held
