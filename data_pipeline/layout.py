"""The Zarr layout of a store, or of an appended part of one: the only file that knows it.

A store is a Zarr v3 group that plain `zarr.open(path)` reads, with files of our own beside the arrays:

    tokens                      [n_rows, seq_len] uint16 or uint32; a chunk is a row, a shard file many rows
    valid_tokens                [n_rows] int64: how many tokens of a row are real; the rest is padding, stored as EOS
    segments/row_offsets        [n_rows + 1] int64: row r has segments row_offsets[r] to row_offsets[r + 1]
    segments/start, length, document, document_start
                                [n_segments] int64, in the order of rows: see `packing.Segments`
    token_bytes                 [vocab_size] uint16: bytes of text that a token stands for
    documents.jsonl             one line per document: see `manifest.DocumentRecord`
    inputs.jsonl                one line per file that was read: see `manifest.InputRecord`
    problems.jsonl              one line per bad or duplicate document: see `manifest.ProblemRecord`
    tokenizer.model             a copy of the SentencePiece model, when there is one
    manifest.json               see `manifest.py`
    parts/0001, ...             what was appended: each laid out as a store of its own (see `store.py`)

Chunks are Zstandard frames *with* checksum: without one, 11 of 12 flipped bits gave wrong tokens and no error. The
fill value is no token, so that a shard that is not there is noticed. Zarr encodes in memory and never writes to disk:
every file appears whole, by a rename, so that a writer may be killed at any time, and two may write the same file.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from data_pipeline.errors import DataError, reading_failed
from data_pipeline.manifest import (
    MANIFEST_NAME,
    DocumentRecord,
    FileRecord,
    InputRecord,
    Manifest,
    ProblemRecord,
    StoreSettings,
)
from data_pipeline.packing import Segments
from data_pipeline.staging import publishing
from data_pipeline.tokenizer import N_ENDS, SentencePieceTokenizer, Tokenizer, load_tokenizer, token_dtype

MAX_CHUNK_TOKENS = 65_536
"""Longer rows are cut into several chunks, so that a slice of a row can be read without the rest."""
MIN_CHUNK_TOKENS = 1_024
"""A row whose length has no divisor from here to MAX_CHUNK_TOKENS stays one chunk: tiny chunks cost far more."""
WAY_OUT = "restore it from a copy, or build the store again"
_SIDECAR_CHUNK = 1 << 16
_DOCUMENTS_NAME = "documents.jsonl"
_INPUTS_NAME = "inputs.jsonl"
_PROBLEMS_NAME = "problems.jsonl"
_TOKENIZER_NAME = "tokenizer.model"

Record = TypeVar("Record")


class StorePart:
    """What one manifest describes: a store as it was built, or what was appended to one.

    Rows and documents are numbered as in the whole store: those of a part begin where those of the part before end.
    Cheap to make: arrays are opened when they are first read, in the process that reads them.
    """

    def __init__(self, path: Path, manifest: Manifest, first_row: int = 0, first_document: int = 0) -> None:
        self.path = path
        self.manifest = manifest
        self.first_row = first_row
        self.first_document = first_document

    @property
    def stop_row(self) -> int:
        """One past the last row."""
        return self.first_row + self.manifest.n_rows

    @property
    def stop_document(self) -> int:
        """One past the last document."""
        return self.first_document + sum(split.documents for split in self.manifest.splits.values())

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: bytes of text that each token stands for; 0 for BOS and EOS."""
        return self._read_sidecar("token_bytes")

    @cached_property
    def valid_tokens(self) -> np.ndarray:
        """int64 [rows of the part]: how many tokens of each row are not padding."""
        return self._read_sidecar("valid_tokens")

    @cached_property
    def segments(self) -> Segments:
        """All segments of the part's rows."""
        return Segments(
            row=np.repeat(np.arange(self.first_row, self.stop_row), np.diff(self._row_offsets)),
            start=self._read_sidecar("segments/start"),
            length=self._read_sidecar("segments/length"),
            document=self._read_sidecar("segments/document") + self.first_document,
            document_start=self._read_sidecar("segments/document_start"),
        )

    def segments_of(self, row: int) -> np.ndarray:
        """int64 [n, 4]: (start, length, document, document_start) of each stretch of a document in the row."""
        span = slice(*self._row_offsets[row - self.first_row : row - self.first_row + 2])
        return np.stack([column[span] for column in self.segments[1:]], axis=1)

    def documents(self) -> Iterator[DocumentRecord]:
        """The document table, line by line. Raises DataError when its file is damaged."""
        documents = self._read_records(_DOCUMENTS_NAME, DocumentRecord)
        if not self.first_document:
            return documents
        return (document._replace(id=document.id + self.first_document) for document in documents)

    def inputs(self) -> Iterator[InputRecord]:
        """The files that were read. Raises DataError when the list is damaged."""
        return self._read_records(_INPUTS_NAME, InputRecord)

    def problems(self) -> Iterator[ProblemRecord]:
        """What was wrong with documents. Raises DataError when the list is damaged."""
        return self._read_records(_PROBLEMS_NAME, ProblemRecord)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store. Raises DataError when the store's copy is damaged."""
        kind = self.manifest.tokenizer_kind
        if kind == "sentencepiece":
            self._check_content(_TOKENIZER_NAME)
            return SentencePieceTokenizer(self.path / _TOKENIZER_NAME)
        return load_tokenizer(kind, None if kind == "bytes" else self.manifest.vocab_size - N_ENDS)

    def read_row(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start:stop] of a row of this part as stored, padding included; uint16 or uint32.

        Raises DataError for a damaged row: a checksum covers every chunk, and no id outside the vocabulary is let
        through. Raises Exhausted where this process has no more files or memory.
        """
        return self._read(row, (row - self.first_row, slice(start, stop)))

    def read_rows(self, first: int, stop: int) -> np.ndarray:
        """Rows `first` to `stop` - 1 of this part at once, [n, seq_len]. Raises as `read_row`, of the first of them."""
        return self._read(first, (slice(first - self.first_row, stop - self.first_row), slice(None)))

    def _read(self, row: int, selection: tuple[int | slice, slice]) -> np.ndarray:
        shard = self.path / shard_name(row - self.first_row, self.manifest.rows_per_shard)
        try:
            tokens = np.asarray(self._tokens[selection])
        except Exception as error:  # a damaged shard fails in many ways: checksum, index, decoder, short read
            what = f"row {row} of {self.path} is damaged in shard {shard} ({error}): {WAY_OUT}"
            raise reading_failed(error, what) from error
        if tokens.size and tokens.max() >= self.manifest.vocab_size:
            raise DataError(f"row {row} of {self.path} is missing from shard {shard}: {WAY_OUT}")
        return tokens

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

    def check_layout(self) -> list[str]:
        """Zarr's metadata of all arrays against the manifest. Raises DataError when there is none to read."""
        manifest, n_rows = self.manifest, self.manifest.n_rows
        expected = {"tokens": _tokens_layout(manifest, n_rows)}
        (n_segments,) = self._array("segments/start").shape
        for name, length in {
            "valid_tokens": n_rows,
            "token_bytes": manifest.vocab_size,
            "segments/row_offsets": n_rows + 1,
            **{f"segments/{name}": n_segments for name in Segments._fields if name != "row"},
        }.items():
            dtype = np.dtype(np.uint16 if name == "token_bytes" else np.int64)
            expected[name] = _sidecar_layout(length, dtype)
        return [
            f"{self.path / name} has {fact} {found} instead of {value}"
            for name, layout in expected.items()
            for fact, value in layout._asdict().items()
            if (found := getattr(self._array(name), fact)) != value
        ]

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(self.path, mode="r")

    @cached_property
    def _tokens(self) -> Any:
        return self._group["tokens"]

    @cached_property
    def _row_offsets(self) -> np.ndarray:
        name = "segments/row_offsets"
        offsets = self._read_sidecar(name)
        (n_segments,) = self._array("segments/start").shape
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != n_segments:
            raise DataError(f"{self.path / name} does not fit {n_segments} segments: {WAY_OUT}")
        return offsets

    def _array(self, name: str) -> Any:
        try:
            return self._group[name]
        except Exception as error:  # Zarr raises whatever its JSON reader met
            raise reading_failed(error, f"{self.path / name} is damaged ({error}): {WAY_OUT}") from error

    def _read_sidecar(self, name: str) -> np.ndarray:
        array = self._array(name)
        for file in self.manifest.files:  # a chunk's own checksum does not tell one table's chunk from another's
            if file.startswith(f"{name}/c/"):
                self._check_content(file)
        try:
            values = np.asarray(array[:])
        except Exception as error:  # as in read_row
            raise reading_failed(error, f"{self.path / name} is damaged ({error}): {WAY_OUT}") from error
        if (values == array.fill_value).any():
            raise DataError(f"part of {self.path / name} is missing: {WAY_OUT}")
        return values

    def _read_records(self, name: str, kind: Callable[..., Record]) -> Iterator[Record]:
        self._check_content(name)
        with (self.path / name).open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield kind(**json.loads(line))

    def _check_content(self, name: str) -> None:
        path = self.path / name
        try:
            digest = hash_file(path)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): {WAY_OUT}") from error
        if digest != self.manifest.files[name].sha256:
            raise DataError(f"{path} is damaged, its content does not match its checksum: {WAY_OUT}")


class ArrayLayout(NamedTuple):
    """What is fixed about an array besides its values, by the names of Zarr's attributes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    dtype: np.dtype
    fill_value: int


def _tokens_layout(settings: StoreSettings, n_rows: int) -> ArrayLayout:
    dtype = token_dtype(settings.vocab_size)
    return ArrayLayout(
        shape=(n_rows, settings.seq_len),
        chunks=(1, chunk_tokens(settings.seq_len)),
        shards=(max(1, min(settings.rows_per_shard, n_rows)), settings.seq_len),
        dtype=dtype,
        fill_value=int(np.iinfo(dtype).max),
    )


def _sidecar_layout(length: int, dtype: np.dtype) -> ArrayLayout:
    chunk = max(1, min(length, _SIDECAR_CHUNK))
    return ArrayLayout((length,), (chunk,), None, dtype, int(np.iinfo(dtype).max))


def shard_name(row: int, rows_per_shard: int) -> str:
    """The shard file that holds a row of a part, counted from the part's first, as a path in the part."""
    return f"tokens/c/{row // rows_per_shard}/0"


def chunk_tokens(seq_len: int) -> int:
    """How much of a row is one chunk: all of it, or the largest divisor that is not too long."""
    divisors = (n for n in range(min(seq_len, MAX_CHUNK_TOKENS), MIN_CHUNK_TOKENS - 1, -1) if seq_len % n == 0)
    return next(divisors, seq_len)


def create_tokens(path: Path, settings: StoreSettings, n_rows: int) -> None:
    """Starts a store in a directory: the group, and `tokens` without any shard. Harmless when that is done already."""
    files: dict[str, Buffer] = {}
    _create_array(zarr.create_group(MemoryStore(files)), "tokens", _tokens_layout(settings, n_rows))
    _put_files(path, files)


def write_shard(path: Path, first_row: int, rows: np.ndarray) -> tuple[str, FileRecord]:
    """Writes a whole shard, `rows` [n, seq_len] from row `first_row` of the part on. Returns the file and its record.

    May be killed at any time, and done by two processes at once: the file appears whole. Raises FileNotFoundError when
    `tokens` is gone, and never makes it anew: by then others have put the store in its place.
    """
    metadata = "tokens/zarr.json"
    files: dict[str, Buffer] = {metadata: cpu.Buffer.from_bytes((path / metadata).read_bytes())}
    array: Any = zarr.open_array(MemoryStore(files), path="tokens", mode="r+")
    array[first_row : first_row + len(rows)] = rows
    name = shard_name(first_row, array.shards[0])
    for folder in (path / "tokens" / "c", (path / name).parent):
        folder.mkdir(exist_ok=True)
    # Beside the store until it is whole: of a writer that wakes late, the store may be listed and published by then.
    return name, _put_file(path / name, files[name], path.parent)


def check_whole(path: Path, shards: Mapping[str, FileRecord]) -> None:
    """Raises DataError when `tokens` in a directory is not what `create_tokens` and `write_shard` have written."""
    for name in ("zarr.json", "tokens/zarr.json", *shards):
        file = path / name
        if not file.is_file() or (name in shards and file.stat().st_size != shards[name].n_bytes):
            raise DataError(f"{file} is not what was written: remove {path.parent} and build again")


def remove_all_but_tokens(path: Path) -> None:
    """What `write_sidecars` and `write_manifest` left when they were killed."""
    for entry in path.iterdir():
        if entry.name not in ("tokens", "zarr.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def write_sidecars(
    path: Path,
    segments: Segments,
    n_rows: int,
    tokenizer: Tokenizer,
    documents: Iterable[DocumentRecord],
    inputs: Iterable[InputRecord],
    problems: Iterable[ProblemRecord],
) -> None:
    """Writes everything but the tokens and the manifest, and removes what writers that were killed left behind."""
    for leftover in path.rglob("*.partial"):
        leftover.unlink(missing_ok=True)
    columns = {f"segments/{name}": column for name, column in segments._asdict().items() if name != "row"}
    arrays = {
        "valid_tokens": np.bincount(segments.row, weights=segments.length, minlength=n_rows).astype(np.int64),
        "token_bytes": tokenizer.token_bytes,
        "segments/row_offsets": np.searchsorted(segments.row, np.arange(n_rows + 1)),
        **columns,
    }
    files: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(files))
    group.create_group("segments")
    for name, values in arrays.items():
        _create_array(group, name, _sidecar_layout(len(values), values.dtype))[:] = values
    _put_files(path, files)
    for name, records in ((_DOCUMENTS_NAME, documents), (_INPUTS_NAME, inputs), (_PROBLEMS_NAME, problems)):
        with publishing(path / name) as file:
            file.writelines(json.dumps(record._asdict(), ensure_ascii=False).encode() + b"\n" for record in records)
    if isinstance(tokenizer, SentencePieceTokenizer):
        with publishing(path / _TOKENIZER_NAME) as file:
            file.write(tokenizer.model)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest: the last file of a store."""
    with publishing(path / MANIFEST_NAME) as file:
        file.write(manifest.to_bytes())


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


def _create_array(group: zarr.Group, name: str, layout: ArrayLayout) -> Any:
    return group.create_array(name, **layout._asdict(), compressors=ZstdCodec(level=3, checksum=True))


def _put_files(path: Path, files: Mapping[str, Buffer]) -> None:
    """Writes files by their names in the directory `path`."""
    for name, buffer in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        _put_file(path / name, buffer)


def _put_file(path: Path, buffer: Buffer, folder: Path | None = None) -> FileRecord:
    data = buffer.to_bytes()
    with publishing(path, folder) as file:
        file.write(data)
    return FileRecord(n_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
