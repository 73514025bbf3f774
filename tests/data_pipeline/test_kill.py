"""A build that is killed leaves nothing that is taken for whole, and the same command finishes its work."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
from on_disk import files_of

from data_pipeline.errors import DataError
from data_pipeline.staging import partial_path, staged
from data_pipeline.store import Store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for each half of a build to take a while."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"{number} and some words of a line\n" * 40_000)
    return folder


def command(corpus: Path, output: Path, workers: int) -> list[str]:
    options = f"--tokenizer bytes --seq-len 1024 --rows-per-shard 64 --workers {workers}"
    paths = ["--input", str(corpus), "--output", str(output)]
    return [sys.executable, "-m", "data_pipeline", "build", *paths, *options.split()]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "store.zarr"
    subprocess.run(command(corpus, output, 1), check=True, capture_output=True)
    return output


@pytest.mark.parametrize(
    "moment", ["start/00000000.json", "tokens/00000001.npz", "plan/00000000.json", "shards/00000009.json"]
)
def test_sigkill_at_any_moment(moment: str, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "store.zarr"
    work = partial_path(output)
    process = subprocess.Popen(command(corpus, output, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (work / moment).exists():
        assert process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with pytest.raises(DataError, match="does not exist"):
        Store.open(output)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "workers outlive their parent"

    done = {path: path.stat().st_mtime_ns for path in (*work.glob("tokens/*.npz"), *work.glob("content/tokens/c/*/0"))}
    recorded = {path for path in done if path.suffix == ".npz"}
    recorded |= {work / "content/tokens/c" / str(int(path.stem)) / "0" for path in work.glob("shards/*.json")}
    kept: dict[Path, int] = {}
    rerun = subprocess.Popen(command(corpus, output, 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while rerun.poll() is None:
        for path in recorded:
            with suppress(FileNotFoundError):  # the build removes what it no longer needs
                kept[path] = path.stat().st_mtime_ns
        time.sleep(0.01)
    assert rerun.returncode == 0, rerun.stderr.read() if rerun.stderr else ""
    assert kept or moment.startswith("start/"), "the rerun began with nothing"
    assert all(done[path] == time_ns for path, time_ns in kept.items()), "what was done is done again"
    assert not work.exists()
    assert files_of(output) == files_of(undisturbed)


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with staged(output) as partial:
        partial.write_text("first")
        with pytest.raises(DataError, match="is being written by another process"), staged(output):
            pass
    assert output.read_text() == "first"
    assert list(tmp_path.iterdir()) == [output]


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(DataError, match="appeared while"), staged(output) as partial:
        partial.mkdir()
        output.write_text("someone else's")
    assert output.read_text() == "someone else's"
    assert list(tmp_path.iterdir()) == [output]
    output.unlink()
    with pytest.raises(DataError, match="appeared while"), staged(output) as partial:
        partial.mkdir()
        output.mkdir()
        (output / "file").write_text("someone else's")
    assert (output / "file").read_text() == "someone else's"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("anew", [False, True])
def test_a_lock_whose_holder_removed_it_meanwhile_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    output, real = tmp_path / "output", fcntl.flock
    lock = partial_path(output) / "lock"

    def flock(file: BinaryIO, kind: int) -> None:
        real(file, kind)
        lock.unlink()
        if anew:  # by one who came later, and has a lock of its own
            lock.touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DataError, match="was just written by another process: run the command again"), staged(output):
        pass


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, is_folder: bool) -> None:
    output = tmp_path / "output"
    left = partial_path(output) / "content"
    left.parent.mkdir()
    if is_folder:
        left.mkdir()
        (left / "half").touch()
    else:
        left.touch()
    with staged(output) as partial:
        assert not partial.exists()
        partial.write_text("whole")
    assert list(tmp_path.iterdir()) == [output]
