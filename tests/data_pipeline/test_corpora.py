"""Whole builds of every kind of input: what the store then holds, what was wrong, and what is added later."""

import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from on_disk import files_of

from data_pipeline import stages
from data_pipeline.build import build
from data_pipeline.config import BuildSettings, TextSettings
from data_pipeline.decode import decode_all, decode_document, decode_row
from data_pipeline.errors import DataError
from data_pipeline.report import inspect, summary
from data_pipeline.store import Store
from data_pipeline.verify import verify

TEXTS = [f"Document {n}: {'na ' * (7 * n)}and a tail.\n" for n in range(12)]


def make(output: Path, *inputs: Path | str, **changes: object) -> Store:
    settings = {"inputs": tuple(map(str, inputs)), "tokenizer": "bytes", "output": output, "seq_len": 128}
    return build(BuildSettings(**{**settings, **changes})).store  # type: ignore[arg-type]


def texts_of(store: Store) -> dict[str, bytes]:
    return {document.name: b"".join(decode_document(store, document.name)) for document in store.documents}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same documents as plain files."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz"])
def test_compressed_files_make_the_same_rows(folder: Path, tmp_path: Path, suffix: str) -> None:
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress, "xz": lzma.compress}[suffix]
    (tmp_path / "small").mkdir()
    for path in folder.iterdir():
        (tmp_path / "small" / f"{path.name}.{suffix}").write_bytes(compress(path.read_bytes()))
    plain, small = files_of(make(tmp_path / "a", folder).path), files_of(make(tmp_path / "b", tmp_path / "small").path)
    assert {name for name in plain if plain[name] != small[name]} == {"inputs.jsonl", "manifest.json"}


def test_json_lines_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": n, "text": text}) for n, text in enumerate(TEXTS)))
    pa.parquet.write_table(pa.table({"text": TEXTS, "other": range(12)}), tmp_path / "b.parquet", row_group_size=5)
    store = make(tmp_path / "store", tmp_path / "a.jsonl", tmp_path / "b.parquet", split={"val": 0.3})
    expected = {f"{name}/{n}": text.encode() for name in ("a.jsonl", "b.parquet") for n, text in enumerate(TEXTS)}
    assert texts_of(store) == expected
    assert verify(store.path) == []
    splits = {document.name: document.split for document in store.documents}
    assert all(splits[f"a.jsonl/{n}"] == splits[f"b.parquet/{n}"] for n in range(12)), "copies keep together"
    assert decode_all(store, tmp_path / "decoded") == 24
    assert files_of(tmp_path / "decoded") == expected
    # every text is there twice, and kept: counted and listed
    assert store.manifest.problems == {"duplicate/kept": 12}
    assert {problem.document for problem in store.problems} == {f"b.parquet/{n}" for n in range(12)}
    assert next(p for p in store.problems if p.document == "b.parquet/3").detail == "of a.jsonl/3"


def test_duplicates_are_dropped(folder: Path, tmp_path: Path) -> None:
    (folder / "copy.txt").write_text(TEXTS[5])
    near = "A rather long text about this and that, word after word, line after line, and so on. " * 3
    words = [f"w{n}" for n in range(400)]
    (folder / "x1.txt").write_text(near + " ".join(words))
    (folder / "x2.txt").write_text(near + " ".join([*words[:200], "other", *words[200:]]))
    (folder / "empty1.txt").touch()
    (folder / "empty2.txt").touch()
    dropped = make(tmp_path / "dropped", folder, duplicates="drop")
    assert {"copy.txt", "x1.txt", "x2.txt", "empty1.txt", "empty2.txt"} - texts_of(dropped).keys() == {"copy.txt"}
    near_dropped = make(tmp_path / "near", folder, duplicates="near", near_threshold=0.7)
    assert {"copy.txt", "x1.txt", "x2.txt"} - texts_of(near_dropped).keys() == {"copy.txt", "x2.txt"}
    assert near_dropped.manifest.problems["near-duplicate/dropped"] == 1
    for store in (dropped, near_dropped):
        assert verify(store.path) == []


def test_urls(tmp_path: Path, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/books/{path.name}", path.read_bytes())
    local, remote = make(tmp_path / "a", folder), make(tmp_path / "b", "memory://books")
    assert files_of(local.path) == files_of(remote.path)
    assert make(tmp_path / "b", "memory://books").n_rows == remote.n_rows  # already built: compared by content
    memory.pipe_file("/books/03.txt", TEXTS[3].upper().encode())
    with pytest.raises(DataError, match=r"1 document changed: 03.txt"):
        make(tmp_path / "b", "memory://books")


def test_encodings_and_normalization(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffcaf\xe9\r\nna\xefve\rend".encode("utf-16-le"))
    utf_16 = TextSettings(encoding="utf-16-le")
    kept = make(tmp_path / "kept", tmp_path / "a.txt", tokenizer=str(tokenizer_file), text=utf_16)
    assert texts_of(kept) == {"a.txt": "\ufeffcaf\xe9\r\nna\xefve\rend".encode()}
    normalized = utf_16.model_copy(update={"normalize": ("bom", "newlines")})
    clean = make(tmp_path / "clean", tmp_path / "a.txt", tokenizer=str(tokenizer_file), text=normalized)
    assert texts_of(clean) == {"a.txt": "caf\xe9\nna\xefve\nend".encode()}
    assert verify(clean.path) == []
    with pytest.raises(DataError, match="--tokenizer bytes takes bytes as they are"):
        make(tmp_path / "bytes", tmp_path / "a.txt", text=normalized)


def test_a_piece_that_was_read_as_many_documents_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "chorale.npy", np.ones((50, 4), np.uint8))
    settings = BuildSettings((str(tmp_path),), "integers", tmp_path / "store", vocab_size=100, seq_len=64)
    assert build(settings).notes == (
        "50 documents out of arrays have 6 tokens (the median). An array of more than one dimension is a document for "
        "each item of the first: if such an array is one piece, save it "
        "flat, or with a leading dimension of 1",
    )
    np.save(tmp_path / "chorale.npy", np.ones((1, 50, 4), np.uint8))
    assert build(replace(settings, output=tmp_path / "whole")).notes == ()


def test_integer_arrays(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    melody = np.arange(300, dtype=np.int64) % 128
    np.savez(tmp_path / "images.npz", x=images)
    np.save(tmp_path / "melody.npy", melody)
    store = make(tmp_path / "store", tmp_path, tokenizer="integers", vocab_size=256)
    assert (store.vocab_size, store.manifest.bos_id) == (258, 256)
    texts = texts_of(store)
    assert texts["images.npz/3"] == images[3].tobytes()
    assert texts["melody.npy/0"] == melody.astype(np.uint8).tobytes()
    assert verify(store.path) == []
    message = (
        r"has the value 100 at place 100: expected 0 to 99: mend it, leave it out, give a larger --vocab-size .add a"
    )
    way_out = r"or build with --on-bad encoding=skip; skip leaves the whole document out\. What"
    with pytest.raises(DataError, match=rf"melody.npy.*{message} .* {way_out}"):
        make(tmp_path / "other", tmp_path / "melody.npy", tokenizer="integers", vocab_size=100)
    with pytest.raises(
        DataError, match=r"images.npz has the value \d+ at place \d+, item 0 of its array x: expected 0 to 99: mend"
    ):
        make(tmp_path / "other", tmp_path / "images.npz", tokenizer="integers", vocab_size=100)
    policies = {"encoding": "skip"}
    rest = make(tmp_path / "rest", tmp_path, tokenizer="integers", vocab_size=128, policies=policies)
    assert list(texts_of(rest)) == ["melody.npy/0"]
    assert rest.manifest.problems == {"encoding/dropped": 5}


def test_bad_documents(tmp_path: Path, tokenizer_file: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "good.txt").write_text("good\n")
    (corpus / "latin.txt").write_bytes(b"caf\xe9\n" * 3)
    (corpus / "empty.txt").touch()
    (corpus / "cut.txt.gz").write_bytes(gzip.compress(TEXTS[11].encode() * 400)[:-50])
    (corpus / "lines.jsonl").write_text('{"text": "one"}\n{broken\n{"text": "%s"}\n{"text": "two"}\n' % ("x" * 500))
    text = TextSettings(max_record_bytes=300)

    def attempt(name: str, **policies: str) -> Store:
        return make(tmp_path / name, corpus, tokenizer=str(tokenizer_file), text=text, policies=policies)

    with pytest.raises(DataError, match=r"cut.txt.gz.*--on-bad truncated=replace or truncated=skip"):
        attempt("a")
    with pytest.raises(DataError, match=r"latin.txt.*--on-bad encoding=replace or encoding=skip"):
        attempt("a", truncated="skip")
    with pytest.raises(DataError, match=r"lines.jsonl.*--on-bad unreadable=skip"):
        attempt("a", truncated="skip", encoding="skip")
    (corpus / "z.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')  # no --encoding, which --tokenizer bytes refuses
    with pytest.raises(DataError, match=r"z.jsonl.*: mend it, leave it out, or build with --on-bad encoding=replace"):
        make(tmp_path / "bytes", corpus / "z.jsonl")
    (corpus / "z.jsonl").unlink()
    rest = {"unreadable": "skip", "oversized": "skip"}
    store = attempt("a", truncated="skip", encoding="skip", empty="skip", **rest)
    assert texts_of(store) == {"good.txt": b"good\n", "lines.jsonl/0": b"one", "lines.jsonl/3": b"two"}
    counts = {
        "empty/dropped": 1,
        "encoding/dropped": 1,
        "oversized/dropped": 1,
        "truncated/dropped": 1,
        "unreadable/dropped": 1,
    }
    assert store.manifest.problems == counts == summary(store)["problems"]
    found = {problem.document: problem.problem for problem in store.problems}
    assert found == {
        "cut.txt": "truncated",
        "empty.txt": "empty",
        "latin.txt": "encoding",
        "lines.jsonl/1": "unreadable",
        "lines.jsonl/2": "oversized",
    }
    assert "encoding" in inspect(store)
    kept = attempt("b", truncated="replace", encoding="replace", **rest)
    texts = texts_of(kept)
    assert texts["latin.txt"].decode() == "caf\ufffd\n" * 3
    assert texts["empty.txt"] == b""
    assert (TEXTS[11].encode() * 400).startswith(texts["cut.txt"])
    assert len(texts["cut.txt"]) > 1000
    for built in (store, kept):
        assert verify(built.path) == []


def test_bad_bytes_in_a_document_of_several_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_file: Path
) -> None:

    monkeypatch.setattr(stages, "TASK_BYTES", (1 << 20, 1 << 20))
    lines = b"a line of text, over and over again\n" * 100_000
    (tmp_path / "big.txt").write_bytes(lines[: 3 << 20] + b"\xff\n" + lines)
    (tmp_path / "good.txt").write_text("good\n")
    inputs = (tmp_path / "big.txt", tmp_path / "good.txt")
    options = {"tokenizer": str(tokenizer_file), "seq_len": 1 << 16}
    skipped = make(tmp_path / "a", *inputs, **options, policies={"encoding": "skip"})
    assert texts_of(skipped) == {"good.txt": b"good\n"}
    replaced = make(tmp_path / "b", *inputs, **options, policies={"encoding": "replace"})
    assert texts_of(replaced)["big.txt"] == (lines[: 3 << 20] + b"\xff\n" + lines).decode(errors="replace").encode()
    assert verify(replaced.path) == []


@pytest.mark.parametrize("stride", [None, 50])
def test_windows_of_one_book(folder: Path, tmp_path: Path, stride: int | None) -> None:
    store = make(tmp_path / "store", folder, packing="book", stride=stride)
    assert all(len(store.segments_of(row)) == 1 for row in range(store.n_rows))
    assert list(texts_of(store).values()) == [text.encode() for text in TEXTS]
    assert verify(store.path) == []
    record = store.manifest.splits["train"]
    assert record.placed_tokens == store.valid_tokens.sum()
    assert (record.placed_tokens > record.tokens) == (stride is not None)
    assert record.mixed_rows == 0


def test_without_bos_and_eos(folder: Path, tmp_path: Path) -> None:
    store = make(tmp_path / "store", folder, bos=False, eos=False, packing="stream")
    rows = [decode_row(store, row) for row in range(store.n_rows)]
    assert b"".join(rows) == "".join(TEXTS).encode()
    assert sum(split.tokens for split in store.manifest.splits.values()) == len("".join(TEXTS))
    assert verify(store.path) == []


def test_append(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"
    before = make(output, folder, split={"val": 0.3}, duplicates="drop")
    old_files = files_of(output)
    old_rows = [before.read_row(row) for row in range(before.n_rows)]
    with pytest.raises(DataError, match="does not exist"):
        make(tmp_path / "nothing", folder, append=True)
    (folder / "new.txt").write_text("a new document\n" * 40)
    (folder / "copy.txt").write_text(TEXTS[4])
    with pytest.raises(DataError, match=r"2 documents added: copy.txt, new.txt.*--append"):
        make(output, folder, split={"val": 0.3}, duplicates="drop")
    with pytest.raises(DataError, match=r"seq_len: 128 -> 64; .*64\. To --append, give the options that it was "):
        make(output, folder, split={"val": 0.3}, duplicates="drop", seq_len=64, append=True)
    after = make(output, folder, split={"val": 0.3}, duplicates="drop", append=True)
    assert texts_of(after) == {**texts_of(before), "new.txt": b"a new document\n" * 40}
    assert [problem.document for problem in after.problems] == ["copy.txt"]
    assert all((output / name).read_bytes() == data for name, data in old_files.items() if name != "manifest.json")
    assert all(np.array_equal(after.read_row(row), tokens) for row, tokens in enumerate(old_rows))
    assert verify(output) == []
    files = files_of(output)
    again = make(output, folder, split={"val": 0.3}, duplicates="drop", append=True)
    assert (files_of(output), again.n_rows) == (files, after.n_rows)
    (folder / "new.txt").write_text("another text\n")
    with pytest.raises(DataError, match=r"new.txt is not what the store was built from under the name 'new.txt'"):
        make(output, folder, split={"val": 0.3}, duplicates="drop", append=True)
    assert len({document.split for document in before.documents}) == 2


@pytest.mark.parametrize("fresh", ["", "fresh text"])
def test_append_of_a_single_copy(folder: Path, tmp_path: Path, fresh: str) -> None:
    before = make(tmp_path / "store", folder, duplicates="drop")
    added = tmp_path / "added"
    added.mkdir()
    (added / "copy.txt").write_text(TEXTS[1])
    (added / "fresh.txt").write_text(fresh)
    after = make(tmp_path / "store", added, duplicates="drop", append=True)
    assert texts_of(after) == {**texts_of(before), "fresh.txt": fresh.encode()}
    assert ("copy.txt", "dropped") in [(problem.document, problem.action) for problem in after.problems]
    assert verify(after.path) == []


def test_append_of_nothing_new(folder: Path, tmp_path: Path) -> None:
    """Copies alone are not read again with the next append, nor do they stand in its way."""
    before = make(tmp_path / "store", folder, duplicates="drop")
    added = tmp_path / "added"
    added.mkdir()
    (added / "copy.txt").write_text(TEXTS[1])
    after = make(tmp_path / "store", added, duplicates="drop", append=True)
    assert (after.n_rows, texts_of(after)) == (before.n_rows, texts_of(before))
    assert [(problem.document, problem.action) for problem in after.problems[-1:]] == [("copy.txt", "dropped")]
    (added / "fresh.txt").write_text("fresh text")
    last = make(tmp_path / "store", added, duplicates="drop", append=True)
    assert texts_of(last) == {**texts_of(before), "fresh.txt": b"fresh text"}
    assert verify(last.path, sources=[str(folder), str(added)]) == []


@pytest.mark.parametrize("split", [{}, {"val": 0.5}])
def test_documents_of_no_tokens_are_left_out(folder: Path, tmp_path: Path, split: dict[str, float]) -> None:
    """An empty one has no place in any row, and would make a split of no rows."""
    for number in range(10):
        (folder / f"corpus{number}.jsonl").write_text('{"text": ""}\n' * 2)
    store = make(tmp_path / "store", folder, bos=False, eos=False, split=split)
    assert all(texts_of(store).values())
    assert store.manifest.problems == {"empty/dropped": 20}
    assert verify(store.path) == []


def test_documents_stay_in_their_split_when_others_come(folder: Path, tmp_path: Path) -> None:
    few = make(tmp_path / "few", *sorted(folder.iterdir())[::2], split={"val": 0.3})
    all_of_them = make(tmp_path / "all", folder, split={"val": 0.3})
    splits = {document.name: document.split for document in all_of_them.documents}
    assert all(splits[document.name] == document.split for document in few.documents)


def test_nothing_is_left(tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(
        DataError, match=r"left of the 1 that were found: 1 with the problem encoding\. Change --on-bad,"
    ):
        make(tmp_path / "out", tmp_path / "a.txt", tokenizer=str(tokenizer_file), policies={"encoding": "skip"})
