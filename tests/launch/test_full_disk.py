"""Scripts that find no room for what they were asked for: they name it, and leave nothing of it."""

from pathlib import Path

from on_disk import fill
from reported_runs import make_run, report
from small_stores import cabbage_store


def test_samples(exported: Path, small_disk: Path, call) -> None:
    filler = fill(small_disk)
    code, out, error = call(exported, "my words", "--tokens", "4", "--output", str(small_disk))
    assert (code, out) == (2, "")
    assert error.endswith(f"error: [Errno 28] No space left on device: '{small_disk / 'seed0000.txt'}'\n")
    assert list(small_disk.iterdir()) == [filler]


def test_a_report(small_disk: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", cabbage_store(tmp_path))
    filler = fill(small_disk)
    done = report(tmp_path / "run", "--json", small_disk / "out.json")
    assert done.returncode == 2
    assert done.stderr == f"error: [Errno 28] No space left on device: '{small_disk / 'out.json'}'\n"
    assert list(small_disk.iterdir()) == [filler]
