"""Reading a part of a store: the store as it was built, or what was appended to it. What lies where: see `layout.py`.

Whatever is read is checked: a chunk of tokens by its checksum, every other file by its hash in the manifest.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import zarr

from data_pipeline.errors import DataError, reading_failed
from data_pipeline.layout import (
    DOCUMENTS_NAME,
    INPUTS_NAME,
    PROBLEMS_NAME,
    SIGNATURES_NAME,
    TOKENIZER_NAME,
    WAY_OUT,
    hash_file,
    shard_name,
    sidecar_layout,
    tokens_layout,
)
from data_pipeline.manifest import DocumentRecord, InputRecord, Manifest, ProblemRecord
from data_pipeline.packing import Segments
from data_pipeline.tokenizer import N_ENDS, SentencePieceTokenizer, Tokenizer, load_tokenizer

Record = TypeVar("Record")


class StorePart:
    """What one manifest describes: a store as it was built, or what was appended to one.

    Rows and documents are numbered as in the whole store: those of a part begin where those of the part before end.
    Cheap to make: arrays are opened when they are first read, in the process that reads them.
    """

    def __init__(self, path: Path, manifest: Manifest, first_row: int, first_document: int) -> None:
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
        return np.stack([column[self._span(row)] for column in self.segments[1:]], axis=1)

    def lengths_of(self, row: int) -> np.ndarray:
        """uint32 [n]: the lengths of these stretches, without reading the rest of the table, which is nine times as
        large in memory: a rank that trains needs no more."""
        return self._lengths[self._span(row)]

    def _span(self, row: int) -> slice:
        """Where the segments of a row are in the table."""
        return slice(*self._row_offsets[row - self.first_row : row - self.first_row + 2])

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self._read_sidecar("segments/length").astype(np.uint32)

    def documents(self) -> Iterator[DocumentRecord]:
        """The document table, line by line. Raises DataError when its file is damaged."""
        documents = self._read_records(DOCUMENTS_NAME, DocumentRecord)
        if not self.first_document:
            return documents
        return (document._replace(id=document.id + self.first_document) for document in documents)

    def inputs(self) -> Iterator[InputRecord]:
        """The files that were read. Raises DataError when the list is damaged."""
        return self._read_records(INPUTS_NAME, InputRecord)

    def problems(self) -> Iterator[ProblemRecord]:
        """What was wrong with documents. Raises DataError when the list is damaged."""
        return self._read_records(PROBLEMS_NAME, ProblemRecord)

    @property
    def has_signatures(self) -> bool:
        """Whether it was built with `--duplicates near`, and not by a version that did not keep signatures yet."""
        return SIGNATURES_NAME in self.manifest.files

    def signatures(self) -> np.ndarray | None:
        """uint32 [documents, 128]: see `duplicates.Signature`; None where there are none.

        Raises DataError when their file is damaged.
        """
        if not self.has_signatures:
            return None
        self._check_content(SIGNATURES_NAME)
        return np.load(self.path / SIGNATURES_NAME, allow_pickle=False)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store. Raises DataError when the store's copy is damaged."""
        kind = self.manifest.tokenizer_kind
        if kind == "sentencepiece":
            self._check_content(TOKENIZER_NAME)
            return SentencePieceTokenizer(self.path / TOKENIZER_NAME)
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

    def read_chosen(self, rows: np.ndarray) -> np.ndarray:
        """These rows of this part, int64 [n], at once: [n, seq_len]. Raises as `read_row`, of the first damaged one."""
        try:
            return self._read(rows[0], (rows - self.first_row, slice(None)))
        except DataError:  # of any of them
            for row in rows.tolist():
                self.read_row(row)
            raise

    def _read(self, row: int, selection: tuple[int | slice | np.ndarray, slice]) -> np.ndarray:
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
        expected = {"tokens": tokens_layout(manifest, n_rows)}
        (n_segments,) = self._array("segments/start").shape
        for name, length in {
            "valid_tokens": n_rows,
            "token_bytes": manifest.vocab_size,
            "segments/row_offsets": n_rows + 1,
            **{f"segments/{name}": n_segments for name in Segments._fields if name != "row"},
        }.items():
            dtype = np.dtype(np.uint16 if name == "token_bytes" else np.int64)
            expected[name] = sidecar_layout(length, dtype)
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
