"""The tests that need a GPU, run by `launch/gpu_check.py` with pytest."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ("tests/reformer/test_triton.py", "tests/reformer/test_triton_hashing.py")
TRAINER_TESTS = ("tests/distributed/test_on_gpu.py", "tests/trainer/test_timing.py")
TRAINER_NEEDS = ("deepspeed", "zarr", "sentencepiece", "tensorboard", "tqdm")
TEST_PROCESSES = 16
"""Most of the tests' time is the compilation of kernels, one core each."""
TESTS_S = 200.0
"""After so long the tests are stopped, so that the rest has its time."""

KILLED_S = 20.0
"""After so long a process that was killed is gone, or never will be."""

Result = dict[str, Any]
_running: set[subprocess.Popen[str]] = set()


def run_tests() -> Result:
    """The tests of the kernels, and of the trainer where it can run, in several processes with a share each."""
    if not find_spec("pytest"):
        return {"error": "pytest is not installed"}
    missing = [package for package in TRAINER_NEEDS if not find_spec(package)]
    files = KERNEL_TESTS if missing else (*KERNEL_TESTS, *TRAINER_TESTS)
    left_out = {"left_out": f"tests of the trainer, which needs {', '.join(missing)}"} if missing else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    begun = time.monotonic()
    with _all_stopped():
        listed = _output([*command, "--collect-only", *files], TESTS_S)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        return {"error": "no test could be collected", "output": (listed.stdout + listed.stderr)[-2000:]}
    shares = [names[first::TEST_PROCESSES] for first in range(min(TEST_PROCESSES, len(names)))]
    with ThreadPoolExecutor(len(shares)) as pool, _all_stopped():
        left_s = TESTS_S - (time.monotonic() - begun)
        done = list(pool.map(lambda share: _output([*command, *share], left_s), shares))
    done.insert(0, listed)  # a file that cannot be imported has no test that could fail
    failed = [line for process in done for line in process.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    broken = any(process.returncode for process in done)
    output = "".join(process.stdout[-1500:] for process in done if process.returncode)
    error = {"error": "tests failed", "output": output} if broken else {}
    return {"tests": len(names), "failed": failed, **left_out, **error}


@contextmanager
def _all_stopped() -> Iterator[None]:
    """Processes with sessions of their own do not hear Ctrl-C, nor what a handler of signals raises: kill them then."""
    try:
        yield
    except BaseException:
        for process in set(_running):
            _kill(process)
        raise


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _output(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """What it says; stopped after `timeout_s` with all that it has started, which would go on using the GPU."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as process:
        _running.add(process)
        try:
            said, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process)
            said, _ = process.communicate(timeout=KILLED_S)
            return subprocess.CompletedProcess(command, 124, f"{said}\nERROR stopped after {timeout_s:.0f} s", "")
        finally:
            _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, said, errors)
