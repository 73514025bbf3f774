"""Standard output whose reader may leave before the end, as in `… decode STORE --row 0 | head`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around what prints: where the reader has seen enough, the rest of it is left out, and that is no error."""
    try:
        yield
        if sys.stdout:  # closed, there is none
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be written goes nowhere: Python would try again at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
