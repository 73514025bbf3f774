"""How much of held-out documents stands in training documents: compared with sets of tuples, in every packing."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
from small_stores import write_store

from data_pipeline import document_tokens, longest_runs, rolling, window_search
from data_pipeline.build import build
from data_pipeline.cli import main
from data_pipeline.config import BuildSettings
from data_pipeline.errors import DataError
from data_pipeline.overlap import DocumentOverlap, find_overlap
from data_pipeline.store import Store
from data_pipeline.tokenizer import IntegerTokenizer
from data_pipeline.window_index import WindowIndex, longest_common_run

PACKINGS = [
    {},
    {"bos": False, "eos": False},
    {"packing": "stream"},
    {"packing": "stream", "bos": False, "eos": False},
    {"packing": "book"},
    {"packing": "book", "stride": 5},
    {"packing": "book", "stride": 2, "bos": False, "eos": False},
]


class Expected(NamedTuple):
    """By the plainest code: how many tokens overlap, the longest run, and all documents that have one as long."""

    overlapping: int
    longest: int
    documents: set[str]


def expect(text: bytes, train: Mapping[str, bytes], n: int) -> Expected:
    there = {window for other in train.values() for window in windows(other, n)}
    covered = {i + k for i, window in enumerate(windows(text, n)) if window in there for k in range(n)}
    longest, documents = 0, set[str]()
    for length in range(n, len(text) + 1):
        runs = set(windows(text, length))
        if having := {name for name, other in train.items() if runs & set(windows(other, length))}:
            longest, documents = length, having
    return Expected(len(covered), longest, documents)


def windows(text: bytes, n: int) -> list[tuple[int, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def random_documents(seed: int, alphabet: int = 3, most: int = 70) -> dict[str, bytes]:
    """Some of no byte and some longer than several rows."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, most, 12)
    return {f"{i}": random.integers(0, alphabet, n).astype(np.uint8).tobytes() for i, n in enumerate(lengths)}


def check(path: Path, contents: Mapping[str, bytes], val: list[str], n: int, **settings: object) -> None:
    """Compares with the twin."""
    write_store(path, contents, val=val, **settings)
    store = Store.open(path)
    overlaps = find_overlap(store, ["val"], [store], n, n_worst=len(val))
    train = {name: text for name, text in contents.items() if name not in val}
    assert sorted(one.name for one in overlaps) == sorted(val)
    for one in overlaps:
        expected = expect(contents[one.name], train, n)
        assert (one.tokens, one.overlapping) == (len(contents[one.name]), expected.overlapping)
        if one.longest is None:
            assert expected.longest == 0
        else:
            assert one.longest.tokens == expected.longest
            assert one.longest.document in expected.documents
            assert one.longest.store == str(path)
    shares = [one.share for one in overlaps]
    assert shares == sorted(shares, reverse=True)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are read, hashed and looked up at a time."""
    monkeypatch.setattr(document_tokens, "_BATCH_TOKENS", 32)
    monkeypatch.setattr(window_search, "_BATCH_TOKENS", 24)
    monkeypatch.setattr(rolling, "_STEP", 7)
    monkeypatch.setattr(longest_runs, "_PART_TOKENS", 3)


@pytest.mark.parametrize("settings", PACKINGS, ids=lambda settings: " ".join(map(str, settings.values())) or "bestfit")
@pytest.mark.parametrize("n", [1, 5, 18])
def test_the_slow_twin(tmp_path: Path, small_steps: None, settings: dict[str, object], n: int) -> None:
    """Rows have 16 tokens: windows cross rows, those of 18 always."""
    for seed in range(2):
        contents = random_documents(seed, alphabet=2 if n > 4 else 3)
        contents["copy"] = contents["3"][5:] + contents["4"][:20] + contents["5"]  # runs that are longer than by chance
        check(tmp_path / f"{seed}", contents, ["0", "3", "5", "7"], n, **settings)


def test_all_hashes_equal(tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "mix", lambda tokens: np.zeros(len(tokens), np.uint64))
    assert not rolling.window_hashes(np.arange(9), 3).any()
    for seed in range(2):
        check(tmp_path / f"{seed}", random_documents(seed), ["0", "3", "5"], 4, packing="stream")


def test_some_hashes_equal(tmp_path: Path, small_steps: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are found already have the hashes of others that are not."""
    monkeypatch.setattr(rolling, "mix", lambda tokens: (tokens == 0).astype(np.uint64))
    for seed in range(2):
        check(tmp_path / f"{seed}", random_documents(seed), ["0", "3", "5"], 5)


def test_a_collision_is_no_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "mix", lambda tokens: np.zeros(len(tokens), np.uint64))
    write_store(tmp_path / "s", {"a": bytes(range(60)), "b": bytes(range(100, 160))}, val=["b"])
    store = Store.open(tmp_path / "s")
    assert find_overlap(store, ["val"], [store], 5) == [DocumentOverlap("b", "val", 60, 0)]


def test_parts_that_were_appended(tmp_path: Path) -> None:
    """Documents and rows are numbered on from part to part."""
    passage = bytes(range(97, 120)) * 3
    for name in ("val/v.txt", "one/x.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(passage if name == "val/v.txt" else b"something else")
    settings = BuildSettings(
        inputs=(str(tmp_path / "one"),),
        val_inputs=(str(tmp_path / "val"),),
        tokenizer="bytes",
        output=tmp_path / "store",
        seq_len=32,
        rows_per_shard=2,
    )
    build(settings)
    (tmp_path / "one/y.txt").write_bytes(b"some words, " + passage[10:] + b"and more words")
    store = build(replace(settings, append=True)).store
    assert len(store.parts) == 2
    (one,) = find_overlap(store, ["val"], [store])
    assert (one.overlapping, one.longest and one.longest.document) == (len(passage) - 10, "y.txt")


# What is degenerate


@pytest.mark.parametrize("period", [1, 3, 60])
def test_repetitive_data(tmp_path: Path, period: int) -> None:
    """A million equal windows in documents of both splits. To compare each with each would take days."""
    n = 1_000_000
    unit = np.random.default_rng(0).integers(0, 200, period).astype(np.uint8).tobytes()
    contents = {"train": unit * (n // period), "short": unit * (n // 10 // period), "val": unit * (n // 2 // period)}
    contents["other"] = bytes([201]) * 100 + unit * (n // 3 // period)
    write_store(tmp_path / "s", contents, val=["val", "other"], seq_len=65_536)
    store = Store.open(tmp_path / "s")
    whole, partial = find_overlap(store, ["val"], [store])
    assert (whole.name, whole.share) == ("val", 1.0)
    assert whole.longest is not None and whole.longest.tokens == len(contents["val"])
    assert whole.longest.document == "train"
    assert partial.longest is not None
    assert partial.overlapping == partial.longest.tokens == len(contents["other"]) - 100


def test_many_documents_with_one_preamble(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    preamble, *texts = random.integers(0, 128, (2001, 80), np.uint8)
    contents = {f"{i}": np.concatenate([preamble, text + 128 * (i < 1000)]).tobytes() for i, text in enumerate(texts)}
    write_store(tmp_path / "s", contents, val=[f"{i}" for i in range(1000)], seq_len=4096)
    store = Store.open(tmp_path / "s")
    overlaps = find_overlap(store, ["val"], [store])
    assert {one.overlapping for one in overlaps} == {80}
    assert sum(one.longest is not None for one in overlaps) == 10


def test_parts_are_compared_until_no_run_can_be_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long stretch that holds no more of a text than its first part does, and of many stretches that are alike."""
    read_part = Mock(side_effect=longest_runs.read_part)
    monkeypatch.setattr(longest_runs, "read_part", read_part)
    monkeypatch.setattr(longest_runs, "_PART_TOKENS", 100)
    one, two, three = text_of(1, 60), text_of(2, 60), text_of(3, 60)
    contents = {"train": b"N" * 10_000, "val": b"ACGT" + b"N" * 60 + b"ACGT"}
    contents |= {f"{i}": one + two + three + bytes([i]) for i in range(100)}
    contents["val 2"] = one + two + b"..." + two + three
    write_store(tmp_path / "s", contents, val=["val", "val 2"], seq_len=4096)
    store = Store.open(tmp_path / "s")
    longest = {overlap.name: overlap.longest for overlap in find_overlap(store, ["val"], [store])}
    assert {name: run and run.tokens for name, run in longest.items()} == {"val": 60, "val 2": 120}
    assert read_part.call_count == 2


def test_windows_longer_than_rows_are_not_hashed_again_for_each(tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": text_of(1, 10_000), "b": text_of(2, 7)}, val=[], seq_len=16)
    continuations = document_tokens.read_documents(Store.open(tmp_path / "s"), "train", "read")
    assert 10_000 < sum(len(piece.tokens) for piece in window_search._pieces(continuations, 1_000)) < 25_000


@pytest.mark.parametrize("n", [81, 10**9, 10**23])
def test_windows_longer_than_all_documents(tmp_path: Path, n: int) -> None:
    write_store(tmp_path / "s", {"a": text_of(1, 80), "b": text_of(1, 80)}, val=["b"])
    store = Store.open(tmp_path / "s")
    assert find_overlap(store, ["val"], [store], n) == [DocumentOverlap("b", "val", 80, 0)]


def test_a_stretch_whose_windows_come_from_several_places(tmp_path: Path) -> None:
    """The longest run is then shorter than the stretch."""
    contents = {"val": b"abcdeXb....eXbcdef....", "train": b"abcdeXbcdef", "other": b"1234....", "val 2": b"12345"}
    assert set(windows(contents["train"], 4)) <= set(windows(contents["val"], 4))
    check(tmp_path / "s", contents, ["val", "val 2"], 4)
    # The longest stretch, of 25 in "a", has a run of 8; a shorter one, in "b", is a run of 10.
    periodic = {"val": b"12345123!!!!ABCDEFGHIJ", "a": b"1234512345123451234512345", "b": b"?ABCDEFGHIJ?"}
    check(tmp_path / "t", periodic, ["val"], 4)


def test_stretches_of_different_documents_are_not_one(tmp_path: Path) -> None:
    """The windows of the second begin in its document right where those of the first end in another."""
    passages = text_of(1, 20), text_of(2, 25)
    contents = {"a": b"." * 10 + passages[0], "b": b"." * 26 + passages[1], "val": passages[0] + b"!" + passages[1]}
    check(tmp_path / "s", contents, ["val"], 5, seq_len=64)


# What is inside: WindowIndex and longest_common_run


def test_find_is_exact() -> None:
    tokens = np.array([1, 2, 3, 1, 2, 3, 1, 9], np.uint16)
    index = WindowIndex(tokens, np.array([0, 1, 2, 3, 5]), 3)
    assert index.n_distinct == 4 and index.numbers[0] == index.numbers[3]
    places, numbers = index.find(np.array([3, 1, 2, 3, 1, 2, 5, 3, 1, 9], np.uint16))
    assert places.tolist() == [0, 1, 2, 3, 7]
    assert numbers.tolist() == index.numbers[[2, 0, 1, 2, 4]].tolist()
    assert len(index.find(np.array([1, 2], np.uint16))[0]) == 0


def test_what_is_known_hides_no_window_with_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "mix", lambda tokens: np.zeros(len(tokens), np.uint64))
    index = WindowIndex(np.array([1, 2, 3, 4], np.uint16), np.array([0, 2]), 2)
    places, numbers = index.find(np.array([9, 3, 4], np.uint16), known=np.array([True, False]))
    assert index.numbers[1] in numbers[places == 1]


def test_longest_common_run() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        a, b = (random.integers(0, 2, size).astype(np.uint16) for size in random.integers(1, 40, 2))
        expected = max(
            (k for k in range(1, 41) if set(windows(bytes(a.tolist()), k)) & set(windows(bytes(b.tolist()), k))),
            default=0,
        )
        for at_least in (1, 5, 9):
            assert longest_common_run(a, b, at_least) == (expected if expected >= at_least else 0)


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_main(*arguments: object) -> tuple[int, str, str]:
        code = main(["overlap", *map(str, arguments)])
        return code, *capfd.readouterr()

    return run_main


def text_of(seed: int, n: int) -> bytes:
    return np.random.default_rng(seed).integers(97, 123, n).astype(np.uint8).tobytes()


@pytest.fixture
def novels(tmp_path: Path) -> Path:
    """A novel that is held out is in collected works; of another one a passage of 60 is."""
    contents = {
        "collected.txt": text_of(1, 200) + text_of(2, 300) + text_of(3, 60),
        "unrelated.txt": text_of(4, 500),
        "novel.txt": text_of(2, 300),
        "quoting.txt": text_of(5, 140) + text_of(3, 60),
        "other.txt": text_of(6, 100),
        "note.txt": b"short",
    }
    val = ["novel.txt", "quoting.txt", "other.txt", "note.txt"]
    write_store(tmp_path / "store", contents, val=val)
    return tmp_path / "store"


def test_a_novel_in_collected_works(run: Run, novels: Path, tmp_path: Path) -> None:
    code, out, err = run(novels, "--json", tmp_path / "overlap.json")
    assert (code, err) == (0, "")
    assert out == (
        f"{novels}: tokens in runs of 50 or more that a training document of {novels} has too\n"
        "split  documents  overlapping  tokens  overlapping   share\n"
        "val            4            2     605          360  59.50%\n"
        "1 of the 4 documents of val are shorter than 50 tokens, so they cannot overlap: a lower --min-tokens includes "
        "them\n\n"
        "worst documents  split  tokens    share  longest run  in training document\n"
        "novel.txt          val     300  100.00%          300         collected.txt\n"
        "quoting.txt        val     200   30.00%           60         collected.txt\n"
    )
    figures = json.loads((tmp_path / "overlap.json").read_text())
    assert figures["splits"]["val"] == {
        "documents": 4,
        "overlapping_documents": 2,
        "too_short_documents": 1,
        "tokens": 605,
        "overlapping_tokens": 360,
        "overlapping_share": 360 / 605,
    }
    assert (figures["store"], figures["train"], figures["min_tokens"]) == (str(novels), [str(novels)], 50)
    assert figures["worst"][1] == {
        "name": "quoting.txt",
        "split": "val",
        "tokens": 200,
        "overlapping_tokens": 60,
        "overlapping_share": 0.3,
        "longest_run_tokens": 60,
        "train_document": "collected.txt",
        "train_store": str(novels),
    }


def test_how_many_are_listed(run: Run, novels: Path) -> None:
    assert "novel.txt" in run(novels, "--worst", 1)[1] and "quoting.txt" not in run(novels, "--worst", 1)[1]
    none = run(novels, "--worst", 0)
    assert none[0] == 0 and "59.50%" in none[1] and "novel.txt" not in none[1]


def test_longer_runs(run: Run, novels: Path) -> None:
    out = run(novels, "--min-tokens", 61)[1]
    assert "novel.txt" in out and "quoting.txt" not in out
    out = run(novels, "--min-tokens", 301)[1]
    assert "4 of the 4 documents of val are shorter than 301 tokens" in out and "0.00%" in out


def test_other_stores(run: Run, novels: Path, tmp_path: Path) -> None:
    contents = {"anthology.txt": text_of(9, 40) + text_of(6, 100), "v": b"x"}
    write_store(tmp_path / "more", contents, val=["v"], seq_len=64, packing="stream")
    out = run(novels, "--train", tmp_path / "more")[1]
    assert "anthology.txt\n" in out and "novel.txt" not in out
    out = run(novels, "--train", novels, tmp_path / "more")[1]
    assert f"collected.txt of {novels}\n" in out and f"anthology.txt of {tmp_path / 'more'}\n" in out
    out = run(tmp_path / "more", "--held-out", "train", "--train", novels)[1]
    assert "train          1            0     140" in out
    out = run(novels, "--held-out", "train", "--train", tmp_path / "more")[1]
    assert "train          2            0   1,060" in out


def test_integers(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 100_000, 500).astype("<u4")
    contents = {"t": values.tobytes(), "v": values[100:200].tobytes()}
    write_store(tmp_path / "s", contents, IntegerTokenizer(100_000), val=["v"], packing="book", stride=3)
    store = Store.open(tmp_path / "s")
    (one,) = find_overlap(store, ["val"], [store])
    assert (one.tokens, one.share, one.longest and one.longest.tokens) == (100, 1.0, 100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--min-tokens", 0), ("--min-tokens is 0", "expected 1 or more")),
        (("--worst", -1), ("--worst is -1", "expected 0 or more")),
        (("--held-out", "test"), ("has no split 'test', only train, val",)),
        (("--held-out", "val", "val"), ("names 'val' twice",)),
        (("--held-out", "train"), ("--held-out train is what is searched", "--train")),
        (("--train", "INTEGERS"), ("different tokenizers (integers of 258", "bytes of 258", "build one of them")),
        (("--train", "HELD_OUT"), ("the split 'train' of", "has no rows")),
        (("--train", "/nowhere"), ("/nowhere does not exist",)),
        (("--train", "s3://b/x"), ("s3://b/x is a URL",)),
        (("--json", "/"), ("--json / cannot be written",)),
    ],
)
def test_bad_input(run: Run, novels: Path, tmp_path: Path, options: tuple, words: tuple[str, ...]) -> None:
    write_store(tmp_path / "INTEGERS", {"a": b"text", "v": b"text"}, IntegerTokenizer(256), val=["v"])
    write_store(tmp_path / "HELD_OUT", {"a": b"", "v": b"text"}, val=["v"], bos=False, eos=False)
    named = [tmp_path / option if str(option).isupper() else option for option in options]
    code, out, err = run(novels, *named)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_nothing_is_held_out(run: Run, tmp_path: Path) -> None:
    write_store(tmp_path / "s", {"a": b"text"})
    code, _, err = run(tmp_path / "s")
    assert code == 2 and "has no split that is held out: build it with --split" in err


def test_damage_is_not_passed_over(novels: Path) -> None:
    shard = novels / "tokens/c/0/0"
    data = bytearray(shard.read_bytes())
    data[20] ^= 1
    shard.write_bytes(data)
    store = Store.open(novels)
    with pytest.raises(DataError, match="is damaged in shard"):
        find_overlap(store, ["val"], [store])
