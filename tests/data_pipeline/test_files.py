"""Getting the bytes of files, which must stay what they were; and names that a store has taken."""

import gzip
import io
import os
import pickle
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest
from read_documents import only, write
from small_stores import write_store

from data_pipeline.errors import BadDocument, DataError, InputChanged
from data_pipeline.files import InputFile, hash_file, open_raw, read_content
from data_pipeline.inputs import new_files
from data_pipeline.store import Store


def test_a_file_that_changes_is_noticed(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    path = write(tmp_path / "a.txt", b"before")
    memory.pipe("/b.txt", b"before")
    files = [only(path), only("memory://b.txt")]
    path.write_bytes(b"after it")
    memory.pipe("/b.txt", b"after it")
    for file in files:
        with pytest.raises(DataError, match="changed while it was being read"):
            list(read_content(file))
    path.unlink()
    memory.rm("/b.txt")
    for file in files:
        with pytest.raises(DataError, match="was removed meanwhile"):
            list(read_content(file))


def test_a_worker_process_can_say_that_an_input_changed() -> None:
    error = pickle.loads(pickle.dumps(InputChanged("a.txt changed")))
    assert (error.what, str(error)) == ("a.txt changed", "a.txt changed: run the command again")


def test_a_file_of_the_same_size_but_another_time_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"before")
    file = only(path)
    assert file.mtime_ns is not None
    path.write_bytes(b"after!")
    os.utime(path, ns=(file.mtime_ns, file.mtime_ns + 1))
    with pytest.raises(DataError, match="changed while it was being read"), open_raw(file):
        pass


@pytest.mark.parametrize("after", [b"", b"x" * 40_000])
def test_a_file_that_changes_after_it_was_opened_is_noticed(tmp_path: Path, after: bytes) -> None:
    path = write(tmp_path / "a.txt", b"x" * 30_000)
    chunks = read_content(only(path))
    with patch("data_pipeline.files._CHUNK_BYTES", 10_000):
        assert len(next(chunks)) == 10_000
    path.write_bytes(after)
    with pytest.raises(DataError, match=r"a\.txt changed while it was being read"):
        list(chunks)


def test_a_file_that_cannot_be_read_is_a_bad_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = only(write(tmp_path / "a.txt", b"text"))

    class Broken(io.BytesIO):
        def read(self, n_bytes: int | None = None) -> bytes:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("data_pipeline.files._open", lambda _: (Broken(), file.n_bytes, file.mtime_ns))
    with pytest.raises(BadDocument, match="cannot be read: Input/output error") as caught:
        list(read_content(file))
    assert caught.value.problem == "unreadable"
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Input/output error"):
        hash_file(file)


def test_hashes_are_of_the_bytes_as_stored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"text", mtime=0))
    other = write(tmp_path / "b.txt", path.read_bytes())
    assert hash_file(only(path)) == hash_file(only(other))


@pytest.mark.parametrize("recorded", ["x.jsonl", "x.jsonl/0", "below/x.JSONL/0/y.txt"])
def test_names_that_a_store_has_taken_already(tmp_path: Path, recorded: str) -> None:
    """Its documents would be named as those of the file that is added, or the reverse."""
    write_store(tmp_path / "store", {recorded: b"recorded"})
    name = "x.jsonl/0" if recorded == "x.jsonl" else recorded.partition("/0")[0]
    parts = Store.open(tmp_path / "store").parts
    with pytest.raises(DataError, match=r"is in a folder with the name of another input.*rename one of them"):
        new_files([InputFile(name, f"/corpus/{name}", 5, None, None)], parts)
    assert new_files([InputFile("y.jsonl", "/corpus/y.jsonl", 5, None, None)], parts)


def test_names_that_a_store_has_already_are_no_reason_to_add_nothing_more(tmp_path: Path) -> None:
    """Older versions added both; nobody could rename them now."""
    write_store(tmp_path / "store", {"x.jsonl": b"one", "x.jsonl/n.txt": b"another"})
    parts = Store.open(tmp_path / "store").parts
    assert new_files([InputFile("y.txt", "/corpus/y.txt", 5, None, None)], parts)
