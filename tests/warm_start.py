"""Python scripts that start with the seconds of imports behind them: forks of a server that has done these.

Most tests of several ranks are about what ranks do, not about how Python starts them. (Those of launchers, clusters and
kills start them as users do.) A fork has its own environment, arguments and files, as a new process would; what is not
from scratch are modules, which read no setting of ours when they are imported.
"""

import ctypes
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

M_PERTURB = -6
"""Of malloc.h."""
IMPORTED = [
    *("trainer.loop", "trainer.figures", "torch._dynamo", "torch._inductor", "deepspeed.ops.adam"),
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
"""What a run imports when it comes to it, too."""
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED)


def start(words: list[str], cwd: Path, environ: dict[str, str], output: Path, errors: Path) -> ForkServerProcess:
    """`python WORDS`, the first of which is the script. Its streams are appended to these files."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # which libraries read when they are loaded
        forkserver.ensure_running()
    process = _context.Process(target=_run, args=(words, cwd, environ, output, errors))
    process.start()
    return process


def exit_codes(processes: Sequence[ForkServerProcess], timeout_s: float) -> list[int | None]:
    """Those of processes that run side by side, when all have ended; None for one that has not after so long."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def _run(words: list[str], cwd: Path, environ: dict[str, str], output: Path, errors: Path) -> None:
    for stream, path in ((sys.stdout, output), (sys.stderr, errors)):
        with path.open("a") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environ)
    perturb, libc = environ.get("MALLOC_PERTURB_"), ctypes.CDLL(None)
    if perturb and hasattr(libc, "mallopt"):  # glibc reads the variable when a process begins, which was long ago
        libc.mallopt(M_PERTURB, int(perturb))
    os.chdir(cwd)
    sys.argv, sys.path[0] = words, str((cwd / words[0]).parent)
    sys.path[1:1] = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    runpy.run_path(words[0], run_name="__main__")
