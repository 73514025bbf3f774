"""Writing a store: every file appears whole, whoever is killed and whoever writes the same."""

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from on_disk import files_of
from small_stores import store_settings, write_store

from data_pipeline import layout
from data_pipeline.errors import DataError
from data_pipeline.manifest import ProblemRecord
from data_pipeline.packing import pack
from data_pipeline.store import Store, is_made
from data_pipeline.tokenizer import ByteTokenizer, IntegerTokenizer
from data_pipeline.verify import verify

ROWS = np.arange(6 * 16, dtype=np.uint16).reshape(6, 16)

KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import numpy as np
from data_pipeline import layout
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
layout.write_shard(Path(sys.argv[1]), 0, np.arange(6 * 16, dtype=np.uint16).reshape(6, 16)[:4])
"""


def begin(path: Path) -> Path:
    layout.create_tokens(path, store_settings(ByteTokenizer()), 6)
    return path


def test_plain_zarr_reads_it(tmp_path: Path) -> None:
    path = begin(tmp_path / "s")
    names = [layout.write_shard(path, first_row, ROWS[first_row : first_row + 4])[0] for first_row in (4, 0)]
    assert names == ["tokens/c/1/0", "tokens/c/0/0"]
    tokens = zarr.open_group(path, mode="r")["tokens"]
    assert np.array_equal(tokens[:], ROWS)
    assert (tokens.chunks, tokens.shards, tokens.dtype) == ((1, 16), (4, 16), np.uint16)


@pytest.mark.parametrize("stop", ["os.fsync", "pathlib.Path.rename"])
def test_a_write_that_ends_early_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    path = begin(tmp_path / "s")

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(stop, fail)
    with pytest.raises(OSError, match="no space left"):
        layout.write_shard(path, 0, ROWS[:4])
    assert layout.list_files(path) == ["tokens/zarr.json", "zarr.json"]


def test_a_killed_writer_leaves_no_shard_and_the_end_of_a_build_removes_its_rest(tmp_path: Path) -> None:
    work = tmp_path / "work"
    path = begin(work / "s")
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert layout.list_files(path) == ["tokens/zarr.json", "zarr.json"]
    assert len(list(work.glob("*.partial"))) == 1, "beside the store, where nobody lists it"
    (path / "x.partial").touch()
    assert zarr.open_group(path, mode="r")["tokens"][:4].min() == np.iinfo(np.uint16).max  # which is no token
    layout.write_shard(path, 0, ROWS[:4])
    layout.write_sidecars(path, pack(np.array([96]), 16, "stream"), 6, ByteTokenizer(), [], [], [])
    assert not [name for name in layout.list_files(path) if name.endswith(".partial")]
    assert np.array_equal(zarr.open_group(path, mode="r")["tokens"][:4], ROWS[:4])


def test_writers_of_one_shard_do_not_meet(tmp_path: Path) -> None:
    """At any time there is the whole shard."""
    path = begin(tmp_path / "s")
    name, record = layout.write_shard(path, 0, ROWS[:4])
    stop = threading.Event()
    failures = []

    def write() -> None:
        while not stop.is_set():
            try:
                assert layout.write_shard(path, 0, ROWS[:4]) == (name, record)
            except BaseException as error:
                failures.append(error)
                raise

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for _ in range(200):
        assert layout.record_file(path / name) == record
    stop.set()
    for writer in writers:
        writer.join()
    assert not failures
    assert layout.list_files(path) == ["tokens/c/0/0", "tokens/zarr.json", "zarr.json"]


def test_everything_may_be_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "s"
    contents = {"a": b"some text", "b": bytes(range(256))}
    write_store(path, contents)
    once = files_of(path)
    write_store(path, contents)
    assert files_of(path) == once
    assert verify(path) == []


def test_starting_again_keeps_shards(tmp_path: Path) -> None:
    path = begin(tmp_path / "s")
    name, record = layout.write_shard(path, 0, ROWS[:4])
    begin(path)
    assert layout.record_file(path / name) == record


@pytest.mark.parametrize(("n_values", "dtype"), [(256, np.uint16), (65_533, np.uint16), (65_534, np.uint32)])
def test_integers_in_the_smallest_type_that_has_a_number_to_spare(
    tmp_path: Path, n_values: int, dtype: np.dtype
) -> None:
    size = 1 if n_values == 256 else 2
    values = np.array([0, 1, n_values - 1] * 9, f"<u{size}")
    write_store(tmp_path / "s", {"image.npy/0": values.tobytes()}, IntegerTokenizer(n_values))
    opened = Store.open(tmp_path / "s")
    assert opened.read_row(0).dtype == dtype
    assert opened.read_row(0)[:4].tolist() == [n_values, 0, 1, n_values - 1]
    assert opened.token_bytes[[0, n_values - 1, n_values, n_values + 1]].tolist() == [size, size, 0, 0]
    assert opened.tokenizer.vocab_size == n_values + 2
    assert verify(tmp_path / "s") == []


def test_a_store_without_rows(tmp_path: Path) -> None:
    """What an append of documents that come to no token makes."""
    write_store(tmp_path / "s", {"empty.txt": b""}, bos=False, eos=False)
    opened = Store.open(tmp_path / "s")
    assert (opened.n_rows, len(opened.documents), opened.split_rows("train")) == (0, 1, [(0, 0)])
    assert verify(tmp_path / "s") == []


def test_the_tables(tmp_path: Path) -> None:
    problems = [ProblemRecord("b.txt", "encoding", "replaced", 'byte 7: "\u2028"\n')]
    write_store(tmp_path / "s", {"a.txt": b"a", "\u592a\u521d.txt": b"bc"}, problems=problems, val=["a.txt"])
    opened = Store.open(tmp_path / "s")
    assert [(d.id, d.name, d.n_bytes, d.split, d.tokens) for d in opened.documents] == [
        (0, "a.txt", 1, "val", 3),
        (1, "\u592a\u521d.txt", 2, "train", 4),
    ]
    assert [(record.name, record.n_bytes) for record in opened.inputs] == [("a.txt", 1), ("\u592a\u521d.txt", 2)]
    assert opened.problems == problems
    assert opened.manifest.problems == {"encoding/replaced": 1}


def test_rows_longer_than_a_chunk_are_read_in_slices(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 2 * 131_072, np.uint8).tobytes()
    write_store(tmp_path / "s", {"a": content}, seq_len=131_072, stride=131_072, packing="stream")
    opened = Store.open(tmp_path / "s")
    assert zarr.open_group(tmp_path / "s", mode="r")["tokens"].chunks == (1, 65_536)
    assert np.array_equal(opened.read_row(1, 70_000, 131_072), opened.read_row(1)[70_000:])
    assert opened.read_row(0, 1, 100).astype(np.uint8).tobytes() == content[:99]


def test_rows_by_numbers_of_other_types(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": bytes(range(256)) * 2})
    opened = Store.open(tmp_path / "s")
    for number in (np.int64(2), np.uint8(2), True):
        assert np.array_equal(opened.read_row(number), opened.read_row(int(number)))
        assert np.array_equal(opened.segments_of(number), opened.segments_of(int(number)))
        assert np.array_equal(opened.lengths_of(number), opened.lengths_of(int(number)))
    assert np.array_equal(opened.read_row(0, np.uint8(3), np.int64(5)), opened.read_row(0)[3:5])
    for no_number in (1.0, np.float64(2), "1", None):
        for read in (opened.read_row, opened.segments_of, opened.lengths_of):
            with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
                read(no_number)
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        opened.read_row(0, 1.0)


def test_another_store_in_its_place_is_noticed_and_rows_that_are_added_are_none(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a.txt": b"some text", "b.txt": b"more"})
    opened = Store.open(tmp_path / "s")
    opened.refuse_replaced()
    (tmp_path / "s").rename(tmp_path / "before")
    write_store(tmp_path / "s", {"a.txt": b"some TEXT", "b.txt": b"more"})
    with pytest.raises(DataError, match=f"{tmp_path / 's'} is not what it was when it was opened: another store"):
        opened.refuse_replaced()
    shutil.rmtree(tmp_path / "s")
    opened.refuse_replaced()  # its disk may be back soon


def test_a_shard_never_brings_back_what_was_moved_away(tmp_path: Path) -> None:
    settings = store_settings(ByteTokenizer())
    content, row = tmp_path / "content", np.zeros((1, settings.seq_len), np.uint16)
    with pytest.raises(FileNotFoundError):
        layout.write_shard(content, 0, row)
    layout.create_tokens(content, settings, 1)
    encode = zarr.open_array

    def moved_meanwhile(*arguments: Any, **options: Any) -> Any:
        content.rename(tmp_path / "store")
        return encode(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileNotFoundError):
        patch.setattr(zarr, "open_array", moved_meanwhile)
        layout.write_shard(content, 0, row)
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_a_store_of_other_rows_is_not_the_one_that_is_made(tmp_path: Path) -> None:
    """As by another --on-bad, which is no setting of a store."""
    manifest = write_store(tmp_path / "s", {"a.txt": b"some text"})
    shards = {name: record for name, record in manifest.files.items() if name.startswith("tokens/c/")}
    others = {name: record.model_copy(update={"sha256": "0" * 64}) for name, record in shards.items()}
    assert shards and is_made(tmp_path / "s", manifest, manifest.input_sha256, shards)
    assert not is_made(tmp_path / "s", manifest, manifest.input_sha256, others)
