"""Every byte back: by document, by row, and as files."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_stores import write_store

from data_pipeline import decode
from data_pipeline.decode import decode_all, decode_document, decode_row, decode_split
from data_pipeline.errors import DataError
from data_pipeline.part import StorePart
from data_pipeline.store import Store
from data_pipeline.tokenizer import IntegerTokenizer, load_tokenizer

DOCUMENTS = {
    "book.txt": "".join(f"Sentence {number}. 태초에 \U0001f642\r\n" for number in range(25)).encode(),
    "corpus.jsonl/0": b"the first record",
    "corpus.jsonl/17": b"\xef\xbb\xbfa mark at the start",
    "corpus.jsonl/18": b"",
    "a/b/c.txt": b"\0\n\n\r",
}
PACKINGS = [{}, {"packing": "stream", "bos": False}, {"packing": "book", "stride": 7}, {"packing": "book", "stride": 2}]


def packing_name(settings: dict[str, object]) -> str:
    return " ".join(map(str, settings.values())) or "bestfit"


@pytest.mark.parametrize("settings", PACKINGS, ids=packing_name)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_every_document(tmp_path: Path, tokenizer_file: Path, settings: dict[str, object], kind: str) -> None:
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else str(tokenizer_file))
    write_store(tmp_path / "s", DOCUMENTS, tokenizer, **settings)
    store = Store.open(tmp_path / "s")
    for name, content in DOCUMENTS.items():
        assert b"".join(decode_document(store, name)) == content
    assert decode_all(store, tmp_path / "out") == len(DOCUMENTS)
    written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*/*")}
    assert {"corpus.jsonl/0", "corpus.jsonl/17", "corpus.jsonl/18"} <= set(written)
    for name, content in DOCUMENTS.items():
        assert (tmp_path / "out" / name).read_bytes() == content


@pytest.mark.parametrize("settings", PACKINGS, ids=packing_name)
def test_a_split_as_lines_of_json(tmp_path: Path, tokenizer_file: Path, settings: dict[str, object]) -> None:
    held_out = ["corpus.jsonl/17", "book.txt", "corpus.jsonl/18"]
    write_store(tmp_path / "s", DOCUMENTS, load_tokenizer(str(tokenizer_file)), held_out, **settings)
    lines = list(decode_split(Store.open(tmp_path / "s"), "val"))
    assert list(map(json.loads, lines)) == [
        {"name": name, "text": content.decode()} for name, content in DOCUMENTS.items() if name in held_out
    ]
    assert "태초에".encode() in lines[0] and all(line.count(b"\n") == 1 for line in lines)


@pytest.mark.parametrize("remembered", [1, 1 << 25])
def test_of_many_short_documents_no_row_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: int
) -> None:
    """Unless there is no room to remember it."""
    documents = {f"{number:03d}.txt": b"word " * (1 + number % 17) for number in range(100)}
    write_store(tmp_path / "s", documents, seq_len=256)
    store, read, rows = Store.open(tmp_path / "s"), StorePart.read_row, list[int]()

    def counting(part: StorePart, row: int, *bounds: int) -> np.ndarray:
        rows.append(row)
        return read(part, row, *bounds)

    monkeypatch.setattr(StorePart, "read_row", counting)
    monkeypatch.setattr(decode, "_REMEMBERED_TOKENS", remembered)
    lines = [json.loads(line) for line in decode_split(store, "train")]
    assert {line["name"]: line["text"].encode() for line in lines} == documents
    assert set(rows) == set(range(store.n_rows)) and (len(rows) == store.n_rows) == (remembered > 1)


def test_a_split_of_integers_is_values(tmp_path: Path) -> None:
    contents = {"a": np.arange(700, 720, dtype="<u2").tobytes(), "b": np.array([999], "<u2").tobytes()}
    write_store(tmp_path / "s", contents, IntegerTokenizer(1000))
    lines = decode_split(Store.open(tmp_path / "s"), "train")
    assert list(map(json.loads, lines)) == [{"name": "a", "values": [*range(700, 720)]}, {"name": "b", "values": [999]}]


def test_a_split_that_json_cannot_say(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": b"text", "b": b"latin \xe9"})
    lines = decode_split(Store.open(tmp_path / "s"), "train")
    assert json.loads(next(lines)) == {"name": "a", "text": "text"}
    with pytest.raises(DataError, match="'b' is not UTF-8 at byte 6, as JSON must be: give --document"):
        next(lines)
    with pytest.raises(DataError, match="has no split 'test'"):
        next(decode_split(Store.open(tmp_path / "s"), "test"))


@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
def test_long_rows_are_decoded_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(decode, "_DECODE_TOKENS", at_once)
    write_store(tmp_path / "s", DOCUMENTS, packing="book", stride=5)
    store = Store.open(tmp_path / "s")
    pieces = list(decode_document(store, "book.txt"))
    assert b"".join(pieces) == DOCUMENTS["book.txt"]
    assert max(map(len, pieces)) <= at_once


def test_a_row_is_all_that_is_in_it(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": bytes(range(40))}, packing="book", stride=10)
    store = Store.open(tmp_path / "s")
    assert [decode_row(store, row) for row in range(store.n_rows)] == [
        bytes(range(15)),
        bytes(range(9, 25)),
        bytes(range(19, 35)),
        bytes(range(29, 40)),
    ]
    with pytest.raises(DataError, match="has no row 4: expected 0 to 3"):
        decode_row(store, 4)


@pytest.mark.parametrize(("n_values", "dtype"), [(4, "u1"), (256, "u1"), (257, "<u2"), (70_000, "<u4")])
def test_integers_are_the_raw_values(tmp_path: Path, n_values: int, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, n_values, 100).astype(dtype)
    write_store(tmp_path / "s", {"x.npy/3": values.tobytes()}, IntegerTokenizer(n_values), packing="book", stride=3)
    store = Store.open(tmp_path / "s")
    assert np.array_equal(np.frombuffer(b"".join(decode_document(store, "x.npy/3")), dtype), values)


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    write_store(tmp_path / "s", DOCUMENTS)
    with pytest.raises(DataError, match=r"has no document 'corpus.jsonl': inspect and documents.jsonl list names"):
        list(decode_document(Store.open(tmp_path / "s"), "corpus.jsonl"))


@pytest.mark.parametrize("names", [("a", "a/1"), ("a/1", "a"), ("a/1", "a//1"), ("a", "a/b/c")])
def test_names_that_cannot_stand_side_by_side(tmp_path: Path, names: tuple[str, str]) -> None:
    write_store(tmp_path / "s", dict.fromkeys(names, b"text"))
    with pytest.raises(DataError, match=r"document '.*' cannot be a file of its own .* use --document"):
        decode_all(Store.open(tmp_path / "s"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_one_file_is_open_at_a_time(tmp_path: Path) -> None:
    """Of many documents that all go on over several rows."""
    resource = pytest.importorskip("resource")
    write_store(tmp_path / "s", {f"{number}": b"some text" for number in range(200)}, packing="stream")
    store = Store.open(tmp_path / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        assert decode_all(store, tmp_path / "out") == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_output_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", {"a.txt": b"text"})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match=r"the output \. has no name of its own: give one, such as output"):
        decode_all(Store.open(tmp_path / "store"), Path())


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    write_store(tmp_path / "store", {"a.txt": b"text"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert decode_all(Store.open(tmp_path / "store"), tmp_path / "link") == 1
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty/a.txt").read_bytes() == b"text"
