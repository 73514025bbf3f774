"""Documents out of every kind of file: the right bytes, in blocks that depend on nothing else, or what is wrong."""

import gzip
import io
import itertools
import json
import lzma
import math
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import TextSettings
from data_pipeline.documents import (
    BLOCK_BYTES,
    Found,
    Part,
    Reading,
    Span,
    invalid_utf8,
    plan_tasks,
    read_parts,
)
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.files import InputFile, find_files
from data_pipeline.records import split_lines

Outcome = bytes | tuple[str, str]
"""A document's bytes, or the problem for which there are none and its detail."""


def only(path: object, arrays: bool = False) -> InputFile:
    return find_files([str(path)], [], arrays)[0]


def save(path: Path, content: bytes) -> InputFile:
    path.write_bytes(content)
    return only(path)


def reading(kind: str = "sentencepiece", policies: Mapping[str, str] | None = None, **text: object) -> Reading:
    return Reading(TextSettings.model_validate(text), kind, policies=policies or {})


def whole(file: InputFile) -> Span:
    return Span(0, 0, file.n_bytes)


def outcome(part: Part) -> Outcome:
    try:
        return b"".join(part.blocks)
    except BadDocument as problem:
        return problem.problem, problem.detail


def read(file: InputFile, how: Reading | None = None) -> list[tuple[int, Outcome, list[Found]]]:
    """(record, outcome, what was replaced) of every document of a file."""
    return [(part.record, outcome(part), part.found) for part in read_parts(file, whole(file), how or reading())]


def read_one(file: InputFile, how: Reading | None = None) -> tuple[Outcome, list[Found]]:
    ((record, result, found),) = read(file, how)
    assert record == -1
    return result, found


def problems(file: InputFile, how: Reading | None = None) -> list[tuple[int, str, str]]:
    return [(record, *result) for record, result, _ in read(file, how) if not isinstance(result, bytes)]


@contextmanager
def blocks_of(n_bytes: int, reach: int = 8) -> Iterator[None]:
    """Small blocks, so that small documents have many."""
    with ExitStack() as stack:
        for module in ("blocks", "documents", "arrays"):
            stack.enter_context(patch(f"data_pipeline.{module}.BLOCK_BYTES", n_bytes))
        stack.enter_context(patch("data_pipeline.blocks.BOUNDARY_REACH_BYTES", reach))
        yield


def expected_blocks(data: bytes, n_bytes: int, reach: int) -> list[bytes]:
    """The definition, with the whole document at hand."""
    cuts = [0]
    for nominal in range(n_bytes, len(data), n_bytes):
        stretch = data[nominal : nominal + reach]
        cut = nominal
        if b"\n" in stretch:
            cut += stretch.index(b"\n") + 1
        else:
            while cut < len(data) and cut < nominal + 4 and data[cut] & 0xC0 == 0x80:
                cut += 1
            if cut == nominal + 4:
                cut = nominal
        cuts.append(cut)
    return [data[one:other] for one, other in pairwise([*cuts, len(data)]) if other > one]


# Plain text, spans, tasks


texts = st.text(alphabet=st.sampled_from("ab\n\r가\U0001f642"), max_size=150).map(str.encode)
documents = st.one_of(texts, st.binary(max_size=150), st.binary(max_size=12).map(lambda data: data * 12))


@given(data=documents, n_bytes=st.integers(9, 40), reach=st.integers(4, 9), kind=st.sampled_from(["bytes", "text"]))
def test_blocks_depend_on_the_bytes_alone(
    data: bytes, n_bytes: int, reach: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data += b"!"
    folder = tmp_path_factory.mktemp("blocks")
    half = len(data) // 2
    compressor = zstandard.ZstdCompressor()
    system = fsspec.filesystem("memory")
    system.pipe("/blocks/a.txt", data)
    files = [
        save(folder / "a.txt", data),
        save(folder / "b.txt.gz", gzip.compress(data[:half]) + gzip.compress(data[half:])),
        save(folder / "c.txt.zst", compressor.compress(data[:half]) + compressor.compress(data[half:])),
        save(folder / "d.txt.xz", lzma.compress(data)),
        only("memory://blocks/a.txt"),
    ]
    how = reading("bytes" if kind == "bytes" else "sentencepiece")
    with blocks_of(n_bytes, reach):
        expected = expected_blocks(data, n_bytes, reach)
        for file in files:
            (part,) = read_parts(file, whole(file), how)
            offset = 0
            blocks = []
            for block in part.blocks:
                assert part.offset == offset
                offset += len(block)
                blocks.append(block)
            assert blocks == expected
        spans = [span for task in plan_tasks(files[:1], how.text, 2 * n_bytes) for span in task]
        parts = [part for span in spans for part in read_parts(files[0], span, how)]
        assert [block for part in parts for block in part.blocks] == expected
        assert [part.first for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]


@given(text=texts, n_bytes=st.integers(9, 40))
def test_blocks_of_text_hold_whole_characters(
    text: bytes, n_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = save(tmp_path_factory.mktemp("blocks") / "a.txt", text + "가".encode())
    with blocks_of(n_bytes):
        (part,) = read_parts(file, whole(file), reading())
        assert "".join(block.decode() for block in part.blocks).encode() == text + "가".encode()


def test_blocks_are_of_bounded_size(tmp_path: Path) -> None:
    file = save(tmp_path / "a.txt", b"no newline " * 300_000)
    (part,) = read_parts(file, whole(file), reading())
    lengths = [len(block) for block in part.blocks]
    assert sum(lengths) == file.n_bytes
    assert lengths[:3] == [BLOCK_BYTES] * 3


@given(
    sizes=st.lists(st.tuples(st.integers(0, 100), st.sampled_from([".txt", ".txt.gz"])), min_size=1, max_size=20),
    n_bytes=st.integers(1, 30),
    task_bytes=st.integers(1, 120),
)
def test_tasks_cover_every_file(sizes: list[tuple[int, str]], n_bytes: int, task_bytes: int) -> None:
    files = [InputFile("a", f"a{suffix}", size, 0, False) for size, suffix in sizes]
    with blocks_of(n_bytes):
        tasks = plan_tasks(files, TextSettings(), task_bytes)
    spans = [span for task in tasks for span in task]
    assert [span.file for span in spans] == sorted(span.file for span in spans)
    for number, (size, suffix) in enumerate(sizes):
        mine = [span for span in spans if span.file == number]
        assert mine[0].start == 0
        assert mine[-1].stop == size
        assert all(one.stop == other.start for one, other in pairwise(mine))
        assert all(span.start % n_bytes == 0 for span in mine)
        assert suffix == ".txt" or len(mine) == 1
    most = max(task_bytes, n_bytes, *(size for size, suffix in sizes if suffix != ".txt"), 0)
    assert all(sum(span.stop - span.start for span in task) <= most + task_bytes for task in tasks)


def test_many_empty_files_are_many_tasks() -> None:
    files = [InputFile("a", "a.txt", 0, 0, False)] * 1000
    with blocks_of(10):
        assert len(plan_tasks(files, TextSettings(), 100)) == 11


@pytest.mark.parametrize(
    ("name", "text", "n_spans"),
    [
        ("a.txt", {}, 3),
        ("a.jsonl", {}, 3),
        ("a.txt.gz", {}, 1),
        ("a.jsonl.gz", {}, 1),
        ("a.parquet", {}, 1),
        ("a.txt", {"encoding": "latin-1"}, 1),
        ("a.txt", {"normalize": ("newlines",)}, 1),
        ("a.jsonl", {"normalize": ("newlines",)}, 3),
    ],
)
def test_what_can_be_read_from_the_middle_is_cut(name: str, text: dict, n_spans: int) -> None:
    tasks = plan_tasks([InputFile("a", name, 5 << 20, 0, False)], TextSettings(**text), 2 << 20)
    assert sum(map(len, tasks)) == n_spans


# Encodings, what is not valid, normalisation


@pytest.mark.parametrize("before", [0, 5, 2**20 - 1, 2**20, 2**20 + 3])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xe2\x82"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_utf8_is_located_and_replaced(tmp_path: Path, before: int, bad: bytes, suffix: str) -> None:
    data = b"x" * before + bad
    file = save(tmp_path / f"a.txt{suffix}", gzip.compress(data, 1) if suffix else data)
    assert read_one(file)[0] == data  # the tokenizer, which decodes anyway, is to find it
    result, found = read_one(file, reading(policies={"encoding": "replace"}))
    assert result == data.decode(errors="replace").encode()
    assert [one.problem for one in found] == ["encoding"]
    assert f"is not valid utf-8 at byte {before} " in found[0].detail
    assert read_one(file, reading("bytes", {"encoding": "replace"})) == (data, [])
    (part,) = read_parts(file, whole(file), reading())
    with pytest.raises(UnicodeDecodeError) as caught:
        for block in part.blocks:
            block.decode()
    assert f"at byte {before} " in str(invalid_utf8(caught.value, part.offset))


def test_only_the_first_of_many_bad_bytes_is_reported(tmp_path: Path) -> None:
    file = save(tmp_path / "a.txt", b"a\xff\xff" * 1_000_000)
    result, found = read_one(file, reading(policies={"encoding": "replace"}))
    assert result == "a\ufffd\ufffd".encode() * 1_000_000
    assert len(found) == 1


KOREAN = "태초에 하나님이 천지를 창조하시니라\n" * 3
JAPANESE = "表示 ソフト 能力\r\n" * 3


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "naïve café\n\xa0\x85"),
        ("cp949", KOREAN),
        ("shift_jis", JAPANESE),
        ("gb18030", "道可道,非常道\U0001f642\n"),
        ("utf-16", "\ufeffBOM and " + JAPANESE + "\U0001f642"),
        ("utf-16-le", "no BOM\U0001f642"),
        ("iso2022_jp", JAPANESE),
    ],
)
def test_other_encodings_become_utf8(tmp_path: Path, encoding: str, text: str, chunk_bytes: int) -> None:
    file = save(tmp_path / "a.txt", text.encode(encoding))
    with patch("data_pipeline.files._CHUNK_BYTES", chunk_bytes):
        assert read_one(file, reading(encoding=encoding)) == (text.encode(), [])
        assert read_one(file, reading("bytes", encoding=encoding)) == (text.encode(encoding), [])


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("encoding", "data", "place"),
    [
        ("ascii", b"abc\xffdef\xff", 3),
        ("cp949", KOREAN.encode("cp949") + b"\xff\xff" + KOREAN.encode("cp949"), len(KOREAN.encode("cp949"))),
        ("shift_jis", b"a\n\x81", 2),
        ("utf-16-le", "ab".encode("utf-16-le") + b"\x00\xdca\x00", 4),
    ],
)
def test_what_is_invalid_in_another_encoding_is_located(
    tmp_path: Path, encoding: str, data: bytes, place: int, chunk_bytes: int
) -> None:
    file = save(tmp_path / "a.txt", data)
    with patch("data_pipeline.files._CHUNK_BYTES", chunk_bytes):
        ((_, problem, detail),) = problems(file, reading(encoding=encoding))
        assert problem == "encoding"
        assert f"at byte {place} " in detail
        result, found = read_one(file, reading(encoding=encoding, policies={"encoding": "replace"}))
    assert result == data.decode(encoding, errors="replace").encode()
    assert "\ufffd".encode() in result
    assert [one.problem for one in found] == ["encoding"]
    assert f"at byte {place} " in found[0].detail


def test_marks_and_line_ends_stay_unless_asked(tmp_path: Path) -> None:
    data = "\ufeffone\r\ntwo\rthree\n\ufeff\r".encode()
    file = save(tmp_path / "a.txt", data)
    assert read_one(file) == (data, [])
    assert read_one(file, reading(normalize=("bom",))) == (data[3:], [])
    for kind in ("sentencepiece", "bytes"):
        normal = reading(kind, normalize=("bom", "newlines"))
        assert read_one(file, normal) == ("one\ntwo\nthree\n\ufeff\n".encode(), [])


@given(
    text=st.text(alphabet=st.sampled_from("a\r\n\ufeff가"), max_size=60),
    chunk_bytes=st.integers(1, 9),
    encoding=st.sampled_from(["utf-8", "utf-16-le", "cp949"]),
)
def test_normalisation_does_not_depend_on_chunks(
    text: str, chunk_bytes: int, encoding: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = text.replace("\ufeff", "") if encoding == "cp949" else text
    file = save(tmp_path_factory.mktemp("normal") / "a.txt", text.encode(encoding) + "!".encode(encoding))
    expected = (text + "!").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").encode()
    with patch("data_pipeline.files._CHUNK_BYTES", chunk_bytes), blocks_of(20):
        (part,) = read_parts(file, whole(file), reading(encoding=encoding, normalize=("bom", "newlines")))
        assert list(part.blocks) == expected_blocks(expected, 20, 8)


@pytest.mark.parametrize("length", range(1, 12))
def test_a_truncated_file_is_kept_up_to_its_last_whole_character(tmp_path: Path, length: int) -> None:
    text = "ab가\U0001f642é"
    compressor = zstandard.ZstdCompressor().compressobj()
    started = compressor.compress(text.encode()[:length]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = save(tmp_path / "a.txt.zst", started)
    assert problems(file)[0][1] == "truncated"
    result, found = read_one(file, reading(policies={"truncated": "replace"}))
    assert result == text.encode()[:length].decode(errors="ignore").encode()
    assert [one.problem for one in found] == ["truncated"]
    assert f"ends early, after {length} bytes" in found[0].detail
    assert read_one(file, reading("bytes", {"truncated": "replace"}))[0] == text.encode()[:length]


def test_a_truncated_file_of_another_encoding_is_kept_likewise(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    content = KOREAN.encode("cp949")[:11]
    started = compressor.compress(content) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = save(tmp_path / "a.txt.zst", started)
    result, found = read_one(file, reading(encoding="cp949", policies={"truncated": "replace"}))
    assert result == content.decode("cp949", errors="ignore").encode()
    assert [one.problem for one in found] == ["truncated"]


# JSON lines


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_json_lines_are_documents(tmp_path: Path) -> None:
    data = json_lines({"text": "one", "id": 1}, {"text": ""}, {"id": 3, "text": "세\r\n\U0001f642"})
    file = save(
        tmp_path / "a.jsonl", "\ufeff".encode() + data.replace(b"\n", b"\r\n", 1) + b"\n \n" + data.rstrip(b"\n")
    )
    one, two, three = b"one", b"", "세\r\n\U0001f642".encode()
    assert [result for _, result, _ in read(file)] == [one, two, three] * 2
    assert [record for record, _, _ in read(file)] == list(range(6))
    assert [part.first and part.last for part in read_parts(file, whole(file), reading())] == [True] * 6
    assert read(file, reading(normalize=("newlines",)))[2][1] == "세\n\U0001f642".encode()
    assert [problem for _, problem, _ in problems(file, reading(field="id"))] == ["unreadable"] * 6


lines_of_json = st.lists(
    st.one_of(
        st.text(alphabet=st.sampled_from('ab\n"가\U0001f642'), max_size=40).map(
            lambda text: json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0).encode()
        ),
        st.sampled_from([b"", b"   ", b"{bad", b'{"text": 1}']),
    ),
    max_size=12,
)


@given(lines=lines_of_json, n_bytes=st.integers(9, 60), end=st.sampled_from([b"", b"\n"]))
def test_a_line_belongs_to_the_span_in_which_it_begins(
    lines: list[bytes], n_bytes: int, end: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = b"\n".join([*lines, b'{"text": "last"}']) + end
    folder = tmp_path_factory.mktemp("json")
    file = save(folder / "a.jsonl", data)
    expected = [result for _, result, _ in read(file)]
    assert len(expected) == sum(bool(line.strip()) for line in lines) + 1
    assert [result for _, result, _ in read(save(folder / "b.jsonl.gz", gzip.compress(data)))] == expected
    with blocks_of(n_bytes):
        parts = []
        for task in plan_tasks([file], TextSettings(), n_bytes):
            for span in task:
                of_span = [(part.record, outcome(part)) for part in read_parts(file, span, reading())]
                assert [record for record, _ in of_span] == list(range(len(of_span)))
                parts += of_span
    assert [result for _, result in parts] == expected


@pytest.mark.parametrize(
    ("line", "detail"),
    [
        (b"not json", "line at byte 14 is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
        (b'["text"]', "is not a JSON object but an array"),
        (b'{"a": 1, "b": 2}', "has no field 'text' but 'a', 'b': name one with --field"),
        (b"{}", "has no field 'text' but none"),
        (b'{"text": null}', "has in field 'text' no string but null"),
        (b'{"text": ["a"]}', "no string but an array"),
        (b'{"text": "a', "is not JSON"),
    ],
)
def test_lines_that_hold_no_text(tmp_path: Path, line: bytes, detail: str) -> None:
    file = save(tmp_path / "a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert [result for record, result, _ in read(file) if record != 1] == [b"a", b"b"]
    ((record, problem, said),) = problems(file)
    assert (record, problem) == (1, "unreadable")
    assert detail in said


def test_json_text_that_is_no_text(tmp_path: Path) -> None:
    lines = [b'{"text": "a\\ud800b\\udc00"}', b'{"text": "\\ud83d\\ude42"}', b'{"text": "a\xffb"}']
    file = save(tmp_path / "a.jsonl", b"\n".join(lines))
    assert [(record, problem) for record, problem, _ in problems(file)] == [(0, "encoding"), (2, "encoding")]
    assert "is not valid utf-8 at byte 63 " in problems(file)[1][2]
    replaced = read(file, reading(policies={"encoding": "replace"}))
    assert [result for _, result, _ in replaced] == [
        "a\ufffdb\ufffd".encode(),
        "\U0001f642".encode(),
        "a\ufffdb".encode(),
    ]
    assert [len(found) for _, _, found in replaced] == [1, 0, 1]


def test_an_oversized_line_is_never_held(tmp_path: Path) -> None:
    long = b'{"text": "' + b"x" * 100 + b'"}'
    fits = b'{"text": "' + b"x" * 88 + b'"}'
    file = save(tmp_path / "a.jsonl", b"\n".join([long, fits, b" " * 101 + fits, b" " * 9, b'{"text": "end"}']))
    how = reading(max_record_bytes=100)
    assert [result for _, result, _ in read(file, how) if isinstance(result, bytes)] == [b"x" * 88, b"end"]
    assert problems(file, how) == [
        (0, "oversized", "the line at byte 0 has 112 bytes, more than --max-record-bytes 100"),
        (2, "oversized", "the line at byte 214 has 201 bytes, more than --max-record-bytes 100"),
    ]


def test_a_line_larger_than_memory_is_skipped_in_pieces() -> None:
    chunks = itertools.chain((bytes(1 << 20) for _ in range(200)), [b"\nend"])
    tracemalloc.start()
    long, end = split_lines(chunks, 0, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert long == (0, 200 << 20, bytes(1000))
    assert end == ((200 << 20) + 1, 3, b"end")
    assert peak < 8 << 20


@pytest.mark.parametrize("encoding", ["cp949", "utf-16", "utf-16-le"])
def test_json_lines_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    text = json.dumps({"text": "천지"}, ensure_ascii=False) + "\n"
    file = save(tmp_path / "a.jsonl", (text * 2).encode(encoding))
    assert [result for _, result, _ in read(file, reading(encoding=encoding))] == ["천지".encode()] * 2


def test_truncated_json_lines_lose_the_record_in_which_they_end(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    data = json_lines({"text": "one"}, {"text": "two"})[:-5]
    started = compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = save(tmp_path / "a.jsonl.zst", started)
    for policy in ("strict", "skip", "replace"):
        results = read(file, reading(policies={"truncated": policy}))
        assert results == [(0, b"one", []), (1, ("truncated", f"ends early, after {len(data)} bytes of content"), [])]
    assert problems(save(tmp_path / "b.jsonl.gz", gzip.compress(data)[:5]))[0][:2] == (-1, "truncated")


# Parquet


def write_parquet(path: Path, columns: Mapping[str, object], **options: object) -> InputFile:
    pq.write_table(pa.table(columns), path, **options)
    return only(path)


VALUES = ["one", "", None, "네\U0001f642"]


@pytest.mark.parametrize("suffix", ["", ".zst"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_rows_are_documents(tmp_path: Path, kind: pa.DataType, suffix: str) -> None:
    encoded = [value.encode() if value is not None and pa.types.is_binary(kind) else value for value in VALUES]
    column = pa.array(encoded, kind.value_type if pa.types.is_dictionary(kind) else kind)
    if pa.types.is_dictionary(kind):
        column = column.dictionary_encode()
    file = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3, 4], "body": column}, row_group_size=3)
    if suffix:
        file = save(tmp_path / "b.parquet.zst", zstandard.compress((tmp_path / "a.parquet").read_bytes()))
    results = read(file, reading(field="body"))
    assert results == [(0, b"one", []), (1, b"", []), (2, b"", []), (3, "네\U0001f642".encode(), [])]


def test_parquet_by_url(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    fsspec.filesystem("memory").pipe("/parquet/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert [result for _, result, _ in read(only("memory://parquet"))] == [b"one", b"two"]


def test_parquet_that_has_no_text(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"id": [1], "body": ["text"], "list": [["text"]]})
    for field, detail in [
        ("text", "has no column 'text' but 'id', 'body', 'list': name one with --field"),
        ("id", "has in column 'id' no text but values of type int64"),
        ("list", "no text but values of type list"),
    ]:
        ((record, problem, said),) = problems(file, reading(field=field))
        assert (record, problem) == (-1, "unreadable")
        assert detail in said


def test_parquet_files_that_are_none(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "a.parquet", {"text": ["one", "two"]})
    data = (tmp_path / "a.parquet").read_bytes()
    assert problems(save(tmp_path / "b.parquet", data[:-20]))[0][:2] == (-1, "truncated")
    assert problems(save(tmp_path / "c.parquet", b"x" * 100))[0][:2] == (-1, "unreadable")
    assert problems(good) == []


def test_damaged_pages_of_parquet(tmp_path: Path) -> None:
    file = write_parquet(
        tmp_path / "a.parquet", {"text": [f"{i} {i * 7919 % 1009}" * 50 for i in range(2000)]}, row_group_size=500
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    place = group.data_page_offset
    data[place : place + 1000] = b"\xff" * 1000
    damaged = save(tmp_path / "b.parquet", bytes(data))
    assert len(read(file)) == 2000
    ((record, problem, _),) = problems(damaged)
    assert problem == "unreadable"
    assert record == 1000
    assert all(isinstance(result, bytes) for number, result, _ in read(damaged) if number < record)


def test_parquet_values_have_policies_too(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": [b"a\xff", b"x" * 11, b"\xef\xbb\xbfa\r\n"]})
    how = reading(policies={"encoding": "replace"}, max_record_bytes=10, normalize=("bom", "newlines"))
    results = read(file, how)
    assert results[0][1] == "a\ufffd".encode()
    assert results[0][2][0].problem == "encoding"
    assert results[1][1] == ("oversized", "the value has 11 bytes, more than --max-record-bytes 10")
    assert results[2][1] == b"a\n"


def test_large_row_groups_are_read_in_batches(tmp_path: Path) -> None:
    values = pa.array(["x" * (1 << 20)] * 64)
    file = write_parquet(
        tmp_path / "a.parquet", {"text": values}, use_dictionary=False, compression="none", write_batch_size=4
    )
    pool = pa.default_memory_pool()
    del values
    before = pool.bytes_allocated()
    most = 0
    for part in read_parts(file, whole(file), reading()):
        most = max(most, pool.bytes_allocated() - before)
        assert len(b"".join(part.blocks)) == 1 << 20
    assert most < 16 << 20


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    with (
        patch.dict("sys.modules", {"pyarrow": None}),
        pytest.raises(DataError, match=r"pip install 'longhand\[corpus\]'"),
    ):
        read(file)


# Arrays


def integers(vocab_size: int, field: str = "text", **policies: str) -> Reading:
    return Reading(TextSettings(field=field), "integers", vocab_size, policies)


def save_array(path: Path, array: np.ndarray) -> InputFile:
    np.save(path, array)
    return only(path, arrays=True)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">u2", "<i4", ">i8", "<u8"])
@pytest.mark.parametrize(("vocab_size", "stored"), [(100, "<u1"), (256, "<u1"), (257, "<u2"), (70_000, "<u4")])
def test_items_of_an_array_are_documents(tmp_path: Path, dtype: str, vocab_size: int, stored: str) -> None:
    array = np.arange(2 * 3 * 4, dtype=dtype).reshape(2, 3, 4)
    results = read(save_array(tmp_path / "a.npy", array), integers(vocab_size))
    assert results == [(0, array[0].astype(stored).tobytes(), []), (1, array[1].astype(stored).tobytes(), [])]
    flat = read(save_array(tmp_path / "b.npy", array.reshape(-1)), integers(vocab_size))
    assert flat == [(0, array.astype(stored).tobytes(), [])]


@given(
    length=st.integers(0, 60), n_bytes=st.integers(4, 40), dtype=st.sampled_from(["u1", ">i8"]), vocab_size=st.just(300)
)
def test_blocks_of_an_array_depend_on_its_values_alone(
    length: int, n_bytes: int, dtype: str, vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    array = np.arange(3 * length, dtype=dtype).reshape(3, length)
    file = save_array(tmp_path_factory.mktemp("array") / "a.npy", array)
    data = array.astype("<u2")
    with blocks_of(n_bytes):
        items = [list(part.blocks) for part in read_parts(file, whole(file), integers(vocab_size))]
    step = n_bytes // 2
    assert items == [[row[i : i + step].tobytes() for i in range(0, length, step)] for row in data]


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_arrays_of_an_archive_follow_each_other(tmp_path: Path, savez: Callable[..., None], suffix: str) -> None:
    plain = tmp_path / "a.npz"
    savez(plain, zeros=np.zeros((2, 3), np.uint8), names=np.array(["a" * 58]), one=np.array([1, 2]), f=np.ones(2))
    path = tmp_path / f"b.npz{suffix}"
    path.write_bytes(gzip.compress(plain.read_bytes()) if suffix else plain.read_bytes())
    file = only(path, arrays=True)
    results = read(file, integers(10))
    assert [record for record, _, _ in results] == [0, 1, 2, 3, 4]
    assert [results[i][1] for i in (0, 1, 3)] == [bytes(3), bytes(3), bytes([1, 2])]
    assert results[2][1] == (
        "unreadable",
        "its array names holds values of type <U58, not integers: name the one to read with --field",
    )
    assert "float64" in str(results[4][1])
    assert [result for _, result, _ in read(file, integers(10, field="one"))] == [bytes([1, 2])]
    ((record, problem, detail),) = problems(file, integers(10, field="nope"))
    assert (record, problem) == (-1, "unreadable")
    assert "has no array 'nope' but zeros, names, one, f" in detail


def test_arrays_by_url(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(6).reshape(2, 3))
    fsspec.filesystem("memory").pipe("/arrays/a.npz", (tmp_path / "a.npz").read_bytes())
    file = only("memory://arrays", arrays=True)
    assert [result for _, result, _ in read(file, integers(10))] == [bytes([0, 1, 2]), bytes([3, 4, 5])]


@pytest.mark.parametrize(("value", "dtype"), [(-1, np.int8), (10, np.uint8), (2**40, np.int64), (-(2**40), np.int64)])
def test_values_outside_the_vocabulary(tmp_path: Path, value: int, dtype: type) -> None:
    array = np.zeros((3, 4), dtype)
    array[1, 2] = value
    file = save_array(tmp_path / "a.npy", array)
    for policy in ("strict", "skip", "replace"):  # there is no value to replace it by
        results = read(file, integers(10, encoding=policy))
        assert [results[i][1] for i in (0, 2)] == [bytes(4)] * 2
        assert results[1][1] == ("encoding", f"has the value {value} at place 2: expected 0 to 9")


def test_arrays_that_are_not_read(tmp_path: Path) -> None:
    fortran = save_array(tmp_path / "a.npy", np.asfortranarray(np.zeros((3, 4), int)))
    assert "Fortran order: save numpy.ascontiguousarray(array)" in problems(fortran, integers(10))[0][2]
    np.save(tmp_path / "b.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    objects = only(tmp_path / "b.npy", arrays=True)
    assert "holds Python objects, not integers" in problems(objects, integers(10))[0][2]
    for name, content in (("c.npy", b"not an array"), ("d.npz", b"not an archive"), ("e.npy", b"\x93NUMPY\x01\x00")):
        (tmp_path / name).write_bytes(content)
        ((record, problem, _),) = problems(only(tmp_path / name, arrays=True), integers(10))
        assert problem == "unreadable"
        assert record <= 0


def test_a_second_array_in_a_file_is_not_lost_in_silence(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.arange(6).reshape(2, 3))
        np.save(file, np.arange(3))
    ((record, problem, detail),) = problems(only(tmp_path / "a.npy", arrays=True), integers(10))
    assert (record, problem) == (2, "unreadable")
    assert "goes on after its array" in detail


def test_a_truncated_array_ends_with_the_item_in_which_it_ends(tmp_path: Path) -> None:
    save_array(tmp_path / "a.npy", np.ones((1000, 4), ">u2"))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[: len(data) - 997 * 8 - 3])
    file = only(tmp_path / "a.npy", arrays=True)
    results = read(file, integers(10))
    assert [result for _, result, _ in results[:2]] == [bytes([1] * 4)] * 2
    assert results[2:] == [
        (2, ("truncated", "ends early or is corrupt: 2 values are there instead of 4"), []),
    ]
    kept = read(file, integers(10, truncated="replace"))
    assert kept[2][1] == bytes([1] * 2)
    assert kept[2][2][0].problem == "truncated"
    assert len(kept) == 3


def test_a_damaged_archive(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 10, (4, 1000), np.uint8)
    np.savez(tmp_path / "a.npz", x=values, y=values)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(values[3].tobytes()) + 5] ^= 1
    (tmp_path / "b.npz").write_bytes(data)
    results = read(only(tmp_path / "b.npz", arrays=True), integers(10, truncated="skip"))
    assert [record for record, result, _ in results if not isinstance(result, bytes)] == [3]
    assert "truncated" in str(results[3][1]) and "CRC" in str(results[3][1])
    assert [result for _, result, _ in results[4:]] == [row.tobytes() for row in values]
    (tmp_path / "c.npz").write_bytes(data[:-30])
    assert problems(only(tmp_path / "c.npz", arrays=True), integers(10))[0][:2] == (-1, "truncated")


def test_an_array_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (1 << 33,)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    with (tmp_path / "a.npy").open("wb") as file:
        file.write(header.getvalue())
        file.truncate(len(header.getvalue()) + 8 * math.prod(shape))  # 64 GB that take no room
    parts = read_parts(only(tmp_path / "a.npy", arrays=True), Span(0, 0, 0), integers(10))
    assert next(next(parts).blocks) == bytes(BLOCK_BYTES)


def test_a_part_that_was_left_early_does_not_disturb_the_next(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as file:
        np.save(file, np.arange(3 * 5_000_000).reshape(3, -1) % 251)
    parts = read_parts(only(tmp_path / "a.npz", arrays=True), Span(0, 0, 0), integers(256))
    starts = [next(part.blocks)[0] for part in parts]
    assert starts == [0, 5_000_000 % 251, 10_000_000 % 251]
