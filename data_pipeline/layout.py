"""The Zarr layout of a store, or of an appended part of one, and writing it; `part.py` reads it.

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
    signatures.npy              [n_documents, 128] uint32, with `--duplicates near`: see `duplicates.Signature`
    tokenizer.model             a copy of the SentencePiece model, when there is one
    manifest.json               see `manifest.py`
    parts/0001, ...             what was appended: each laid out as a store of its own (see `store.py`)

Chunks are Zstandard frames *with* checksum: without one, 11 of 12 flipped bits gave wrong tokens and no error. The
fill value is no token, so that a shard that is not there is noticed. Zarr encodes in memory and never writes to disk:
every file appears whole, by a rename, so that a writer may be killed at any time, and two may write the same file.
"""

import atexit
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import cpu
from zarr.codecs import ZstdCodec
from zarr.storage import MemoryStore

from data_pipeline.errors import DataError
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
from data_pipeline.tokenizer import SentencePieceTokenizer, Tokenizer, token_dtype

MAX_CHUNK_TOKENS = 65_536
"""Longer rows are cut into several chunks, so that a slice of a row can be read without the rest."""
MIN_CHUNK_TOKENS = 1_024
"""A row whose length has no divisor from here to MAX_CHUNK_TOKENS stays one chunk: tiny chunks cost far more."""
WAY_OUT = "restore it from a copy, or build the store again"
_SIDECAR_CHUNK = 1 << 16
DOCUMENTS_NAME = "documents.jsonl"
INPUTS_NAME = "inputs.jsonl"
PROBLEMS_NAME = "problems.jsonl"
SIGNATURES_NAME = "signatures.npy"
TOKENIZER_NAME = "tokenizer.model"
_PATIENCE_S = 60


@atexit.register  # after Zarr's own, and so called before it
def _end_thread_of_zarr() -> None:
    """At its exit Zarr waits 0.2 s for its thread, and complains of one that a busy machine has not ended by then."""
    with suppress(ImportError, AttributeError):  # of what other versions of Zarr may have elsewhere
        from zarr.core.sync import iothread, loop

        if loop[0] is not None and iothread[0] is not None:
            loop[0].call_soon_threadsafe(loop[0].stop)
            iothread[0].join(_PATIENCE_S)


class ArrayLayout(NamedTuple):
    """What is fixed about an array besides its values, by the names of Zarr's attributes."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    dtype: np.dtype
    fill_value: int


def tokens_layout(settings: StoreSettings, n_rows: int) -> ArrayLayout:
    dtype = token_dtype(settings.vocab_size)
    return ArrayLayout(
        shape=(n_rows, settings.seq_len),
        chunks=(1, chunk_tokens(settings.seq_len)),
        shards=(max(1, min(settings.rows_per_shard, n_rows)), settings.seq_len),
        dtype=dtype,
        fill_value=int(np.iinfo(dtype).max),
    )


def sidecar_layout(length: int, dtype: np.dtype) -> ArrayLayout:
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
    _create_array(zarr.create_group(MemoryStore(files)), "tokens", tokens_layout(settings, n_rows))
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
    signatures: np.ndarray | None = None,
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
        _create_array(group, name, sidecar_layout(len(values), values.dtype))[:] = values
    _put_files(path, files)
    for name, records in ((DOCUMENTS_NAME, documents), (INPUTS_NAME, inputs), (PROBLEMS_NAME, problems)):
        with publishing(path / name) as file:
            file.writelines(json.dumps(record._asdict(), ensure_ascii=False).encode() + b"\n" for record in records)
    if signatures is not None:
        with publishing(path / SIGNATURES_NAME) as file:
            np.save(file, signatures)
    if isinstance(tokenizer, SentencePieceTokenizer):
        with publishing(path / TOKENIZER_NAME) as file:
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
