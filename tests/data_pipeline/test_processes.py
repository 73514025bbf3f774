"""What the processes of one build have in common, and are sent."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from small_stores import write_store

from data_pipeline import build as build_module
from data_pipeline import stages
from data_pipeline.errors import DataError
from data_pipeline.store import Store
from data_pipeline.tokenizer import ByteTokenizer


def test_a_tokenizer_that_is_replaced_is_noticed(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process reads the model anew, perhaps on another node."""
    monkeypatch.setattr(stages, "load_tokenizer", lambda *_: ByteTokenizer())
    with pytest.raises(DataError, match=r"store disagree: the file of the tokenizer is another"):
        make()


def test_workers_are_sent_only_what_was_asked_for(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the lists of files and tasks, which a thread of the main process may be making at that moment."""
    sent = []

    class Pool(ProcessPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
            sent.append(set(vars(arguments[0])))
            return super().submit(function, *arguments, **options)

    monkeypatch.setattr(build_module, "ProcessPoolExecutor", Pool)
    real = stages.begin
    monkeypatch.setattr(stages, "begin", lambda work: (real(work), work.files, work.tasks))
    make(workers=3)
    assert sent == [{field.name for field in dataclasses.fields(stages.Work)}] * 2


READS = """
if __name__ == "__main__":
    import multiprocessing
    child = multiprocessing.get_context("spawn").Process(target=print, args=("here",))
    child.start()
    child.join()
    print(child.exitcode)
"""


@pytest.mark.parametrize("is_file", [True, False])
def test_a_script_without_a_guard_is_told_of_it(corpus: Path, tmp_path: Path, is_file: bool) -> None:
    """Worker processes run it again; or find none, where it came by standard input."""
    settings = f"BuildSettings(({str(corpus)!r},), tokenizer='bytes', output=Path('store'), seq_len=64, workers=2)"
    script = "from pathlib import Path\nfrom data_pipeline.build import build\n"
    script += f"from data_pipeline.config import BuildSettings\nbuild({settings})\n"
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, *(["script.py"] if is_file else [])]
    done = subprocess.run(command, input=script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "a worker process ended: if memory ran out" in last and 'build() below `if __name__ == "__main__":`' in last
    assert ("a process that was started to work for this script runs it, and would build too" in done.stderr) == is_file
    if is_file:  # as those of a DataLoader do, which find the store
        (tmp_path / "script.py").write_text(f"{script.replace('workers=2', 'workers=1')}{READS}")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "here\n0\n"), done.stderr


def test_a_thread_of_zarr_that_takes_its_time_is_waited_for(tmp_path: Path) -> None:
    """As on a busy machine: Zarr itself would close the loop of the running thread, which is an error."""
    write_store(tmp_path / "s", {"a.txt": b"some text"})
    lines = [
        "import time",
        "from zarr.core.sync import loop",
        "from data_pipeline.store import Store",
        f"print(len(Store.open({str(tmp_path / 's')!r}).read_row(0)))",
        "loop[0].call_soon_threadsafe(time.sleep, 1)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "16\n", "")
