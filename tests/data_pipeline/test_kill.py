"""A build that is killed leaves nothing that is taken for whole, and the next run starts afresh."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import DataError
from data_pipeline.staging import partial_path, staged
from data_pipeline.store import Store, list_files


def big_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"{number} and some words of a line\n" * 40_000)
    return folder


def command(corpus: Path, output: Path) -> list[str]:
    options = ["--tokenizer", "bytes", "--seq-len", "1024", "--rows-per-shard", "64", "--workers", "2"]
    return [sys.executable, "-m", "data_pipeline", "build", "--input", str(corpus), "--output", str(output), *options]


def test_sigkill_at_any_moment(tmp_path: Path) -> None:
    corpus = big_corpus(tmp_path / "corpus")
    reference, output = tmp_path / "reference.zarr", tmp_path / "output.zarr"
    subprocess.run(command(corpus, reference), check=True, capture_output=True)

    moments: list[Callable[[], bool]] = [
        lambda: partial_path(output).exists(),
        lambda: any(partial_path(output).rglob("*.tokens")),
        lambda: any(partial_path(output).rglob("tokens/c/*/0")),
    ]
    for moment in moments:
        process = subprocess.Popen(command(corpus, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not moment() and process.poll() is None:
            time.sleep(0.001)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not output.exists()
        assert partial_path(output).exists()
        with pytest.raises(DataError, match="does not exist"):
            Store.open(output)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlive their parent"

    result = subprocess.run(command(corpus, output), check=True, capture_output=True, text=True)
    assert f"removing {partial_path(output)}, left by a run that was killed" in result.stderr
    assert not partial_path(output).exists()
    names = list_files(reference)
    assert list_files(output) == names
    for name in names:
        assert (output / name).read_bytes() == (reference / name).read_bytes()


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
