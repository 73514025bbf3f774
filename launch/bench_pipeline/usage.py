"""Run a command; write how long it took and how much memory its largest process had at most.

    python -I launch/bench_pipeline/usage.py REPORT.json COMMAND …

This process imports next to nothing and has no other child, so that what Linux counts for its children is the command's
alone: the largest resident memory of any process that the command started, the command itself included, exactly and
however short its life. Orphans become children of this process, which waits for them too, such as what
multiprocessing's servers started. A process begins with the size of the one that started it, which is why the command
is not started by a program that has imported PyTorch.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""


def main() -> int:
    report, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begun = time.perf_counter()
    code = subprocess.run(command).returncode
    seconds = time.perf_counter() - begun
    with suppress(ChildProcessError):
        while True:
            os.wait()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_gib = children.ru_maxrss * 1024 / 2**30  # Linux counts it in KiB
    Path(report).write_text(
        json.dumps({"seconds": seconds, "cpu_s": children.ru_utime + children.ru_stime, "peak_gib": peak_gib})
    )
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
