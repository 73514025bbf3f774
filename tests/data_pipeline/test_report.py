"""The figures of a store, and stores that have hardly any."""

import json
from pathlib import Path

import numpy as np
from small_stores import write_store

from data_pipeline.manifest import ProblemRecord
from data_pipeline.report import inspect, length_histogram, summary
from data_pipeline.store import Store, list_part, part_path
from data_pipeline.tokenizer import load_tokenizer


def make(path: Path, contents: dict[str, bytes], **settings: object) -> Store:
    write_store(path, contents, **settings)  # type: ignore[arg-type]
    return Store.open(path)


def test_figures(tmp_path: Path) -> None:
    contents = {"a": b"x" * 14, "b": b"y" * 5, "c": b"z" * 6, "v": b"w" * 30}
    problems = [ProblemRecord("bad", "encoding", "dropped", ""), ProblemRecord("a", "duplicate", "kept", "of b")]
    figures = summary(make(tmp_path / "s", contents, val=["v"], problems=problems))
    assert figures == json.loads(json.dumps(figures))
    assert {key: figures[key] for key in ("documents", "bytes", "tokens", "rows", "mixed_rows", "parts")} == {
        "documents": 4,
        "bytes": 55,
        "tokens": 63,
        "rows": 4,
        "mixed_rows": 1,
        "parts": 1,
    }
    assert figures["bytes_per_token"] == 55 / 63
    assert figures["padding_share"] == 1 / 64
    assert figures["mixed_rows_share"] == 1 / 4
    assert figures["byte_fallback_share"] == 0
    assert figures["problems"] == {"encoding/dropped": 1, "duplicate/kept": 1}
    stored = sum(path.stat().st_size for path in (tmp_path / "s" / "tokens").rglob("*") if path.is_file())
    assert figures["stored_bytes_per_token"] == stored / 63
    assert figures["longest"][:2] == [
        {"name": "v", "split": "val", "tokens": 32},
        {"name": "a", "split": "train", "tokens": 16},
    ]
    assert figures["splits"]["val"]["tokens"] == 32
    assert figures["splits"]["train"]["padding_share"] == 1 / 32
    assert figures["length_histogram"] == [
        {"from": 4, "to": 7, "documents": 1},
        {"from": 8, "to": 15, "documents": 1},
        {"from": 16, "to": 31, "documents": 1},
        {"from": 32, "to": 63, "documents": 1},
    ]


def test_overlapping_windows_are_not_padding(tmp_path: Path) -> None:
    figures = summary(make(tmp_path / "s", {"a": bytes(30)}, packing="book", stride=8))
    assert (figures["rows"], figures["tokens"], figures["padding_share"]) == (3, 32, 0.0)
    assert figures["stride"] == 8


def test_appended_parts_count(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": b"x" * 14})
    write_store(part_path(tmp_path / "s", "0001"), {"b": b"y" * 30})
    list_part(tmp_path / "s", "0001")
    figures = summary(Store.open(tmp_path / "s"))
    assert (figures["documents"], figures["tokens"], figures["rows"], figures["parts"]) == (2, 48, 3, 2)
    assert ", in 2 parts" in inspect(Store.open(tmp_path / "s"))


def test_what_people_read(tmp_path: Path, tokenizer_file: Path) -> None:
    problems = [ProblemRecord(f"{number}", "empty", "replaced", "") for number in range(1200)]
    contents = {"short.txt": b"fox", "long.txt": b"The quick brown fox. " * 40}
    write_store(tmp_path / "s", contents, load_tokenizer(str(tokenizer_file)), problems=problems)
    text = inspect(Store.open(tmp_path / "s"))
    for words in (
        "packing bestfit, sentencepiece tokenizer of",
        "bytes per token, 0.000% byte fallback",
        "of rows with more than one document",
        "stored bytes per token",
        "problems: 1,200 empty replaced: problems.jsonl lists them",
        "documents by length in tokens:",
        "  train  long.txt",
    ):
        assert words in text
    assert text.index("long.txt") < text.index("short.txt")
    assert "#" * 40 in text
    assert "#" * 41 not in text


def test_what_bytes_and_integers_do_not_have_is_not_shown(tmp_path: Path, tokenizer_file: Path) -> None:
    for name in ("bytes", "integers", "text"):
        tokenizer = load_tokenizer(str(tokenizer_file) if name == "text" else name, 256 if name == "integers" else None)
        write_store(tmp_path / name, {"a": b"xyz"}, tokenizer)
        text = inspect(Store.open(tmp_path / name))
        for words in ("bytes/token", " bytes per token, ", "byte fallback"):
            assert (words in text) == (name == "text")
        header, row = text.splitlines()[1:3]
        assert len(header.replace("mixed rows", "mixed").split()) == len(row.split())


def test_the_histogram_is_exact_at_powers_of_two() -> None:
    lengths = np.array([0, 0, 1, 2, 3, 4, 2**31 - 1, 2**31, 2**53])
    found = {(entry["from"], entry["to"]): entry["documents"] for entry in length_histogram(lengths)}
    assert {span: count for span, count in found.items() if count} == {
        (0, 0): 2,
        (1, 1): 1,
        (2, 3): 2,
        (4, 7): 1,
        (2**30, 2**31 - 1): 1,
        (2**31, 2**32 - 1): 1,
        (2**53, 2**54 - 1): 1,
    }
    assert len(found) == 55


def test_stores_of_next_to_nothing(tmp_path: Path) -> None:
    cases = [{"a": b""}, {"a": b"", "b": b"", "c": b"x"}, {"one": b"a single document"}]
    for number, contents in enumerate(cases):
        for marks in (True, False):
            store = make(tmp_path / f"{number}{marks}", contents, bos=marks, eos=marks)
            assert f"{len(contents):>9}" in inspect(store)
            assert summary(store)["documents"] == len(contents)
    empty = Store.open(tmp_path / "0False")
    assert summary(empty)["padding_share"] == summary(empty)["bytes_per_token"] == 0
    assert summary(empty)["length_histogram"] == [{"from": 0, "to": 0, "documents": 1}]
