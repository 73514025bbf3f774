"""The benchmark measures what it says, and names what it cannot."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ["--seq-len", "256", "--d-model", "32", "--n-heads", "2", "--n-layers", "1", "--rounds", "2"]


def benchmark(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_peers_are_measured_in_turn_and_compared(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    done = benchmark("model", *TINY, "--peers", "ours", "dense", "--json", file)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert [result["peer"] for result in record["results"]] == ["ours", "dense", "ours", "dense"]
    assert all(result["seconds"] > 0 and result["peak_gib"] > 0.05 for result in record["results"])
    assert record["cores"] >= 1 and record["command"][:2] == ["python", "launch/benchmark.py"]
    ours, dense = done.stdout.splitlines()
    assert "ours" in ours and "1.00 x time" in ours and "dense" in dense


def test_what_fails_is_a_result_and_not_asked_again() -> None:
    done = benchmark("model", *TINY, "--peers", "ours", "--n-heads", "3")
    assert done.returncode == 0
    assert "d_model=32 is not divisible by n_heads=3" in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_unknown_peers_are_named() -> None:
    done = benchmark("attention", "--peers", "flash")
    assert done.returncode == 1
    assert done.stderr == "error: no peer flash: choose from ours, dense\n"
