"""A tokenizer is trained on a sample that is bounded, seeded and drawn from all kinds of files."""

import gzip
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline import documents, files, training
from data_pipeline.blocks import BLOCK_BYTES
from data_pipeline.config import TextSettings, text_settings
from data_pipeline.documents import Reading, Span
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile, find_files
from data_pipeline.tokenizer import PIECE_CHARS, load_tokenizer
from data_pipeline.training import (
    TrainingSettings,
    draw_sample,
    draw_spans,
    join_small,
    keep_at_random,
    rare_characters,
    record_path,
    sentences_of,
    train_tokenizer,
)


def settings(corpus: Path, output: Path, **changes: object) -> TrainingSettings:
    return TrainingSettings(**{"inputs": (str(corpus),), "output": output, "vocab_size": 530, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_training_is_reproducible(model_type: str, corpus: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.model", tmp_path / "two.model"
    assert train_tokenizer(settings(corpus, one, model_type=model_type))
    assert train_tokenizer(settings(corpus, two, model_type=model_type))
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.model",
        "one.model.json",
        "two.model",
        "two.model.json",
    ]


def test_training_again_is_no_work_and_otherwise_is_refused(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.model"
    train_tokenizer(settings(corpus, output))
    before = output.stat().st_mtime_ns
    assert not train_tokenizer(settings(corpus, output))
    assert output.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"vocab_size 530 -> 540.*another --output, or delete it"):
        train_tokenizer(settings(corpus, output, vocab_size=540))
    output.unlink()  # the way out; the record that it leaves behind is no obstacle
    assert train_tokenizer(settings(corpus, output, vocab_size=540))
    record_path(output).write_text("[]")
    with pytest.raises(DataError, match=r"vocab_size None -> 530"):
        train_tokenizer(settings(corpus, output))
    record_path(output).unlink()
    with pytest.raises(DataError, match="does not say how it was made"):
        train_tokenizer(settings(corpus, output))


def test_more_characters_than_the_vocabulary_holds_are_spelled_in_bytes(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(400)]
    text = "".join(f"{rng.choice(words)} {rng.choice(words)}{chr(0x4E00 + i % 3000)}" for i in range(9_000)) + "\n"
    (tmp_path / "chinese.txt").write_text(text, encoding="utf-8")
    train_tokenizer(settings(tmp_path / "chinese.txt", tmp_path / "a.model", vocab_size=600))
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    assert tokenizer.vocab_size == 600
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()


def test_no_character_is_rare_where_the_frequent_ones_fit() -> None:
    assert rare_characters(Counter("abc" * 1000), 530) == ""
    assert rare_characters(Counter({"a": 3, "]": 2, "c": 1, "-": 1}), 256 + 6 + 2) == "]c-"


def test_a_model_of_text_without_spaces_keeps_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("道可道非常道名可名" * 50)
    train_tokenizer(settings(tmp_path, tmp_path / "a.model", vocab_size=268))
    tokenizer = load_tokenizer(str(tmp_path / "a.model"))
    assert len(tokenizer.encode(b" ")) == 1
    assert tokenizer.decode(tokenizer.encode(b" a  b ")) == b" a  b "


def sample(folder: Path, max_bytes: int, seed: int = 0, **text: object) -> list[str]:
    """The sentences of a sample of a folder."""
    reading = Reading(TextSettings(**text), "sentencepiece")  # type: ignore[arg-type]
    found = find_files([str(folder)], {}, arrays=False)
    return list(sentences_of(draw_sample(found, reading, max_bytes, seed)))


def test_the_sample_is_bounded_seeded_and_cut(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_bytes(f"{name} a line\n".encode() * 40_000)
    (tmp_path / "long.txt").write_bytes("가".encode() * 50_000)
    everything = sample(tmp_path, 10**9)
    assert sum(len(line.encode()) for line in everything) == 6 * 40_000 * 8 + 150_000
    assert max(len(line.encode()) for line in everything) <= 4_192
    some = sample(tmp_path, 500_000)
    assert 400_000 < sum(len(line.encode()) + 1 for line in some) < 700_000
    assert len({line[:1] for line in some}) > 2
    assert sample(tmp_path, 500_000) == some
    assert sample(tmp_path, 500_000, seed=1) != some


LINES = [f"line {number} of the text" for number in range(9_000)]


def write_plain(path: Path) -> None:
    path.with_suffix(".txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")


def write_gzip(path: Path) -> None:
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(("\n".join(LINES) + "\n").encode()))


def write_json(path: Path) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES}), path.with_suffix(".parquet"))


@pytest.mark.parametrize("write", [write_plain, write_gzip, write_json, write_parquet])
def test_every_kind_of_file_is_sampled(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "a")
    assert sample(tmp_path, 10**9) == LINES
    few = sample(tmp_path, 1)
    assert 0 < sum(map(len, few)) <= PIECE_CHARS
    assert set(few) < set(LINES)


def test_an_encoding_and_what_is_normalized_decide_the_sample(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff하나\r\n둘\r\n".encode("utf-16-le"))
    assert sample(tmp_path, 1000, encoding="utf-16-le", normalize=("bom", "newlines")) == ["하나", "둘"]
    assert sample(tmp_path, 1000, encoding="utf-16-le") == ["\ufeff하나\r", "둘\r"]


def file(name: str, n_bytes: int) -> InputFile:
    return InputFile(name.removesuffix(".gz"), "/" + name, n_bytes, 0, split=None)


def drawn(found: list[InputFile], max_bytes: int, seed: int = 0) -> list[tuple[Span, float]]:
    return list(draw_spans(found, TextSettings(), max_bytes, seed))


def test_of_a_small_corpus_everything_is_read() -> None:
    found = [file("a.txt", 5 * BLOCK_BYTES // 2), file("b.txt.gz", 3 * BLOCK_BYTES), file("c.txt", 0), file("d.txt", 1)]
    block = BLOCK_BYTES
    assert drawn(found, 6 * block) == [
        (Span(0, 0, block), float("inf")),
        (Span(0, block, 2 * block), float("inf")),
        (Span(0, 2 * block, 5 * block // 2), float("inf")),
        (Span(1, 0, 3 * block), float("inf")),
        (Span(3, 0, 1), float("inf")),
    ]


TERABYTE = 10**12


@pytest.mark.parametrize(
    "found",
    [
        [file("a.txt", TERABYTE)],
        [file("a.txt.gz", TERABYTE)],
        [file("a.txt", TERABYTE // 2), file("b.txt.gz", TERABYTE // 2)],
        [file(f"{number:05}.txt.gz", TERABYTE // 10_000) for number in range(10_000)],
    ],
)
def test_of_a_terabyte_no_more_is_read_than_was_asked_for(found: list[InputFile]) -> None:
    budget = 256 * BLOCK_BYTES
    spans = drawn(found, budget)
    assert budget * 0.98 < sum(min(span.stop - span.start, n_chars) for span, n_chars in spans) < budget * 1.01
    assert len({span.file for span, _ in spans}) >= min(len(found), 240)
    assert drawn(found, budget) == spans
    if found[0].compression == "" or len(found) > 1:
        assert drawn(found, budget, seed=1) != spans


def test_of_many_tiny_files_enough_are_read() -> None:
    found = [file(f"{number:06}.txt", 5_000) for number in range(100_000)]
    spans = drawn(found, 10**8)
    assert 0.99e8 < sum(span.stop - span.start for span, _ in spans) <= 10**8


def test_a_file_that_cannot_be_cut_is_read_no_further_than_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    text = "".join(f"{rng.getrandbits(64):x}\n" for _ in range(400_000))  # 6.8 MB, 3.9 MB compressed
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(), compresslevel=1))
    n_read = 0

    def counted(found: InputFile, start: int = 0) -> object:
        nonlocal n_read
        for chunk in files.read_content(found, start):
            n_read += len(chunk)
            yield chunk

    monkeypatch.setattr(documents, "read_content", counted)
    lines = sample(tmp_path, 2 * BLOCK_BYTES // training.READ_FACTOR)
    assert BLOCK_BYTES < n_read < 3.2 * BLOCK_BYTES
    assert set(lines) <= set(text.split("\n"))


def test_small_texts_are_joined_and_large_ones_cut() -> None:
    texts = ["one", "two\n", "", "three"] * 20_000 + ["x" * 3 * PIECE_CHARS, "last"]
    pieces = [piece.decode() for piece in join_small(texts)]
    assert max(map(len, pieces)) <= PIECE_CHARS
    assert len(pieces) == 5 + 3 + 1  # 320,000 characters in small texts, the large one, the last
    assert "".join(pieces).replace("\n", "") == "".join(texts).replace("\n", "")
    assert list(join_small(["", ""])) == []


def test_pieces_are_kept_at_random_in_order() -> None:
    pieces = [bytes([number]) * 10 for number in range(100)]
    assert keep_at_random(pieces, 1_000, random.Random(0)) == pieces
    times_kept: Counter[bytes] = Counter()
    for seed in range(200):
        kept = keep_at_random(pieces, 195, random.Random(seed))
        assert len(kept) == 20
        assert kept == sorted(kept)
        times_kept.update(kept)
    assert len(times_kept) == 100  # each has a chance of 1 in 5, 200 times
    assert 15 < min(times_kept.values()) < max(times_kept.values()) < 70


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"fine\ncaf\xe9 au lait\n", r"bad\.txt is not valid utf-8 at byte 8 .*--on-bad encoding=replace"),
        (
            "cut.txt.gz",
            gzip.compress(b"some text" * 99, mtime=0)[:-9],
            r"cut\.txt ends early.*--on-bad truncated=replace",
        ),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 1}\n', r"a record of bad\.jsonl .*--on-bad unreadable=skip$"),
    ],
)
def test_bad_documents_are_refused_or_left_out(
    name: str, content: bytes, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "good.txt").write_text("good\n")
    (tmp_path / name).write_bytes(content)
    found = find_files([str(tmp_path)], {}, arrays=False)
    with pytest.raises(DataError, match=message):
        draw_sample(found, Reading(TextSettings(), "sentencepiece"), 1000, seed=0)
    skipping = Reading(
        TextSettings(), "sentencepiece", policies=dict.fromkeys(("encoding", "truncated", "unreadable"), "skip")
    )
    with caplog.at_level(logging.INFO):
        kept = b"".join(draw_sample(found, skipping, 1000, seed=0))
    assert b"good\n" in kept
    assert b"caf" not in kept
    n_files = 2 if name == "bad.jsonl" else 1  # whose first record is good
    assert ": left out once in what was read for the sample\n" in caplog.text
    assert f"sample to train on: {len(kept)} bytes out of {n_files} of 2 files\n" in caplog.text


def test_invalid_bytes_are_replaced_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait\n")
    found = find_files([str(tmp_path)], {}, arrays=False)
    reading = Reading(TextSettings(), "sentencepiece", policies={"encoding": "replace"})
    with caplog.at_level(logging.WARNING):
        assert draw_sample(found, reading, 1000, seed=0) == ["caf\ufffd au lait\n".encode()]
    assert "note: encoding: replaced once in" in caplog.text


def test_inputs_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n')
    with pytest.raises(DataError, match="hold no text"):
        sample(tmp_path, 1000)


def test_what_decided_the_model_is_recorded(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some words to train on, and more of them\n" * 30)
    output = tmp_path / "a.model"
    small = settings(text, output, vocab_size=280)
    assert train_tokenizer(small)
    text.write_text("some words to train on, and MORE of them\n" * 30)
    with pytest.raises(DataError, match="sample_sha256"):
        train_tokenizer(small)
    text.write_text("some words to train on, and more of them\n" * 31)
    with pytest.raises(DataError, match="n_bytes 1230 -> 1271"):
        train_tokenizer(small)
    text.write_text("some words to train on, and more of them\n" * 30)
    with pytest.raises(DataError, match=r"text .*utf-8.* -> .*iso8859-1"):
        train_tokenizer(settings(text, output, vocab_size=280, text=text_settings("latin-1", (), "text", 1000)))
    assert not train_tokenizer(small)


def test_what_unigram_is_slow_on_is_said() -> None:
    assert not training.is_slow(Counter({"A": 249_999, "C": 250_000, "G": 250_000, "T": 250_000}))
    assert training.is_slow(Counter({"A": 250_000, "C": 250_000, "G": 250_000, "T": 250_000, "\n": 9}))
    assert not training.is_slow(Counter({"a": 900_000, " ": 100_000}))
    assert not training.is_slow(Counter({chr(0x4E00 + i): 10_000 for i in range(100)}))


def test_ctrl_c_ends_the_training_at_once(tmp_path: Path) -> None:
    """SentencePiece itself would go on for half a minute."""
    (tmp_path / "genome.txt").write_text("".join(random.Random(0).choices("ACGT", k=1_100_000)))
    options = ["--input", "genome.txt", "--output", "genome.model", "--vocab-size", "500"]
    process = subprocess.Popen(
        [sys.executable, "-m", "data_pipeline", "tokenizer", *options],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr
    said = [process.stderr.readline() for _ in range(2)]
    assert said[0] == "sample to train on: 1,100,000 bytes out of 1 of 1 files\n"
    assert said[1].startswith("note: 4 different characters and hardly a space between them, as in a genome: unigram ")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert process.communicate(timeout=60) == (None, "error: interrupted\n")
    assert process.returncode == 130 and time.monotonic() - begun < 10
    assert [path.name for path in tmp_path.iterdir()] == ["genome.txt"]


def test_a_long_training_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(training, "SIGN_OF_LIFE_S", 0.05)
    with caplog.at_level(logging.INFO):
        training._in_a_thread(lambda: time.sleep(0.3))
    assert "still training, after 0 s" in caplog.text
