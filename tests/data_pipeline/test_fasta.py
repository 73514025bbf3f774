"""FASTA: each record is a document, its sequence without header and line ends, wherever the file is cut and packed."""

import gzip
import random
from itertools import groupby
from pathlib import Path

import pytest

from data_pipeline.build import build
from data_pipeline.config import BuildSettings
from data_pipeline.decode import decode_document
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.fasta import sequence_pieces
from data_pipeline.store import Store
from data_pipeline.verify import verify

RECORDS = ["ACGTNNNN" * 100, "acgt", "", "A", "TTGACA" * 40]


def fasta(records: list[str], newline: str = "\n", width: int = 60) -> bytes:
    """Lines of at most `width` letters, below a header each; the last line is not ended."""
    lines = []
    for number, record in enumerate(records):
        lines += [f">chr{number} > of {number}", *(record[i : i + width] for i in range(0, len(record), width))]
    return newline.join(lines).encode()


def plain(data: bytes) -> list[str]:
    """Line by line."""
    found: list[str] = []
    for line in data.decode().splitlines():
        if line.startswith(">"):
            found.append("")
        else:
            found[-1] += line.strip()
    return found


def make(output: Path, *inputs: Path, **changes: object) -> Store:
    settings = {"inputs": tuple(map(str, inputs)), "tokenizer": "bytes", "output": output, "seq_len": 64}
    return build(BuildSettings(**{**settings, **changes})).store  # type: ignore[arg-type]


def texts_of(store: Store) -> dict[str, str]:
    return {each.name: b"".join(decode_document(store, each.name)).decode() for each in store.documents}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("width", [1, 7, 60, 10_000])
def test_records_however_they_are_cut(newline: str, width: int) -> None:
    rng = random.Random(width)
    data = fasta(RECORDS, newline, width) + newline.encode() * 2
    assert plain(data) == RECORDS
    for _ in range(50):
        places = sorted(rng.choices(range(len(data)), k=rng.randint(0, 40)))
        chunks = [data[start:stop] for start, stop in zip([0, *places], [*places, len(data)], strict=True)]
        pieces = groupby(sequence_pieces(chunks), key=lambda piece: piece[0])
        found = [(number, b"".join(piece for _, piece in group).decode()) for number, group in pieces]
        assert found == list(enumerate(RECORDS))


def test_a_build(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.fa").write_bytes(fasta(RECORDS))
    with gzip.open(tmp_path / "in/b.fasta.gz", "wb") as file:
        file.write(fasta(["GATTACA"]))
    (tmp_path / "in/empty.fna").touch()
    store = make(tmp_path / "store", tmp_path / "in")
    assert texts_of(store) == {f"a.fa/{n}": record for n, record in enumerate(RECORDS)} | {"b.fasta/0": "GATTACA"}
    assert verify(store.path, sources=[str(tmp_path / "in")]) == []
    assert store.manifest.problems == {"empty/replaced": 1}, "a header without a sequence"
    letters = make(tmp_path / "again", tmp_path / "in", workers=2)
    assert letters.manifest.fingerprint == store.manifest.fingerprint


def test_what_is_no_fasta(tmp_path: Path) -> None:
    (tmp_path / "a.fa").write_bytes(b"\n\nACGT\n>late\nA\n")
    with pytest.raises(DataError, match=r"a.fa.* is not FASTA: it begins with b'ACGT', expected '>' and a header"):
        make(tmp_path / "store", tmp_path / "a.fa")
    with pytest.raises(BadDocument, match="is not FASTA"):
        list(sequence_pieces([b"x"]))
    assert list(sequence_pieces([b"\n", b""])) == []


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_comments_and_a_byte_order_mark_are_no_sequence(size: int) -> None:
    data = b"\xef\xbb\xbf;of old\n>a;b\nAC;\r\n;one\r\n;>two\nGT\n>b\n>c\n;\nCC\n;last"
    chunks = [b"", *(data[start : start + size] for start in range(0, len(data), size))]
    pieces = groupby(sequence_pieces(chunks), key=lambda piece: piece[0])
    assert [b"".join(piece for _, piece in group) for _, group in pieces] == [b"AC;GT", b"", b"CC"]


@pytest.mark.parametrize("suffix", [".fas", ".ffn", ".frn", ".FA.bgz"])
def test_other_names_of_fasta(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in").mkdir()
    data = fasta(["GATTACA"])
    (tmp_path / f"in/a{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    name = f"a{suffix.removesuffix('.bgz')}/0"
    assert texts_of(make(tmp_path / "store", tmp_path / "in")) == {name: "GATTACA"}


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    data = random.Random(0).choices("ACGT", k=200_000)
    whole = gzip.compress(fasta(["A", "".join(data)]))
    (tmp_path / "a.fa.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.fa.* ends early"):
        make(tmp_path / "strict", tmp_path / "a.fa.gz")
    kept = make(tmp_path / "kept", tmp_path / "a.fa.gz", policies={"truncated": "replace"})
    first, second = texts_of(kept).values()
    assert first == "A" and 50_000 < len(second) < 150_000 and "".join(data).startswith(second)
    assert kept.manifest.problems == {"truncated/replaced": 1}
    skipped = make(tmp_path / "skipped", tmp_path / "a.fa.gz", policies={"truncated": "skip"})
    assert texts_of(skipped) == {"a.fa/0": "A"}
