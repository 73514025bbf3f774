"""How a command ends: its exit code, by what ends it, with standard output as a pipe."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = "import sys\nfrom data_pipeline.output import exit_code\ndef command():\n    "
END = "\nsys.exit(exit_code(command, KeyError))"


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("print('all')", 0, ""),
        ("return 1", 1, ""),
        ("raise OSError(28, 'No space left', 'x')", 2, "error: [Errno 28] No space left: 'x'\n"),
        ("raise KeyError('k')", 2, "error: 'k'\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("raise BrokenPipeError(32, 'of a worker')", 2, "error: [Errno 32] of a worker\n"),
    ],
)
def test_what_ends_a_command(body: str, code: int, error: str) -> None:
    words = [sys.executable, "-c", START + body + END]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_reader_who_has_left_is_no_error() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-c", START + "print('x' * 2**20)" + END]
    done = subprocess.run(words, cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")
