"""What all commands share: arguments, how they end (exit code, a line on errors), words and tables."""

import argparse
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data_pipeline.errors import DataError

BAD_INPUT, INTERRUPTED = 2, 130


class _Several(argparse.Action):
    """Values of an option that is repeated come together; by itself argparse keeps those of the last alone."""

    def __call__(
        self, parser: argparse.ArgumentParser, given: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(given, self.dest)
        setattr(given, self.dest, [*([] if before is self.default else before), *values])


SEVERAL: Mapping[str, Any] = MappingProxyType({"nargs": "+", "action": _Several})
"""Of `add_argument`: an option of one or more values, which replace the default and may come in several goes."""


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around what prints: a reader may leave, as in `… decode STORE --row 0 | head`, and that is no error."""
    try:
        yield
        if sys.stdout:  # closed, there is none
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        # What is still to be written goes nowhere: Python would try again at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_left() -> bool:
    """Whether nobody reads standard output any more: other pipes may break too."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors and hang-ups alone
    return bool(poll.poll(0))


def exit_code(command: Callable[[], int | None], *errors: type[Exception]) -> int:
    """Of a command: what it returns, 2 where it is ended by DataError, OSError or one of `errors`, 130 by Ctrl-C.

    OSError: a full disk, no permission; the system's words name the file. What is printed is UTF-8, whatever the
    terminal's encoding is.
    """
    print_utf8()
    told: tuple[type[Exception], ...] = (DataError, OSError, *errors)
    code: int | None = 0
    try:
        with reader_may_leave():
            code = command()
    except told as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Around what writes a file or folder: an error by which it finds no room names it, where it names nothing."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno not in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if error.errno is None:  # NumPy's
            raise OSError(f"{error}: {str(output)!r}") from error
        raise OSError(error.errno, error.strerror, str(output)) from error


def print_utf8() -> None:
    """From here on what is printed is UTF-8, and names of files are the bytes that they are."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.closed:
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")


def as_path(text: str | Path) -> Path:
    """A path as people write it: a shell does not make a home of the `~` in `run.dir=~/runs`, or in a file."""
    return Path(text).expanduser() if str(text) == "~" or str(text).startswith("~/") else Path(text)


def positive(text: str) -> int:
    """A whole number of at least 1, out of an argument of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def counted(number: int, noun: str) -> str:
    """So many of something, in words."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of some names, and how many more there are: `a, b and 3 more`; `a; b; and 3 more`."""
    more = f"{between.rstrip(', ')} and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns as wide as they need to be, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
