"""Documents out of JSON lines and Parquet: records, and what is wrong with them."""

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from read_documents import blocks_of, only, outcome, problems, read, reading, save, whole

from data_pipeline.config import TextSettings
from data_pipeline.documents import plan_tasks, read_parts
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile
from data_pipeline.records import split_lines


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


@settings(deadline=None)  # files take the time they take
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


def test_a_field_within_an_object(tmp_path: Path) -> None:
    lines = [b'{"meta": {"body": {"text": "a"}}}', b'{"meta.body.text": "b", "meta": 1}', b'{"meta": {"body": "c"}}']
    file = save(tmp_path / "a.jsonl", b"\n".join([*lines, b'{"meta": null}']))
    inner = reading(field="meta.body.text")
    assert [result for record, result, _ in read(file, inner) if record < 2] == [b"a", b"b"]
    assert [record for record, *_ in problems(file, inner)] == [2, 3]
    assert (
        "has no field 'meta.body.text' but 'meta': name one with --field (outer.inner for"
        in problems(file, inner)[0][2]
    )


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


@pytest.mark.parametrize("encoding", ["utf-8", "cp949", "utf-16", "utf-16-le", "utf-32-be"])
def test_what_is_not_valid_in_a_line_concerns_that_line_alone(tmp_path: Path, encoding: str) -> None:
    """Also where lines cannot be told before the file is decoded."""
    lines = [json.dumps({"text": text}) + "\n" for text in ("one", "t?o", "three")]
    data = "".join(lines).encode(encoding)
    mark, broken = "?".encode(encoding), {1: b"\xff", 2: b"\x00\xdc", 4: b"\x00\x11\x00\x00"}
    mark = mark[-len("o".encode(encoding + "-le" * (encoding == "utf-16"))) :]  # without a byte order mark
    file = save(tmp_path / "a.jsonl", data.replace(mark, broken[len(mark)]))
    for policy, second in (("replace", "t\ufffdo".encode()), ("skip", "encoding"), ("strict", "encoding")):
        one, two, three = read(file, reading(encoding=encoding, policies={"encoding": policy}))
        assert (one[1], three[1]) == (b"one", b"three")
        if policy == "replace":
            (found,) = two[2]
            assert (two[1], found.problem) == (second, "encoding")
            assert found.detail.startswith(f"is not valid {encoding.removesuffix('-le')}")
        else:
            assert two[1][0] == second and f"is not valid {encoding.removesuffix('-le')}" in two[1][1]


def test_truncated_json_lines_lose_the_record_in_which_they_end(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    data = json_lines({"text": "one"}, {"text": "two"})[:-5]
    started = compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = save(tmp_path / "a.jsonl.zst", started)
    for policy in ("strict", "skip", "replace"):
        results = read(file, reading(policies={"truncated": policy}))
        assert results == [(0, b"one", []), (1, ("truncated", f"ends early, after {len(data)} bytes of content"), [])]
    assert problems(save(tmp_path / "b.jsonl.gz", gzip.compress(data)[:5]))[0][:2] == (-1, "truncated")


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
