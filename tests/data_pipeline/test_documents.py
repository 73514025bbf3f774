"""Documents out of text files: the right bytes, in blocks that depend on nothing else, or what is wrong."""

import gzip
import lzma
import unicodedata
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import fsspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from read_documents import blocks_of, expected_blocks, only, problems, read_one, reading, save, whole

from data_pipeline.blocks import compose_characters, invalid_text
from data_pipeline.config import TextSettings
from data_pipeline.documents import BLOCK_BYTES, plan_tasks, read_parts
from data_pipeline.files import InputFile

texts = st.text(alphabet=st.sampled_from("ab\n\r가\U0001f642"), max_size=150).map(str.encode)
documents = st.one_of(texts, st.binary(max_size=150), st.binary(max_size=12).map(lambda data: data * 12))


@settings(deadline=None)  # files take the time they take
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


@settings(deadline=None)  # files take the time they take
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


@settings(deadline=None)  # files take the time they take
@given(
    sizes=st.lists(st.tuples(st.integers(0, 100), st.sampled_from([".txt", ".txt.gz"])), min_size=1, max_size=20),
    n_bytes=st.integers(1, 30),
    task_bytes=st.integers(1, 120),
)
def test_tasks_cover_every_file(sizes: list[tuple[int, str]], n_bytes: int, task_bytes: int) -> None:
    files = [InputFile("a", f"a{suffix}", size, 0, None) for size, suffix in sizes]
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
    files = [InputFile("a", "a.txt", 0, 0, None)] * 1000
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
    tasks = plan_tasks([InputFile("a", name, 5 << 20, 0, None)], TextSettings(**text), 2 << 20)
    assert sum(map(len, tasks)) == n_spans


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
    assert f"at byte {before} " in str(invalid_text(caught.value, part.offset))


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


@pytest.mark.parametrize("policy", ["strict", "skip", "replace"])
@pytest.mark.parametrize(
    ("name", "encoding", "data", "detail"),
    [
        ("a.txt", "utf-16", "text".encode("utf-16-le"), "with BOM: without one it is utf-16-le or utf-16-be)"),
        ("a.jsonl", "utf-16", "text".encode("utf-16-le"), "with BOM: without one it is utf-16-le or utf-16-be)"),
        ("a.txt", "utf-32", "text".encode("utf-32-le"), "with BOM: without one it is utf-32-le or utf-32-be)"),
        ("a.txt", "iso2022_jp", b"\x1b$a$\x1b\x80\x1ba\xff", "pending buffer overflow)"),
    ],
)
def test_what_a_decoder_cannot_go_on_after_is_lost(
    tmp_path: Path, name: str, encoding: str, data: bytes, detail: str, policy: str
) -> None:
    file = save(tmp_path / name, data)
    ((record, problem, said),) = problems(file, reading(encoding=encoding, policies={"encoding": policy}))
    assert (record, problem) == (-1, "encoding")
    assert said.startswith(f"is not valid {encoding} (")
    assert detail in said


def test_marks_and_line_ends_stay_unless_asked(tmp_path: Path) -> None:
    data = "\ufeffone\r\ntwo\rthree\n\ufeff\r".encode()
    file = save(tmp_path / "a.txt", data)
    assert read_one(file) == (data, [])
    assert read_one(file, reading(normalize=("bom",))) == (data[3:], [])
    for kind in ("sentencepiece", "bytes"):
        normal = reading(kind, normalize=("bom", "newlines"))
        assert read_one(file, normal) == ("one\ntwo\nthree\n\ufeff\n".encode(), [])


@settings(deadline=None)  # files take the time they take
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


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("Cafe\u0301".encode(), "Caf\u00e9".encode()),
        (unicodedata.normalize("NFD", "\ub124 \uac00\uac01").encode(), "\ub124 \uac00\uac01".encode()),
        ("q\u0307\u0323 \u212b".encode(), "q\u0323\u0307 \u00c5".encode()),  # marks in order; the sign for angstrom
        (b"a\xff\xcc\x81e\xcc\x81\xed\xa0\x80", b"a\xff\xcc\x81\xc3\xa9\xed\xa0\x80"),  # not UTF-8: stays
    ],
)
def test_composed_characters(tmp_path: Path, data: bytes, expected: bytes) -> None:
    file = save(tmp_path / "a.txt", data)
    for chunk_bytes in range(1, len(data) + 1):
        with patch("data_pipeline.files._CHUNK_BYTES", chunk_bytes):
            assert read_one(file, reading("bytes", normalize=("nfc",)))[0] == expected
    assert read_one(file)[0] == data


@settings(deadline=None)
@given(text=st.text(max_size=60), chunk_bytes=st.integers(1, 9))
def test_composition_does_not_depend_on_chunks(text: str, chunk_bytes: int) -> None:
    data = unicodedata.normalize("NFD", text).encode()
    chunks = [data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes)]
    assert b"".join(compose_characters(chunks)) == unicodedata.normalize("NFC", text).encode()


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


@pytest.mark.parametrize("length", [10, 11])
def test_a_truncated_file_of_another_encoding_is_kept_likewise(tmp_path: Path, length: int) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    content = KOREAN.encode("cp949")[:length]
    started = compressor.compress(content) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    file = save(tmp_path / "a.txt.zst", started)
    result, found = read_one(file, reading(encoding="cp949", policies={"truncated": "replace"}))
    assert result == content.decode("cp949", errors="ignore").encode()
    assert [one.problem for one in found] == ["truncated"]
