"""How processes that have joined a run leave it."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
import torch.distributed as dist
from trainer.distributed import end_by

def main():
    atexit.register(print, "the interpreter ends")
    if sys.argv[1] != "alone":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if sys.argv[1] == "in order":
        dist.destroy_process_group()
    print("said last", end="")
    if sys.argv[2] == "raises":
        raise RuntimeError("a rank is gone")
    if sys.argv[2] == "exits":
        sys.exit(2)
    return int(sys.argv[2])

end_by(main)
"""


@pytest.mark.parametrize("way", ["alone", "joined", "in order"])
@pytest.mark.parametrize(("what", "code"), [("2", 2), ("exits", 2), ("raises", 1), ("0", 0)])
def test_only_who_has_left_in_order_takes_the_interpreter_down(way: str, what: str, code: int) -> None:
    """What was said is written, and the exit code is the one that was meant, either way."""
    found = subprocess.run([sys.executable, "-c", PROGRAM, way, what], capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    assert found.stdout.startswith("said last")
    assert ("the interpreter ends" in found.stdout) == (way != "joined")
    assert ("RuntimeError: a rank is gone" in found.stderr) == (what == "raises")
