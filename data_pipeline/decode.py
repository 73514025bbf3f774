"""The exact text back: of one document, of one row, of a split as lines of JSON, or of the whole corpus as files.

Rows are read in order, each once. Packing keeps the stretches of a document in order too, so a corpus of any size is
rebuilt by appending. Where windows overlap, each gives what the one before it did not hold.
"""

import json
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_pipeline.bar import Bar
from data_pipeline.errors import DataError
from data_pipeline.layout import hash_file
from data_pipeline.manifest import DocumentRecord
from data_pipeline.part import StorePart
from data_pipeline.staging import staged
from data_pipeline.store import Store
from data_pipeline.tokenizer import IntegerTokenizer, Tokenizer, value_dtype

_DECODE_TOKENS = 1 << 20
"""Decoded at a time: a row may be tens of millions of tokens, each of which is a Python object for a moment."""
_REMEMBERED_TOKENS = 1 << 25
"""Of the rows read last, in 64 to 128 MB."""


class Stretch(NamedTuple):
    """Tokens of a row that continue a document."""

    document: int
    start: int
    stop: int
    last: bool
    """Whether the document ends with it."""


def fresh_stretches(segments: np.ndarray, covered: np.ndarray, lengths: np.ndarray) -> Iterator[Stretch]:
    """What a row adds to its documents, given its `segments` [n, 4] as `Store.segments_of` has them.

    `covered` int64 [n_documents] is how many tokens of each document the rows before hold, and is brought up to date;
    `lengths` int64 [n_documents] is how many there are.
    """
    for start, length, document, document_start in segments.tolist():
        overlap = int(covered[document]) - document_start
        covered[document] = document_start + length
        yield Stretch(document, start + overlap, start + length, document_start + length == lengths[document])


def decode_tokens(tokenizer: Tokenizer, tokens: np.ndarray) -> Iterator[bytes]:
    """The bytes of any number of tokens [n], in bounded memory."""
    for start in range(0, len(tokens), _DECODE_TOKENS):
        yield tokenizer.decode(tokens[start : start + _DECODE_TOKENS])


def decode_document(store: Store, name: str) -> Iterator[bytes]:
    """The bytes of a document, piece by piece. Raises DataError when the store has none of that name."""
    for part in store.parts:
        for document in part.documents():
            if document.name == name:
                places = np.flatnonzero(part.segments.document == document.id)
                yield from _stretches_decoded(part, places, part.read_row)
                return
    raise DataError(f"{store.path} has no document {name!r}: inspect and documents.jsonl list names")


def _stretches_decoded(part: StorePart, places: np.ndarray, read_row: Callable[..., np.ndarray]) -> Iterator[bytes]:
    """The bytes of a document, whose stretches have these places [n], in order, in the part's table of segments.

    read_row: `part.read_row`, or one that remembers.
    """
    stop = 0
    for place in places:
        row, start, length, _, document_start = (int(column[place]) for column in part.segments)
        tokens = read_row(row, start + stop - document_start, start + length)
        stop = document_start + length
        yield from decode_tokens(part.tokenizer, tokens)


def decode_split(store: Store, split: str) -> Iterator[bytes]:
    """Each document of a split as a line of JSON, in the store's order: {"name": …, "text": …}, of integers "values".

    Raises DataError when there is no such split, or a document is not UTF-8.
    """
    store.split_rows(split)  # refuses one that is not there
    n_documents, is_seen = store.manifest.splits[split].documents, bool(sys.stdout and sys.stdout.isatty())
    with Bar(desc=f"decode {split}", total=n_documents, unit="document", disable=is_seen) as bar:
        for part in store.parts:
            read_row = _remembering(part)
            in_order = np.argsort(part.segments.document, kind="stable")
            of_places = part.segments.document[in_order]
            for document in (each for each in part.documents() if each.split == split):
                places = in_order[slice(*np.searchsorted(of_places, [document.id, document.id + 1]))]
                content = b"".join(_stretches_decoded(part, places, read_row))
                record = {"name": document.name, **_as_json(document.name, content, store.tokenizer)}
                yield (json.dumps(record, ensure_ascii=False) + "\n").encode()
                bar.update()


def _remembering(part: StorePart) -> Callable[[int, int, int], np.ndarray]:
    """`part.read_row` for many short documents: of the rows read last none is read again."""
    whole = lru_cache(max(1, _REMEMBERED_TOKENS // part.manifest.seq_len))(part.read_row)
    return lambda row, start, stop: whole(row)[start:stop]


def _as_json(name: str, content: bytes, tokenizer: Tokenizer) -> dict[str, str | list[int]]:
    if isinstance(tokenizer, IntegerTokenizer):
        return {"values": np.frombuffer(content, value_dtype(tokenizer.bos_id)).tolist()}
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError as error:
        raise DataError(
            f"document {name!r} is not UTF-8 at byte {error.start}, as JSON must be: give --document or --all for its "
            "bytes as they are"
        ) from None


def decode_row(store: Store, row: int) -> bytes:
    """The bytes of a row, padding left out. Raises DataError when there is no such row."""
    if not 0 <= row < store.n_rows:
        raise DataError(f"{store.path} has no row {row}: expected 0 to {store.n_rows - 1}")
    n_tokens = int(store.lengths_of(row).sum())
    return b"".join(decode_tokens(store.tokenizer, store.read_row(row, 0, n_tokens)))


def decode_all(store: Store, output: Path) -> int:
    """Writes every document to its name below the directory `output`, checks its hash, returns how many there are.

    Raises DataError when `output` exists and is not empty, when a name would lead out of it or is taken, or when what
    comes out is not what went in.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is not an empty directory: choose another --output")
    documents = store.documents
    for document in documents:
        check_name(document.name)
    covered = np.zeros(len(documents), np.int64)
    lengths = np.array([document.tokens for document in documents], np.int64)
    with staged(output) as partial:
        partial.mkdir()
        for document in documents:
            _create(partial, document.name)
        for row in Bar(range(store.n_rows), desc="decode", unit="row"):
            tokens = store.read_row(row)
            for stretch in fresh_stretches(store.segments_of(row), covered, lengths):
                with (partial / documents[stretch.document].name).open("ab") as file:
                    file.writelines(decode_tokens(store.tokenizer, tokens[stretch.start : stretch.stop]))
        for document in documents:
            _check_content(store, document, partial / document.name)
    return len(documents)


def check_name(name: str) -> None:
    """Raises DataError for a document name that would be written outside the output directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"document {name!r} would be written outside the output directory: use --document instead")


def _create(folder: Path, name: str) -> None:
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    except (FileExistsError, NotADirectoryError):
        raise DataError(
            f"document {name!r} cannot be a file of its own beside the others, since its name, or a part of it, is "
            "another document's: use --document instead"
        ) from None


def _check_content(store: Store, document: DocumentRecord, path: Path) -> None:
    if hash_file(path) != document.sha256:
        raise DataError(f"document {document.name!r} of {store.path} does not decode to its sha256: run verify")
