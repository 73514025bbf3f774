"""Documents out of files, as bytes: text mode would rewrite line ends and the promise is every byte back.

A document is one file. Its name, which the store records, is its path below the folder that was asked for, so that
the same corpus gives the same store wherever it lies. A huge document is cut into blocks at places that depend on
its bytes alone, which is what lets any number of processes tokenize it, each in bounded memory, to the same ids.
"""

import codecs
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.parallel import Map

BLOCK_BYTES = 1 << 20
"""Blocks begin near multiples of this. Larger ones gain nothing in speed, and cost memory."""
BOUNDARY_REACH_BYTES = 1 << 16
"""How far past the multiple a newline is looked for before a block may begin inside a line."""
_SCAN_BATCH_BYTES = 8 << 20
_SCAN_BATCH_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class Document:
    """A file of the corpus as it was found. Its size and time tell later whether it changed since."""

    name: str
    """Path below the folder that was asked for, with forward slashes; unique in a corpus."""
    path: Path
    n_bytes: int
    mtime_ns: int
    held_out: bool
    """Whether it came in by --val-input."""


class Span(NamedTuple):
    """The blocks of a document that start at byte `start` or later, before `stop` (multiples of the block size).

    `stop` is the document's size in its last span. Nominal places: `block_boundary` gives the real ones.
    """

    document: int
    start: int
    stop: int


def find_documents(inputs: Iterable[Path], held_out_inputs: Iterable[Path] = ()) -> list[Document]:
    """All documents in `inputs`, sorted by name, with those in `held_out_inputs` marked.

    Raises DataError for a path that is missing or unreadable, a folder without `.txt` files, a name that occurs
    twice, or a corpus without a single byte.
    """
    documents = [
        _stat_document(name, path, held_out)
        for paths, held_out in ((inputs, False), (held_out_inputs, True))
        for source in paths
        for name, path in _files_of(source)
    ]
    documents.sort(key=lambda document: document.name)
    for one, other in pairwise(documents):
        if one.name == other.name:
            raise DataError(
                f"two documents are named {one.name!r}: {one.path} and {other.path}. Names are paths below the "
                "folder given; give a folder that holds both, or rename one"
            )
    for held_out in {document.held_out for document in documents}:
        if not any(document.n_bytes for document in documents if document.held_out == held_out):
            raise DataError(
                f"every document of {'--val-input' if held_out else '--input'} is empty: there is no text to read"
            )
    return documents


def _files_of(source: Path) -> list[tuple[str, Path]]:
    """(name, path) of each document in a file, which counts whatever its suffix, or in a folder."""
    if source.exists() and not source.is_dir():
        return [(source.name, source)]
    if not source.is_dir():
        raise DataError(f"input {source} does not exist: expected a text file or a folder of .txt files")
    found = []
    for folder, subfolders, names in os.walk(source, onerror=_raise_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if links := [name for name in subfolders if Path(folder, name).is_symlink()]:
            raise DataError(
                f"{Path(folder, links[0])} is a link to a folder: name that folder as an input of its own, or remove "
                "the link"
            )
        paths = [Path(folder, name) for name in names if name.endswith(".txt") and not name.startswith(".")]
        found += [(path.relative_to(source).as_posix(), path) for path in paths]
    if not found:
        raise DataError(
            f"no .txt files in {source}: expected at least one, in it or below it. A file of another kind can be "
            "named directly"
        )
    return found


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"cannot read folder {error.filename}: {error.strerror}")


def _stat_document(name: str, path: Path, held_out: bool) -> Document:
    if not _is_unicode(name):
        raise DataError(f"the file name {name!a} is not valid UTF-8: rename it")
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file: leave it out of the corpus")
    return Document(name, path, status.st_size, status.st_mtime_ns, held_out)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def scan_documents(documents: Sequence[Document], utf8: bool, run: Map) -> list[str]:
    """The sha256 (hex) of each document's content, all of it read and checked: see `hash_document`."""
    digests: list[str] = []
    total = sum(document.n_bytes for document in documents)
    with tqdm(desc="check", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for batch_digests, n_bytes in run(_hash_batch, [(batch, utf8) for batch in _batches(documents)]):
            digests += batch_digests
            bar.update(n_bytes)
    return digests


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Consecutive documents: few enough to share the work evenly, and many small ones to make it worth a task."""
    batch: list[Document] = []
    room = _SCAN_BATCH_BYTES
    for document in documents:
        batch.append(document)
        room -= document.n_bytes
        if room <= 0 or len(batch) == _SCAN_BATCH_DOCUMENTS:
            yield batch
            batch, room = [], _SCAN_BATCH_BYTES
    if batch:
        yield batch


def _hash_batch(task: tuple[list[Document], bool]) -> tuple[list[str], int]:
    documents, utf8 = task
    return [hash_document(document, utf8) for document in documents], sum(d.n_bytes for d in documents)


def hash_document(document: Document, utf8: bool) -> str:
    """The sha256 (hex) of a document's bytes, read once in bounded memory.

    Raises DataError when it cannot be read or, with `utf8`, when it is not valid UTF-8, naming the byte.
    """
    digest = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    position = 0
    try:
        with document.path.open("rb") as file:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
                if utf8:
                    _check_utf8(decoder, chunk, position, document, final=False)
                position += len(chunk)
        if utf8:
            _check_utf8(decoder, b"", position, document, final=True)
    except OSError as error:
        raise DataError(f"cannot read {document.path}: {error.strerror}") from error
    return digest.hexdigest()


def _check_utf8(
    decoder: codecs.IncrementalDecoder, chunk: bytes, position: int, document: Document, final: bool
) -> None:
    pending = len(decoder.getstate()[0])  # bytes of an unfinished character, seen in the chunk before
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{document.path} is not valid UTF-8 at byte {position - pending + error.start} ({error.reason}): "
            "convert it to UTF-8, leave it out, or build with --tokenizer bytes"
        ) from None


def plan_tasks(sizes: Sequence[int], block_bytes: int, task_bytes: int) -> list[list[Span]]:
    """Cuts documents of `sizes` bytes into tasks of about `task_bytes`, in order.

    The tasks' spans end to end are the documents end to end. An empty document has one empty span.
    """
    tasks: list[list[Span]] = [[]]
    room = task_bytes
    for document, size in enumerate(sizes):
        start = 0
        while True:
            stop = min(start + max(room // block_bytes, 1) * block_bytes, size)
            tasks[-1].append(Span(document, start, stop))
            room -= stop - start + 1  # the 1 keeps tasks short when all documents are empty
            if room < block_bytes:
                tasks.append([])
                room = task_bytes
            if stop == size:
                break
            start = stop
    return [task for task in tasks if task]


def read_blocks(document: Document, start: int, stop: int, block_bytes: int) -> Iterator[bytes]:
    """The blocks of a span, one at a time. Raises DataError when the file is not what was found before."""
    try:
        with document.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (document.n_bytes, document.mtime_ns):
                raise DataError(f"{document.path} changed while it was being read: run the command again")
            begin = block_boundary(file, start, document.n_bytes)
            for nominal_stop in range(start + block_bytes, stop + block_bytes, block_bytes):
                end = block_boundary(file, nominal_stop, document.n_bytes)
                file.seek(begin)
                yield file.read(end - begin)
                begin = end
    except OSError as error:
        raise DataError(f"cannot read {document.path}: {error.strerror}") from error


def block_boundary(file: BinaryIO, nominal: int, size: int) -> int:
    """The byte where the block of a file that should begin at byte `nominal` does begin.

    Just after the next newline; without one in reach, at the next UTF-8 character. 0 and `size` are boundaries.
    """
    if nominal == 0 or nominal >= size:
        return min(nominal, size)
    file.seek(nominal)
    reach = file.read(BOUNDARY_REACH_BYTES)
    newline = reach.find(b"\n")
    if newline >= 0:
        return nominal + newline + 1
    continuation = next((i for i, byte in enumerate(reach[:4]) if byte & 0xC0 != 0x80), 0)
    return nominal + continuation
