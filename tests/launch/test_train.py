"""What launch/train.py settles before anything is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, runpy, sys
sys.argv = ["launch/train.py", "--template"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "TORCHDYNAMO_DISABLE")), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [({}, "10000 1"), ({"OMP_WAIT_POLICY": "active", "TORCHDYNAMO_DISABLE": "0"}, "None 0")],
    ids=["own", "the user's"],
)
def test_how_threads_wait_and_whether_anything_is_compiled(variables: dict[str, str], said: str) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "TORCHDYNAMO_DISABLE")
    environ = {name: value for name, value in os.environ.items() if name not in names} | variables
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environ, check=True, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == said
