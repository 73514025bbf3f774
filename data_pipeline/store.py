"""The Zarr layout of a store: the only file that knows it.

A store is a Zarr v3 group that plain `zarr.open(path)` reads, with files of our own beside the arrays:

    tokens                      [n_rows, seq_len] uint16 or uint32; a chunk is a row, a shard file many rows
    valid_tokens                [n_rows] int64: how many tokens of a row are real; the rest is padding, stored as EOS
    segments/row_offsets        [n_rows + 1] int64: row r has segments row_offsets[r] to row_offsets[r + 1]
    segments/start, length, document, document_start
                                [n_segments] int64, in the order of rows: see `packing.Segments`
    token_bytes                 [vocab_size] uint16: bytes of text that a token stands for
    documents.jsonl             one line per document: see `manifest.DocumentRecord`
    tokenizer.model             a copy of the SentencePiece model, when there is one
    manifest.json               see `manifest.py`

Chunks are Zstandard frames *with* checksum: without one, 11 of 12 flipped bits gave wrong tokens and no error. The
fill value is no token, so that a shard that is not there is noticed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from data_pipeline.errors import DataError
from data_pipeline.manifest import MANIFEST_NAME, DocumentRecord, FileRecord, Manifest, StoreSettings
from data_pipeline.packing import Segments
from data_pipeline.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, token_dtype

MAX_CHUNK_TOKENS = 65_536
"""Longer rows are cut into several chunks, so that a slice of a row can be read without the rest."""
MIN_CHUNK_TOKENS = 1_024
"""A row whose length has no divisor from here to MAX_CHUNK_TOKENS stays one chunk: tiny chunks cost far more."""
_SIDECAR_CHUNK = 1 << 16
_DOCUMENTS_NAME = "documents.jsonl"
_TOKENIZER_NAME = "tokenizer.model"
_WAY_OUT = "restore it from a copy, or build the store again"


class Store:
    """A finished store, open for reading.

    Cheap to make and to pickle: arrays are opened when they are first read, in the process that reads them.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a store after a quick check: the manifest is whole, every file is there and has its size.

        Raises DataError that names the first file that is not.
        """
        path = Path(path)
        store = cls(path, Manifest.read(path))
        for problem in store.check_files():
            raise DataError(f"{problem}: {_WAY_OUT}")
        return store

    def __reduce__(self) -> tuple[type["Store"], tuple[Path, Manifest]]:
        return Store, (self.path, self.manifest)

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.manifest.seq_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocab_size

    @property
    def n_rows(self) -> int:
        """Rows of all splits."""
        return self.manifest.n_rows

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: bytes of text that each token stands for; 0 for BOS and EOS."""
        return self._read_sidecar("token_bytes")

    @cached_property
    def valid_tokens(self) -> np.ndarray:
        """int64 [n_rows]: how many tokens of each row are not padding."""
        return self._read_sidecar("valid_tokens")

    @cached_property
    def segments(self) -> Segments:
        """All segments of all rows."""
        columns = {name: self._read_sidecar(f"segments/{name}") for name in Segments._fields if name != "row"}
        row = np.repeat(np.arange(self.n_rows), np.diff(self._row_offsets))
        return Segments(row=row, **columns)

    @cached_property
    def documents(self) -> list[DocumentRecord]:
        """The document table, in the order of ids. Raises DataError when its file is damaged."""
        data = self._read_file(_DOCUMENTS_NAME)
        return [DocumentRecord(**json.loads(line)) for line in data.splitlines()]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store. Raises DataError when the store's copy is damaged."""
        if self.manifest.tokenizer_kind == "bytes":
            return ByteTokenizer()
        self._read_file(_TOKENIZER_NAME)
        return SentencePieceTokenizer(self.path / _TOKENIZER_NAME)

    def split_rows(self, split: str) -> list[tuple[int, int]]:
        """The ranges [start, stop) of rows that a split has. Raises DataError when there is no such split."""
        if split not in self.manifest.splits:
            raise DataError(
                f"{self.path} has no split {split!r}, only {', '.join(self.manifest.splits)}: name one of these, or "
                "build a store with --split or --val-input"
            )
        return list(self.manifest.splits[split].rows)

    def read_row(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start:stop] of a row as stored, padding included; uint16 or uint32.

        Raises IndexError for a row that does not exist, DataError for one that is damaged. A checksum covers every
        chunk, and no id outside the vocabulary is let through, so damage never yields wrong tokens.
        """
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row {row} is outside a store of {self.n_rows} rows")
        shard = self.path / shard_name(row, self.manifest.rows_per_shard)
        try:
            tokens = np.asarray(self._tokens[row, start:stop])
        except Exception as error:  # a damaged shard fails in many ways: checksum, index, decoder, short read
            raise DataError(f"row {row} of {self.path} is damaged in shard {shard} ({error}): {_WAY_OUT}") from error
        if tokens.size and tokens.max() >= self.vocab_size:
            raise DataError(f"row {row} of {self.path} is missing from shard {shard}: {_WAY_OUT}")
        return tokens

    def segments_of(self, row: int) -> np.ndarray:
        """int64 [n, 4]: (start, length, document, document_start) of each stretch of a document in the row."""
        span = slice(self._row_offsets[row], self._row_offsets[row + 1])
        return np.stack([column[span] for column in self.segments[1:]], axis=1)

    def check_files(self, full: bool = False) -> list[str]:
        """What is wrong with the files: missing, of another size or, if `full`, of another content.

        Metadata files, which are tiny and say how to read all others, are compared by content in any case.
        """
        problems = []
        for name, expected in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif (size := path.stat().st_size) != expected.n_bytes:
                problems.append(f"{path} has {size} bytes instead of {expected.n_bytes}")
            elif (full or path.name == "zarr.json") and hash_file(path) != expected.sha256:
                problems.append(f"{path} is damaged: its content does not match its checksum")
        return problems

    def unknown_files(self) -> list[str]:
        """Files in the store's folder that are no part of it."""
        known = {*self.manifest.files, MANIFEST_NAME}
        return [name for name in list_files(self.path) if name not in known]

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    @cached_property
    def _tokens(self) -> Any:
        return self._group["tokens"]

    @cached_property
    def _row_offsets(self) -> np.ndarray:
        return self._read_sidecar("segments/row_offsets")

    def _read_sidecar(self, name: str) -> np.ndarray:
        try:
            array: Any = self._group[name]
            values = np.asarray(array[:])
        except Exception as error:  # as in read_row
            raise DataError(f"{self.path / name} is damaged ({error}): {_WAY_OUT}") from error
        if (values == array.fill_value).any():
            raise DataError(f"part of {self.path / name} is missing: {_WAY_OUT}")
        return values

    def _read_file(self, name: str) -> bytes:
        path = self.path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): {_WAY_OUT}") from error
        if hashlib.sha256(data).hexdigest() != self.manifest.files[name].sha256:
            raise DataError(f"{path} is damaged, its content does not match its checksum: {_WAY_OUT}")
        return data


def shard_name(row: int, rows_per_shard: int) -> str:
    """The shard file that holds a row, as a path in the store."""
    return f"tokens/c/{row // rows_per_shard}/0"


def chunk_tokens(seq_len: int) -> int:
    """How much of a row is one chunk: all of it, or the largest divisor that is not too long."""
    divisors = (n for n in range(min(seq_len, MAX_CHUNK_TOKENS), MIN_CHUNK_TOKENS - 1, -1) if seq_len % n == 0)
    return next(divisors, seq_len)


def create_tokens(path: Path, settings: StoreSettings, n_rows: int) -> None:
    """Starts a store in an empty directory: the group, and `tokens` without any shard yet."""
    dtype = token_dtype(settings.vocab_size)
    zarr.create_group(path).create_array(
        "tokens",
        shape=(n_rows, settings.seq_len),
        chunks=(1, chunk_tokens(settings.seq_len)),
        shards=(min(settings.rows_per_shard, n_rows), settings.seq_len),
        dtype=dtype,
        compressors=_codec(),
        fill_value=int(np.iinfo(dtype).max),
    )


def write_shard(path: Path, first_row: int, rows: np.ndarray) -> tuple[str, FileRecord]:
    """Writes a whole shard, `rows` [n, seq_len] from `first_row` on. Returns the name and record of its file.

    A shard must be written once, by one writer: two writers would lose each other's rows without an error.
    """
    array: Any = zarr.open_group(path, mode="r+")["tokens"]
    array[first_row : first_row + len(rows)] = rows
    name = shard_name(first_row, array.shards[0])
    return name, record_file(path / name)


def write_sidecars(
    path: Path, segments: Segments, n_rows: int, tokenizer: Tokenizer, documents: Iterable[DocumentRecord]
) -> None:
    """Writes everything but the tokens and the manifest."""
    group = zarr.open_group(path, mode="r+")
    valid = np.bincount(segments.row, weights=segments.length, minlength=n_rows).astype(np.int64)
    _create_sidecar(group, "valid_tokens", valid)
    _create_sidecar(group, "token_bytes", tokenizer.token_bytes)
    table = group.create_group("segments")
    _create_sidecar(table, "row_offsets", np.searchsorted(segments.row, np.arange(n_rows + 1)))
    for name, column in segments._asdict().items():
        if name != "row":
            _create_sidecar(table, name, column)
    with (path / _DOCUMENTS_NAME).open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(tokenizer.path, path / _TOKENIZER_NAME)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest: the last file of a store."""
    (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def list_files(path: Path) -> list[str]:
    """All files in a directory and below it, by their paths in it, sorted."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def record_file(path: Path) -> FileRecord:
    """What the manifest says of a file."""
    return FileRecord(n_bytes=path.stat().st_size, sha256=hash_file(path))


def hash_file(path: Path) -> str:
    """The sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _create_sidecar(group: zarr.Group, name: str, values: np.ndarray) -> None:
    fill_value = np.iinfo(values.dtype).max
    chunks = (min(len(values), _SIDECAR_CHUNK),)
    array = group.create_array(
        name, shape=values.shape, chunks=chunks, dtype=values.dtype, compressors=_codec(), fill_value=int(fill_value)
    )
    array[:] = values


def _codec() -> ZstdCodec:
    return ZstdCodec(level=3, checksum=True)
