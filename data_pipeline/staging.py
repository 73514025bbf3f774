"""Nothing half-written is ever taken for whole.

What a command makes (`staged`) is written beside its final place, in `.NAME.partial/`, and appears under its name by
one rename at the very end. Whatever is under its name is therefore complete; whatever a killed run leaves behind is
recognised by its name and removed by the next run. A lock inside keeps two writers of one output apart. A single file
within an output appears by a rename, too (`publishing`); any number of processes may write the same one.
"""

import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.locks import EXCLUSIVE, NO_LOCKS_WAY_OUT, is_at, try_lock
from data_pipeline.output import naming

logger = logging.getLogger(__name__)

_CONTENT = "content"
_LOCK = "lock"


def partial_path(output: Path) -> Path:
    """Where `output` is written before it is complete: in the same folder, so that a rename is one step.

    Raises DataError for "." and the like, which no rename can put in place.
    """
    if not output.name:
        raise DataError(f"the output {output} has no name of its own: give one, such as {output / 'output'}")
    return output.with_name(f".{output.name}.partial")


def check_writable(folder: Path, what: str) -> None:
    """Makes a folder, and a file in it for a moment. Raises DataError, before any long work, when that cannot be done.

    what: the option that asks for an output there, as the user gave it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(what, error) from error


def check_json(path: Path | None) -> None:
    """Before hours of work. Raises DataError when what --json asks for cannot be written to `path`."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise DataError(f"--json {path} cannot be written: expected the name of a file in a folder that exists")
    if not path.exists():
        check_writable(path.parent, f"--json {path}")
    elif not os.access(path, os.W_OK):
        raise DataError(f"cannot write to --json {path}: Permission denied: choose another file")


def write_figures(path: Path, text: str) -> None:
    """Writes what --json asks for. What is there stays where it cannot be written.

    A file appears whole. A device, and what a link leads to (as /dev/stdout), is written to as it is.
    """
    with naming(path):
        target = path if path.exists() else Path(os.path.realpath(path))  # of a link to nothing
        is_other = target.is_symlink() or (target.exists() and not target.is_file())
        if is_other or not os.access(target.parent, os.W_OK):
            target.write_text(text, encoding="utf-8")
            return
        with publishing(target) as file:
            if target.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            file.write(text.encode())


def unwritable(what: str, error: OSError) -> DataError:
    """What an error of the system means that came up on the way to an output."""
    in_the_way = isinstance(error, FileExistsError)  # a file, or a link to nothing
    reason = f"{error.filename} is not a folder" if in_the_way else error.strerror
    return DataError(f"cannot write to {what}: {reason}: choose another folder")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yields a path to make a file or directory at. It becomes `output` when the block ends well, else it is removed.

    Of a link it is what that leads to. Raises DataError when its folder cannot be written to, when another process is
    writing the same output, or when one has taken its name by the end.
    """
    if output.is_symlink():  # which a rename cannot put a folder in place of
        output = Path(os.path.realpath(output))
    partial = partial_path(output)
    check_writable(output.parent, f"--output {output}")
    with _locked(partial, output):
        content = partial / _CONTENT
        _remove_leftover(content)
        try:
            with naming(output):
                yield content
                _publish(content, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def publishing(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """Yields a file to write. It appears at `path` when the block ends well, whole and on disk; else it is removed.

    folder: where it is until then, on the same file system; beside `path` if not given.
    """
    partial = (folder or path.parent) / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Publishes a JSON file."""
    with publishing(path) as output:
        output.write(json.dumps(content).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads one back."""
    return dict(json.loads(path.read_bytes()))


@contextmanager
def _locked(partial: Path, output: Path) -> Iterator[None]:
    """Holds the lock in `partial`, making the directory if need be. The kernel frees it if we are killed."""
    partial.mkdir(exist_ok=True)
    path = partial / _LOCK
    with path.open("ab") as lock:
        try:
            is_ours = try_lock(lock, EXCLUSIVE)
        except OSError as error:
            raise DataError(
                f"{output.parent} is on a file system without locks ({error.strerror}): {NO_LOCKS_WAY_OUT}, or put "
                "--output elsewhere"
            ) from error
        if not is_ours:
            raise DataError(f"{output} is being written by another process: wait for it to end")
        if not is_at(path, lock):  # whoever held the lock before us removes it with the rest
            raise DataError(f"{output} was just written by another process: run the command again")
        yield


def _remove_leftover(content: Path) -> None:
    if not content.exists():
        return
    logger.info("removing %s, left by a run that was killed", content.parent)
    if content.is_dir():
        shutil.rmtree(content)
    else:
        content.unlink()


def _publish(content: Path, output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise DataError(f"{output} appeared while it was being written here: remove it and run again")
    content.rename(output)
