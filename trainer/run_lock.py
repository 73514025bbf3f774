"""Who trains in a run's folder: one at a time, and anybody may ask who.

The kernel's lock on RUN/lock, not the file, shows that a process trains there. It ends with the process that took it,
however that dies, so nothing has to be cleaned up after a crash; and no child keeps it. It holds between the nodes of a
cluster where the file system has locks: NFS 4 has, Lustre when mounted with `-o flock`.

RUN/lock: one JSON object about the process that took it last: host, pid, job (of SLURM, or null), started (ISO time).
It is never removed: another process may be waiting for it.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from data_pipeline.locks import EXCLUSIVE, NO_LOCKS_WAY_OUT, SHARED, try_lock
from reformer.config import ConfigError
from trainer.run_files import LOCK

PATIENCE_S = 10.0
"""How long to wait for a process that is ending."""
_POLL_S = 0.1

_held: list[BinaryIO] = []
"""The locks of this process, for children to let go of."""


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the lock of `run_dir`, which is made if need be, for the length of the block.

    Raises ConfigError when another still is after PATIENCE_S, when the folder cannot be written to, or when its file
    system has no locks.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Opened without emptying it: while it is not ours, it says whose it is.
        file = (run_dir / LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={run_dir}: {error.strerror}: choose another folder") from None
    with file:
        _wait_for(file, run_dir)
        _held.append(file)
        try:
            _introduce(file, run_dir)
            yield
        finally:
            _held.remove(file)


def holder(run_dir: Path) -> str | None:
    """Who trains in `run_dir` at this moment, in words; None when nobody does. Needs no right to write there.

    Raises ConfigError when that cannot be found out.
    """
    try:
        file = (run_dir / LOCK).open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {run_dir / LOCK}: {error.strerror}") from None
    with file:
        # Shared, and given back at once: whoever wants to train meanwhile waits that long.
        return None if _try_lock(file, SHARED, run_dir) else _described(file)


def _wait_for(file: BinaryIO, run_dir: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not _try_lock(file, EXCLUSIVE, run_dir):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{run_dir} is being trained by {_described(file)}: wait for it to end, stop it, or choose another "
                "folder with run.dir=…"
            )
        time.sleep(_POLL_S)


def _try_lock(file: BinaryIO, kind: int, run_dir: Path) -> bool:
    """Whether the lock could be had."""
    try:
        return try_lock(file, kind)
    except OSError as error:
        raise ConfigError(
            f"run.dir={run_dir} is on a file system without locks ({error.strerror}), so two runs in it would not "
            f"notice each other: {NO_LOCKS_WAY_OUT}, or choose another folder with run.dir=…"
        ) from None


def _introduce(file: BinaryIO, run_dir: Path) -> None:
    """Say in the file who we are."""
    about = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        file.truncate(0)
        file.write(json.dumps(about).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {run_dir / LOCK}: {error.strerror}: make room, or choose another run.dir"
        ) from None


def _described(file: BinaryIO) -> str:
    """Who took the lock, in words. It may be writing that at this moment."""
    try:
        file.seek(0)
        about = json.loads(file.read())
        job = f", SLURM job {about['job']}" if about["job"] else ""
        return f"pid {about['pid']} on {about['host']}{job}, since {about['started']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _let_go() -> None:
    """In a forked child: the lock belongs to the open file, which it shares with its parent and may outlive it."""
    for file in _held:
        file.close()


os.register_at_fork(after_in_child=_let_go)
