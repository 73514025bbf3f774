"""Is every byte of a store still what was built, and does it all fit together?

Every problem is reported, not only the first. The full check trusts nothing: hashes of all files, Zarr's own
metadata against the manifest, the tables against each other, and every document decoded and compared with the hash of
its source. Memory does not grow with the text: rows are read one at a time, and a document is a hash in the making.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.bar import Bar
from data_pipeline.config import POLICIES
from data_pipeline.decode import decode_tokens, fresh_stretches
from data_pipeline.documents import Reading, Span, read_parts
from data_pipeline.duplicates import N_PERMUTATIONS
from data_pipeline.errors import BadDocument, DataError, Exhausted
from data_pipeline.files import InputFile, find_files, hash_file
from data_pipeline.manifest import UNREADABLE, Manifest
from data_pipeline.packing import Segments
from data_pipeline.part import StorePart
from data_pipeline.store import Store, part_path, read_part
from data_pipeline.tokenizer import N_ENDS

_BATCH_TOKENS = 1 << 20
_EMPTY = np.frombuffer(hashlib.sha256().digest(), np.uint8)


class Documents(NamedTuple):
    """What the table of a part says of each document: arrays [n_documents]."""

    n_bytes: np.ndarray
    sha256: np.ndarray
    """uint8 [n_documents, 32]"""
    split: np.ndarray
    """int64: the split's number in the manifest."""
    tokens: np.ndarray


def verify(path: Path, quick: bool = False, sources: Sequence[str] = ()) -> list[str]:
    """The problems of a store, a line each; none when it is sound.

    Quick: the manifests are whole, every file is there and has its size. `sources` are inputs as the build's --input
    has them, all that the store was made of: they are compared with what it records and, unless `quick`, read anew.
    Raises DataError when there is no store, or nothing in `sources` that it was made of.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: build a store with python -m data_pipeline build")
    try:
        root = Manifest.read(path)
    except DataError as error:
        return [str(error)]
    problems, appended = [], {}
    for name in root.parts:
        try:
            appended[name] = read_part(path, root, name)
        except DataError as error:
            problems.append(str(error))
    store = Store(path, root, appended)
    problems += store.check_files(full=not quick)
    if not quick:
        damaged = {part_path(path, name) for name in root.parts.keys() - appended.keys()}
        unknown = {path / name for name in store.unknown_files()} - damaged
        problems += [f"{file} is no part of the store" for file in sorted(unknown)]
        problems += [problem for part in store.parts for problem in check_part(part)]
        problems += check_names(store)
    return [*problems, *(check_sources(store, sources, quick) if sources else ())]


def check_sources(store: Store, sources: Sequence[str], quick: bool) -> Iterator[str]:
    """Compares files with what the store was made of, by name, and unless `quick` their documents with the store's.

    Yields what is on one side only, too. Raises DataError when there is nothing that is on both.
    """
    try:
        recorded = {record.name: record.sha256 for record in store.inputs}
        documents = {} if quick else {document.name: document.sha256 for document in store.documents}
    except DataError as error:
        yield str(error)
        return
    found = find_files(sources, {}, arrays=store.manifest.tokenizer_kind == "integers")
    files = [file for file in found if file.name in recorded]
    if not files:
        raise DataError(
            f"{store.path} was made of none of the files in {', '.join(sources)}: give --source what --input was given"
        )
    yield from (f"{file.location} is there and is not recorded" for file in found if file.name not in recorded)
    for name in sorted(recorded.keys() - {file.name for file in files}):
        yield f"input {name!r} is recorded and is not there"
    for file in Bar(files, desc="compare sources", unit="file"):
        try:
            if recorded[file.name] not in (UNREADABLE, hash_file(file)):
                yield f"{file.location} is not what the store was made of under the name {file.name!r}"
            elif not quick:
                yield from _compare_documents(store.manifest, file, documents)
        except DataError as error:  # it cannot be read
            yield str(error)


def check_names(store: Store) -> Iterator[str]:
    """Names that several documents have, of all parts. By hashes at first, as names take much more memory."""
    try:
        hashes = np.fromiter((hash(document.name) for document in store.each_document()), np.int64)
        unique, counts = np.unique(hashes, return_counts=True)
        if suspects := set(unique[counts > 1].tolist()):
            names = (document.name for document in store.each_document())
            found = Counter(name for name in names if hash(name) in suspects)
            yield from (f"{count} documents are named {name!r}" for name, count in found.items() if count > 1)
    except DataError:  # a table is damaged, as `check_part` says
        return


def _compare_documents(manifest: Manifest, file: InputFile, documents: Mapping[str, str]) -> Iterator[str]:
    """Reads the documents of a file anew; `documents` has the sha256 (hex) of those in the store, by name."""
    policies = {problem: "replace" for problem, allowed in POLICIES.items() if "replace" in allowed}
    reading = Reading(manifest.text, manifest.tokenizer_kind, manifest.vocab_size - N_ENDS, policies)
    for part in read_parts(file, Span(0, 0, file.n_bytes), reading):
        name = file.document_name(part.record)
        digest = hashlib.sha256()
        try:
            for block in part.blocks:
                digest.update(block)
        except BadDocument:
            continue  # and so it was when the store was built, which lists what became of it
        if documents.get(name, digest.hexdigest()) != digest.hexdigest():
            yield f"document {name!r} is not what {file.location} holds"


def check_part(part: StorePart) -> list[str]:
    """Whether what a part holds fits together. The hashes of its files are `StorePart.check_files`' business."""
    try:
        if problems := part.check_layout():
            return problems
        documents = _read_documents(part)
        segments = part.segments._replace(
            row=part.segments.row - part.first_row, document=part.segments.document - part.first_document
        )
        problems = [
            *_check_problems(part),
            *_check_signatures(part, documents),
            *_check_rows(part, segments),
            *_check_cover(part, segments, documents),
        ]
        if not problems:  # what does not fit would only be decoded to nonsense
            problems = [*_check_splits(part, segments, documents), *_check_content(part, segments, documents)]
    except DataError as error:  # a table is damaged, without which nothing further can be checked
        return [str(error)]
    return problems


def _read_documents(part: StorePart) -> Documents:
    splits = {name: number for number, name in enumerate(part.manifest.splits)}
    n_documents = part.stop_document - part.first_document
    table = Documents(
        n_bytes=np.zeros(n_documents, np.int64),
        sha256=np.zeros((n_documents, 32), np.uint8),
        split=np.zeros(n_documents, np.int64),
        tokens=np.zeros(n_documents, np.int64),
    )
    number = -1
    for number, document in enumerate(part.documents()):
        if number == n_documents or document.id != part.first_document + number or document.split not in splits:
            raise DataError(f"document {document.name!r} of {part.path} is not one that its manifest counts")
        digest = np.frombuffer(bytes.fromhex(document.sha256), np.uint8)
        for column, value in zip(
            table, (document.n_bytes, digest, splits[document.split], document.tokens), strict=True
        ):
            column[number] = value
    if number + 1 != n_documents:
        raise DataError(f"{part.path} lists {number + 1} documents, and its manifest counts {n_documents}")
    return table


def _check_problems(part: StorePart) -> Iterator[str]:
    listed = Counter(f"{record.problem}/{record.action}" for record in part.problems())
    if listed != Counter(part.manifest.problems):
        yield f"{part.path} lists other problems than its manifest counts"


def _check_signatures(part: StorePart, documents: Documents) -> Iterator[str]:
    signatures = part.signatures()
    n_documents = len(documents.tokens)
    if signatures is not None and signatures.shape != (n_documents, N_PERMUTATIONS):
        yield f"{part.path} has signatures of shape {list(signatures.shape)}, and {n_documents} documents"


def _check_rows(part: StorePart, segments: Segments) -> Iterator[str]:
    """Segments tile the valid part of each row."""
    n_rows = part.manifest.n_rows
    end = segments.start + segments.length
    first = _is_first(segments.row)
    expected = np.where(first, 0, np.roll(end, 1))
    apart = np.zeros(n_rows, bool)
    apart[segments.row[(segments.start != expected) | (segments.length <= 0)]] = True
    for row in np.flatnonzero(apart):
        yield f"the segments of row {part.first_row + row} of {part.path} leave gaps or overlap"
    ends = np.zeros(n_rows, np.int64)
    last = np.roll(first, -1)
    ends[segments.row[last]] = end[last]
    wrong = (ends != part.valid_tokens) | (ends > part.manifest.seq_len) | (ends == 0)
    for row in np.flatnonzero(wrong & ~apart):
        yield f"the segments of row {part.first_row + row} of {part.path} do not cover its valid tokens"


def _check_cover(part: StorePart, segments: Segments, documents: Documents) -> Iterator[str]:
    """The stretches of each document, in the order of rows, are all of it: end to end, or windows `stride` apart."""
    n_documents = len(documents.tokens)
    if len(segments.document) and not 0 <= segments.document.min() <= segments.document.max() < n_documents:
        raise DataError(f"{part.path} has segments of documents that are not in its table")
    manifest = part.manifest
    order = np.argsort(segments.document, kind="stable")
    document, start, length = (
        column[order] for column in (segments.document, segments.document_start, segments.length)
    )
    first = _is_first(document)
    end = start + length
    last = np.roll(first, -1)
    complete = documents.tokens[document]
    if manifest.packing == "book":
        expected = np.roll(start, 1) + manifest.stride
        length_fits = length == np.minimum(manifest.seq_len, complete - start)
    else:
        expected = np.roll(end, 1)
        length_fits = length > 0
    fits = (start == np.where(first, 0, expected)) & length_fits & ((end == complete) == last)
    wrong = documents.tokens > 0
    wrong[document] = False
    wrong[document[~fits]] = True
    yield from _name_documents(part, wrong, "is not covered exactly once")


def _check_splits(part: StorePart, segments: Segments, documents: Documents) -> Iterator[str]:
    """Each split has the rows of its documents, and its record in the manifest counts what there is."""
    splits = part.manifest.splits
    split_of_row = np.full(part.manifest.n_rows, -1)
    for number, split in enumerate(splits.values()):
        for start, stop in split.rows:
            split_of_row[start:stop] = number
    strange = segments.row[split_of_row[segments.row] != documents.split[segments.document]]
    for row in np.unique(strange):
        yield f"row {part.first_row + row} of {part.path} holds documents of another split"
    joins = (np.diff(segments.row) == 0) & (np.diff(segments.document) != 0)
    mixed = np.unique(segments.row[1:][joins])
    for number, (name, split) in enumerate(splits.items()):
        members, rows = documents.split == number, split_of_row == number
        counts = {
            "documents": members.sum(),
            "n_bytes": documents.n_bytes[members].sum(),
            "tokens": documents.tokens[members].sum(),
            "placed_tokens": part.valid_tokens[rows].sum(),
            "mixed_rows": rows[mixed].sum(),
        }
        for key, count in counts.items():
            if getattr(split, key) != count:
                yield f"split {name} of {part.path} has {key} {count}, and {getattr(split, key)} in the manifest"


def _check_content(part: StorePart, segments: Segments, documents: Documents) -> Iterator[str]:
    """Every row is readable, and padded as it should be; every document decodes to its size and hash."""
    covered = np.zeros(len(documents.tokens), np.int64)
    sizes = np.zeros(len(documents.tokens), np.int64)
    hashes: dict[int, Any] = {}
    wrong = np.zeros(len(documents.tokens), bool)
    wrong[documents.tokens == 0] = (documents.sha256[documents.tokens == 0] != _EMPTY).any(axis=1)
    offsets = np.searchsorted(segments.row, np.arange(part.manifest.n_rows + 1))
    rows = enumerate(_read_rows(part))
    for row, tokens in Bar(rows, f"verify {part.path.name}", part.manifest.n_rows, unit="row"):
        table = np.stack([column[offsets[row] : offsets[row + 1]] for column in segments[1:]], axis=1)
        if isinstance(tokens, DataError):
            yield str(tokens)
            tokens = np.zeros(0, np.int64)  # the documents in it will not match their hashes
        else:
            yield from _check_marks(part, row, tokens, table, documents)
        for stretch in fresh_stretches(table, covered, documents.tokens):
            digest = hashes.pop(stretch.document, None) or hashlib.sha256()
            for text in decode_tokens(part.tokenizer, tokens[stretch.start : stretch.stop]):
                digest.update(text)
                sizes[stretch.document] += len(text)
            if stretch.last:
                wrong[stretch.document] = digest.digest() != documents.sha256[stretch.document].tobytes()
            else:
                hashes[stretch.document] = digest
    yield from _name_documents(part, wrong | (sizes != documents.n_bytes), "does not decode to its source")


def _read_rows(part: StorePart) -> Iterator[np.ndarray | DataError]:
    """All rows of a part in order, or what is wrong with one; several at a time, as each call takes a millisecond."""
    stop_row = part.first_row + part.manifest.n_rows
    at_once = max(_BATCH_TOKENS // part.manifest.seq_len, 1)
    for first in range(part.first_row, stop_row, at_once):
        rows = range(first, min(first + at_once, stop_row))
        try:
            yield from part.read_rows(rows.start, rows.stop)
        except DataError:  # of one of them
            yield from (_row_or_error(part, row) for row in rows)


def _row_or_error(part: StorePart, row: int) -> np.ndarray | DataError:
    try:
        return part.read_row(row)
    except Exhausted:
        raise
    except DataError as error:
        return error


def _check_marks(
    part: StorePart, row: int, tokens: np.ndarray, table: np.ndarray, documents: Documents
) -> Iterator[str]:
    """BOS and EOS stand where documents begin and end, and nowhere else but in the padding, which is EOS."""
    manifest = part.manifest
    start, length, document, document_start = table.T
    begins = start[document_start == 0] if manifest.bos else start[:0]
    ends = (start + length - 1)[document_start + length == documents.tokens[document]] if manifest.eos else start[:0]
    n_valid = int(length.sum())
    valid, padding = tokens[:n_valid], tokens[n_valid:]
    marks = np.flatnonzero((valid == manifest.bos_id) | (valid == manifest.eos_id))
    if (
        not np.array_equal(marks, np.union1d(begins, ends))
        or (valid[begins] != manifest.bos_id).any()
        or (valid[ends] != manifest.eos_id).any()
    ):
        yield f"row {part.first_row + row} of {part.path} does not mark where documents begin and end"
    if (padding != manifest.eos_id).any():
        yield f"row {part.first_row + row} of {part.path} is not padded with EOS"


def _is_first(group: np.ndarray) -> np.ndarray:
    """bool [n]: whether each element of a sorted array is the first of its kind."""
    return np.diff(group, prepend=-1) != 0


def _name_documents(part: StorePart, wrong: np.ndarray, what: str) -> Iterator[str]:
    if wrong.any():
        for document, is_wrong in zip(part.documents(), wrong, strict=True):
            if is_wrong:
                yield f"document {document.name!r} {what}"
