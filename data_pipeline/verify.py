"""Is every byte of a store still what was built, and does it all fit together?

Every problem is reported, not only the first. The full check trusts nothing: hashes of all files, Zarr's own
metadata against the manifest, and every document decoded and compared with the hash of its source.
"""

import hashlib
from pathlib import Path

import numpy as np
import zarr

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.packing import Segments
from data_pipeline.store import Store, chunk_tokens
from data_pipeline.tokenizer import token_dtype


def verify(path: Path, quick: bool = False) -> list[str]:
    """The problems of a store, a line each; none when it is sound.

    Quick: the manifest is whole, every file is there and has its size. Raises DataError when there is no store.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: build a store with python -m data_pipeline build")
    try:
        store = Store(path, Manifest.read(path))
    except DataError as error:
        return [str(error)]
    problems = store.check_files(full=not quick)
    if quick:
        return problems
    problems += [f"{path / name} is no part of the store" for name in store.unknown_files()]
    try:
        problems += check_layout(store)
        problems += check_segments(store)
        problems += check_content(store)
    except DataError as error:  # a table is damaged, without which nothing further can be checked
        problems.append(str(error))
    return problems


def check_layout(store: Store) -> list[str]:
    """Zarr's metadata of the tokens against the manifest."""
    manifest = store.manifest
    dtype = token_dtype(manifest.vocab_size)
    try:
        tokens = zarr.open_array(store.path / "tokens", mode="r")
    except Exception as error:  # Zarr raises whatever its JSON reader met
        raise DataError(f"{store.path / 'tokens'} cannot be opened: {error}") from error
    facts = {
        "shape": (tokens.shape, (manifest.n_rows, manifest.seq_len)),
        "dtype": (tokens.dtype, dtype),
        "chunks": (tokens.chunks, (1, chunk_tokens(manifest.seq_len))),
        "shards": (tokens.shards, (min(manifest.rows_per_shard, manifest.n_rows), manifest.seq_len)),
        "fill value": (int(tokens.fill_value), int(np.iinfo(dtype).max)),
    }
    return [
        f"{store.path / 'tokens'} has {name} {found} instead of {expected}"
        for name, (found, expected) in facts.items()
        if found != expected
    ]


def check_segments(store: Store) -> list[str]:
    """Segments tile the valid part of each row, and cover each document exactly once."""
    segments, documents = store.segments, store.documents
    if not np.isin(segments.document, [document.id for document in documents]).all():
        raise DataError(f"{store.path} has segments of documents that are not in its table")
    ends = np.zeros(store.n_rows, np.int64)
    problems = []
    for row, end in zip(*_tile(segments.row, segments.start, segments.length), strict=True):
        if end < 0:
            problems.append(f"the segments of row {row} leave gaps or overlap")
        else:
            ends[row] = end
    wrong = np.flatnonzero((ends != store.valid_tokens) | (ends > store.seq_len) | (ends == 0))
    problems += [f"the segments of row {row} do not cover its valid tokens" for row in wrong]

    by_document = Segments(*(column[np.lexsort((segments.document_start, segments.document))] for column in segments))
    covered = np.zeros(len(documents), np.int64)
    tiles = _tile(by_document.document, by_document.document_start, by_document.length)
    for number, end in zip(*tiles, strict=True):
        covered[number] = end
    return problems + [
        f"document {document.name!r} is not covered exactly once"
        for document, tokens in zip(documents, covered, strict=True)
        if tokens != document.tokens
    ]


def _tile(group: np.ndarray, start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For stretches sorted by (group, start): each group, and where it ends, or -1 if it is not tiled from 0 on."""
    first = np.flatnonzero(np.diff(group, prepend=-1))
    expected = np.concatenate(([0], (start + length)[:-1]))
    expected[first] = 0
    broken = np.logical_or.reduceat((start != expected) | (length <= 0), first)
    last = np.append(first[1:], len(group)) - 1
    return group[first], np.where(broken, -1, (start + length)[last])


def check_content(store: Store) -> list[str]:
    """Every row is readable and padded as it should be; every document decodes to its size and hash."""
    problems = []
    hashes = [hashlib.sha256() for _ in store.documents]
    sizes = [0] * len(hashes)
    for row in range(store.n_rows):
        try:
            tokens = store.read_row(row)
        except DataError as error:
            problems.append(str(error))
            continue
        if (tokens[store.valid_tokens[row] :] != store.manifest.eos_id).any():
            problems.append(f"row {row} of {store.path} is not padded with EOS")
        for start, length, number, _ in store.segments_of(row).tolist():
            text = store.tokenizer.decode(tokens[start : start + length])
            hashes[number].update(text)
            sizes[number] += len(text)
    for document, size, digest in zip(store.documents, sizes, hashes, strict=True):
        if (size, digest.hexdigest()) != (document.n_bytes, document.sha256):
            problems.append(f"document {document.name!r} does not decode to its source")
    return problems
