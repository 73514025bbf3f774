"""How processes that have joined a run leave it."""

import os
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
    if sys.argv[2] == "closed":
        sys.stdout.close()
        sys.stdout = None
        return 2
    if sys.argv[2] in ("exits", "ends"):
        sys.exit(2 if sys.argv[2] == "exits" else None)
    return int(sys.argv[2])

end_by(main)
"""


def run(way: str, what: str, **streams: object) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    streams = streams or {"capture_output": True}
    return subprocess.run([sys.executable, "-c", PROGRAM, way, what], env=environ, text=True, **streams)


@pytest.mark.parametrize("way", ["alone", "joined", "in order"])
@pytest.mark.parametrize(("what", "code"), [("2", 2), ("exits", 2), ("raises", 1), ("0", 0), ("ends", 0)])
def test_only_who_has_left_in_order_takes_the_interpreter_down(way: str, what: str, code: int) -> None:
    """What was said is written, and the exit code is the one that was meant, either way."""
    found = run(way, what)
    assert found.returncode == code, found.stderr
    assert found.stdout.startswith("said last")
    assert ("the interpreter ends" in found.stdout) == (way != "joined")
    assert ("RuntimeError: a rank is gone" in found.stderr) == (what == "raises")


def test_output_that_cannot_be_written_does_not_cost_the_exit_code() -> None:
    assert run("joined", "closed").returncode == 2
    reads, writes = os.pipe()
    os.close(reads)
    assert run("joined", "2", stdout=writes, stderr=subprocess.PIPE).returncode == 2
    os.close(writes)
