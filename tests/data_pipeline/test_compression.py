"""Compressed files are read to the last byte that can be had, and what is wrong with them is said."""

import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from read_documents import only, write

from data_pipeline.compression import FEED_BYTES, expand
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.files import open_seekable, read_content

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
}
CONTENT = bytes(range(256)) * 200 + b"the end" * 5000


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_are_read_to_the_last(tmp_path: Path, suffix: str) -> None:
    parts = [CONTENT[:5], b"", CONTENT[5:40_000], CONTENT[40_000:]]
    path = write(tmp_path / f"a.txt{suffix}", b"".join(map(COMPRESS[suffix], parts)))
    file = only(path)
    assert file.name == "a.txt"
    assert b"".join(read_content(file)) == CONTENT
    with open_seekable(file) as stream:
        stream.seek(-7, os.SEEK_END)
        assert stream.read() == b"the end"


def test_no_room_to_expand_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def writelines(self, lines: Iterable[Any]) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    file = only(write(tmp_path / "a.parquet.gz", gzip.compress(b"content")))
    with pytest.raises(DataError, match=r"cannot expand .*a\.parquet\.gz in .*: No space left on device.*TMPDIR"):
        open_seekable(file).__enter__()


def test_zstd_frames_to_skip_are_skipped() -> None:
    skippable = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"skip"
    data = skippable + COMPRESS[".zst"](b"one") + skippable + COMPRESS[".zst"](b"two")
    assert b"".join(expand([data], ".zst")) == b"onetwo"


@pytest.mark.parametrize("window_log", [28, 31])
def test_zstd_frames_that_look_far_back_are_expanded(window_log: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(compression_level=1, window_log=window_log)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    assert expand_all(compressor.compress(CONTENT) + compressor.flush(), ".zst") == (CONTENT, None)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (bytes.fromhex("28b52ffd 00 f8"), "Frame requires too much memory"),  # a window of 2 TB
        (bytes.fromhex("28b52ffd 01 00 07 010000"), "Dictionary mismatch"),
    ],
)
def test_a_zstd_frame_that_is_refused_is_not_called_corrupt(frame: bytes, why: str) -> None:
    content, problem = expand_all(COMPRESS[".zst"](b"before") + frame, ".zst")
    assert content == b"before"
    assert problem is not None
    assert problem.problem == "unreadable"
    assert why in problem.detail


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_zeros_after_a_member_are_padding(suffix: str) -> None:
    padded = COMPRESS[suffix](b"one") + bytes(512) + COMPRESS[suffix](b"two") + bytes(512)
    assert b"".join(expand([padded], suffix)) == b"onetwo"


def feed(data: bytes) -> list[bytes]:
    return [data[start : start + FEED_BYTES] for start in range(0, len(data), FEED_BYTES)]


def expand_all(data: bytes, suffix: str) -> tuple[bytes, BadDocument | None]:
    """What can be had of a compressed file, and what was wrong with it."""
    content = bytearray()
    try:
        for chunk in expand(feed(data), suffix):
            content += chunk
    except BadDocument as problem:
        return bytes(content), problem
    return bytes(content), None


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_ends_early_gives_what_it_has(suffix: str) -> None:
    random = np.random.default_rng(0).integers(0, 64, 300_000, np.uint8).tobytes()  # does not compress to nothing
    data = COMPRESS[suffix](random)
    for length in (0, 1, 3, 100, len(data) // 2, len(data) - 9, len(data) - 1):
        content, problem = expand_all(data[:length], suffix)
        assert problem is not None
        assert problem.problem == "truncated"
        assert f"ends early, after {len(content)} bytes of content" in problem.detail
        assert random.startswith(content)
    half = expand_all(data[: len(data) // 2], suffix)[0]
    assert len(half) > len(random) // 2 - (1 << 18)  # a block of zstd and of xz's coder at most is lost


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("garbage", [b"garbage", b"\1", b"\0\0\0\0garbage"])
def test_what_follows_a_compressed_file_is_an_error(suffix: str, garbage: bytes) -> None:
    content, problem = expand_all(COMPRESS[suffix](CONTENT) + garbage, suffix)
    assert content == CONTENT
    assert problem is not None
    assert problem.problem == "truncated"


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_flipped_bits_are_found_by_the_checksum(suffix: str) -> None:
    data = bytearray(COMPRESS[suffix](CONTENT))
    data[len(data) // 2] ^= 1
    assert expand_all(bytes(data), suffix)[1] is not None


@pytest.mark.parametrize(("suffix", "megabytes"), [(".gz", 32), (".zst", 400), (".xz", 64)])
def test_zeros_do_not_fill_memory(suffix: str, megabytes: int) -> None:
    compressors: dict[str, Callable[[], Any]] = {
        ".gz": lambda: zlib.compressobj(wbits=31),
        ".zst": lambda: zstandard.ZstdCompressor().compressobj(),
        ".xz": lambda: lzma.LZMACompressor(preset=0),
    }
    compressor = compressors[suffix]()
    zeros = bytes(1 << 20)
    data = b"".join(compressor.compress(zeros) for _ in range(megabytes)) + compressor.flush()
    lengths = [len(content) for content in expand(feed(data), suffix)]
    assert sum(lengths) == megabytes << 20
    assert max(lengths) <= min(megabytes << 19, FEED_BYTES << 15)
