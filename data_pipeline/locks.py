"""Locks of the kernel on open files: they end with the process that holds them, so no crash leaves one behind.

They hold between the nodes of a cluster where the file system has locks: NFS 4 has, Lustre if mounted with `-o flock`.
"""

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

EXCLUSIVE, SHARED = fcntl.LOCK_EX, fcntl.LOCK_SH
NO_LOCKS_WAY_OUT = "mount it with locks (Lustre: -o flock)"
"""What to do about a file system without locks."""


def try_lock(file: BinaryIO, kind: int) -> bool:
    """Whether the lock, EXCLUSIVE or SHARED, could be had at once. Raises OSError on a file system without locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(file: BinaryIO) -> None:
    """Take the EXCLUSIVE lock, however long others hold it. Raises OSError on a file system without locks."""
    fcntl.flock(file, fcntl.LOCK_EX)


def is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is the one at `path` still: who held its lock before may have removed it."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
