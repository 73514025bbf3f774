"""Nothing half-written is ever taken for whole.

Output is written beside its final place, in `.NAME.partial`, and appears under its name by one `os.rename` at the
very end. Whatever is under its name is therefore complete; whatever a killed run leaves behind is recognised by its
name and removed by the next run. A lock inside keeps two builders of one output apart.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


def partial_path(output: Path) -> Path:
    """Where `output` is written before it is complete: in the same folder, so that a rename is one step."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes `output` when the block ends well, and is removed when it fails.

    Raises DataError when another process is writing the same output, or when `output` exists by the end.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(output)
    with _locked(partial, output):
        leftovers = [path for path in partial.iterdir() if path.name != LOCK_NAME]
        if leftovers:
            logger.info("removing %s, left by a run that was killed", partial)
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            (partial / LOCK_NAME).unlink()
            _publish(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Yields a path to write that becomes `output` when the block ends well, and is removed when it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(output)
    try:
        yield partial
        partial.replace(output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Holds the lock in `partial`, making the directory if need be. The kernel frees it if we are killed."""
    partial.mkdir(exist_ok=True)
    path = partial / LOCK_NAME
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output} is being written by another process: wait for it to end") from None
        if not _is_same_file(lock, path):
            raise DataError(f"{output} was just written by another process: run the command again")
        yield


def _is_same_file(lock: IO[bytes], path: Path) -> bool:
    """False when the holder before us removed the lock, with its output, while we waited to take it."""
    return path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def _publish(partial: Path, output: Path) -> None:
    try:
        partial.rename(output)  # succeeds on a free name or an empty directory, and on nothing else
    except OSError as error:
        raise DataError(f"cannot give {output} its name, it is taken: remove it and run again") from error
