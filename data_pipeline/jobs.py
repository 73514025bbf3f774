"""Work that any number of processes share through a directory, and that survives the death of any of them.

A stage of the work is a list of numbered tasks. A task that is done has a record: a file that appears by a rename,
whole. Whoever has nothing to do takes a task that has neither a record nor a live claim, does it, and publishes its
record; when all tasks have theirs, the stage is over for everybody. Nobody leads and no messages are sent, so it is
the same in one process, in several, under MPI, under srun and as an array of independent jobs.

A claim is a file that its holder touches every few seconds; one that is not touched any more belongs to a process that
died, and is taken over. Claims only save work: a task that is done twice, even at the same time, publishes the same
bytes twice. What keeps other builds out is a lock (`membership`).
"""

import contextlib
import glob
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.locks import EXCLUSIVE, NO_LOCKS_WAY_OUT, SHARED, is_at, try_lock, wait_for_lock
from data_pipeline.staging import unwritable

BEAT_S = 5.0
"""From one touch of a claim to the next."""
EXPIRY_S = 60.0
"""A claim that was not touched for this long belongs to nobody."""
_POLL_S = (0.02, 1.0)
"""Between two looks for something to do: at first, and after a while."""
_PATIENCE_S = 3.0
"""How long processes of a build that was killed may take to disappear."""
_OWNER = "job"
"""File in the work directory with the name of the job that is or was last there."""


def record_name(task: int) -> str:
    """Name of a task's record, less its suffix."""
    return f"{task:08d}"


def done_tasks(records: Path, suffix: str) -> set[int]:
    """The numbers of the tasks that have a record in a directory."""
    with os.scandir(records) as entries:
        names = [entry.name for entry in entries]
    return {int(name[:8]) for name in names if name[8:] == suffix and name[:8].isdigit()}


def run_stage(
    records: Path,
    suffix: str,
    order: Sequence[int],
    do: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Takes part in a stage until all tasks of `order` have a record `NNNNNNNN<suffix>`, or until `stopped()`.

    `do(task)` must publish the record. Tasks are tried in the given order.
    """
    records.mkdir(exist_ok=True)
    pending = list(order)
    pause = _POLL_S[0]
    with _Claims(records) as claims:
        while pending and not stopped():
            done = done_tasks(records, suffix)
            pending = [task for task in pending if task not in done]
            worked = False
            for task in pending:
                if stopped():
                    return
                with claims.held(task) as mine:
                    if mine and not (records / (record_name(task) + suffix)).exists():
                        do(task)
                        worked = True
            if worked:
                pause = _POLL_S[0]
            elif pending:
                claims.remove_expired()
                time.sleep(pause)
                pause = min(2 * pause, _POLL_S[1])


class _Claims:
    """Claims on the tasks of a stage, beside their records; one at a time is held here, and touched by a thread."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._held: Path | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "_Claims":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def held(self, task: int) -> Iterator[bool]:
        """Whether the task was free and is now ours, for as long as the block lasts."""
        path = self._records / f"{record_name(task)}.claim"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            yield False
            return
        self._held = path
        try:
            yield True
        finally:
            self._held = None
            path.unlink(missing_ok=True)

    def remove_expired(self) -> None:
        """Frees the tasks of those who died. Times are compared as the file system gives them: clocks may differ."""
        probe = self._records / f"{uuid.uuid4().hex}.probe"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for claim in self._records.glob("*.claim"):
            with contextlib.suppress(FileNotFoundError):  # released meanwhile, or taken over by another
                if now - claim.stat().st_mtime > EXPIRY_S:
                    # Two may find it expired at once; only one of them can rename it.
                    taken = claim.rename(probe.with_suffix(".expired"))
                    taken.unlink()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            if (held := self._held) is not None:
                with contextlib.suppress(OSError):  # released meanwhile
                    os.utime(held)


@contextmanager
def membership(work: Path, job: str, what: Path, keep: Callable[[], bool]) -> Iterator[None]:
    """Take part in `job` in the directory `work` for the length of the block; `what` is its product.

    The first one of a job that comes finds nobody there, and removes the claims and leftovers of those who were
    killed. Raises DataError when another job is there, or when `work` cannot be made or written to. The last one to
    leave removes `work`, unless `keep()`.
    """
    members = _come(work, job, what)
    with members:
        try:
            yield
        finally:
            with contextlib.suppress(OSError, _Gone), _door(work):
                if not keep() and try_lock(members, EXCLUSIVE):
                    # At once: whoever comes meanwhile must find all of it, or nothing.
                    gone = work.rename(work.with_name(f"{work.name}.{uuid.uuid4().hex}.gone"))
                    shutil.rmtree(gone)


def remove_gone(work: Path) -> None:
    """Finishes what the last to leave was killed at: removing the work directory."""
    for gone in work.parent.glob(f"{glob.escape(work.name)}.*.gone"):
        shutil.rmtree(gone, ignore_errors=True)


class _Gone(Exception):
    """The last to leave removed the work directory while another came."""


def _come(work: Path, job: str, what: Path) -> BinaryIO:
    """Comes in, again where the directory was removed meanwhile. Returns the lock of a member."""
    try:
        work.parent.mkdir(parents=True, exist_ok=True)
        while True:
            _make(work)
            with contextlib.suppress(_Gone, FileNotFoundError), contextlib.ExitStack() as stack:
                members = stack.enter_context((work / "members").open("ab"))
                with _door(work):
                    _enter(work, members, job, what)
                    stack.pop_all()
                    return members
            time.sleep(_POLL_S[0])
    except OSError as error:
        raise unwritable(f"--output {what}", error) from error


def _make(work: Path) -> None:
    try:
        work.mkdir(exist_ok=True)
    except FileExistsError:
        # What was there may have been a directory that is removed by now.
        if os.path.lexists(work) and not work.is_dir():
            raise


def _enter(work: Path, members: BinaryIO, job: str, what: Path) -> None:
    owner = work / _OWNER
    deadline = time.monotonic() + _PATIENCE_S
    while not (alone := try_lock(members, EXCLUSIVE)):
        if owner.read_text() == job:
            break
        if time.monotonic() > deadline:
            raise DataError(f"{what} is being built by another process: wait for it to end, or stop it")
        time.sleep(0.05)
    if alone:
        remove_gone(work)
        for pattern in ("*.partial", "*/*.claim", "*/*.partial", "*/*.expired", "*/*.probe"):
            for leftover in work.glob(pattern):
                leftover.unlink()
        for pattern in ("*.gone", "content.*"):  # folders that were to be removed, or to get their name
            for leftover in work.glob(pattern):
                shutil.rmtree(leftover)
        forget_start(work)
        owner.write_text(job)
    # Nobody can come in between: the door is ours.
    if not try_lock(members, SHARED):
        raise DataError(f"{what} is being built by another process: wait for it to end, or stop it")


def join(work: Path) -> BinaryIO:
    """The lock of a process that works for one that is a member: as long as it lives, nobody else can begin."""
    members = (work / "members").open("ab")
    try_lock(members, SHARED)
    return members


@contextmanager
def _door(work: Path) -> Iterator[None]:
    """One process at a time comes or goes."""
    path = work / "door"
    with path.open("ab") as door:
        try:
            wait_for_lock(door)
        except OSError as error:
            raise DataError(
                f"{work.parent} is on a file system without locks ({error.strerror}): {NO_LOCKS_WAY_OUT}, or put "
                "--output elsewhere"
            ) from error
        if not is_at(path, door):  # whoever was the last to leave removed it with the rest
            raise _Gone
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time, for what must not be done twice at once: unlike a claim, never taken from the living."""
    with path.open("ab") as file:
        wait_for_lock(file)
        yield


def forget_start(work: Path) -> None:
    """Makes the stage `start` be gone through again, by a new job."""
    (work / "start" / f"{record_name(0)}.json").unlink(missing_ok=True)
