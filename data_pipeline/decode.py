"""The exact text back: of one document, of one row, or of the whole corpus as files.

Rows are read in order, each once. Packing keeps the stretches of a document in order too, so a corpus of any size is
rebuilt by appending.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_pipeline.errors import DataError
from data_pipeline.manifest import DocumentRecord
from data_pipeline.staging import staged
from data_pipeline.store import Store


def decode_document(store: Store, name: str) -> Iterator[bytes]:
    """The bytes of a document, stretch by stretch. Raises DataError when the store has none of that name."""
    document = next((document for document in store.documents if document.name == name), None)
    if document is None:
        raise DataError(f"{store.path} has no document {name!r}: inspect and documents.jsonl list names")
    segments = store.segments
    for index in (segments.document == document.id).nonzero()[0]:
        start = int(segments.start[index])
        stop = start + int(segments.length[index])
        yield store.tokenizer.decode(store.read_row(int(segments.row[index]), start, stop))


def decode_row(store: Store, row: int) -> bytes:
    """The bytes of a row, padding left out. Raises DataError when there is no such row."""
    if not 0 <= row < store.n_rows:
        raise DataError(f"{store.path} has no row {row}: expected 0 to {store.n_rows - 1}")
    return store.tokenizer.decode(store.read_row(row, 0, int(store.valid_tokens[row])))


def decode_all(store: Store, output: Path) -> int:
    """Writes every document to its name below the directory `output`, checks its hash, returns how many there are.

    Raises DataError when `output` exists and is not empty, when a name would lead out of it, or when what comes out
    is not what went in.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} is not an empty directory: choose another --output")
    for document in store.documents:
        check_name(document.name)
    with staged(output) as partial:
        partial.mkdir()
        for document in store.documents:
            (partial / document.name).parent.mkdir(parents=True, exist_ok=True)
            (partial / document.name).touch()
        for row in range(store.n_rows):
            tokens = store.read_row(row)
            for start, length, number, _ in store.segments_of(row).tolist():
                with (partial / store.documents[number].name).open("ab") as file:
                    file.write(store.tokenizer.decode(tokens[start : start + length]))
        for document in store.documents:
            _check_content(store, document, partial / document.name)
    return len(store.documents)


def check_name(name: str) -> None:
    """Raises DataError for a document name that would be written outside the output directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise DataError(f"document {name!r} would be written outside the output directory: use --document instead")


def _check_content(store: Store, document: DocumentRecord, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != document.sha256:
        raise DataError(f"document {document.name!r} of {store.path} does not decode to its sha256: run verify")
