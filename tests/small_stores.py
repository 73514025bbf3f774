"""Stores of a few documents, written without a build: tokens, rows, tables and manifest by the plainest code."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline import layout
from data_pipeline.cli import main as data_pipeline
from data_pipeline.manifest import (
    MANIFEST_NAME,
    DocumentRecord,
    InputRecord,
    Manifest,
    ProblemRecord,
    SplitRecord,
    StoreSettings,
    hash_input,
)
from data_pipeline.packing import Segments, pack
from data_pipeline.tokenizer import ByteTokenizer, Tokenizer, token_dtype

SPLITS = ("train", "val")
TRAIN, HELD_OUT = b"abracadabra" * 7, b"cabbage"
"""What `cabbage_store` is built of."""


def store_settings(tokenizer: Tokenizer, **changes: object) -> StoreSettings:
    """Settings of rows of 16 tokens, 4 to a shard."""
    values = {
        "format_version": 2,
        "seq_len": 16,
        "packing": "bestfit",
        "stride": changes.get("seq_len", 16),
        "bos": True,
        "eos": True,
        "split": {},
        "rows_per_shard": 4,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "text": {},
        "duplicates": "keep",
        "near_threshold": 0.8,
        "block_bytes": 1 << 20,
        "piece_chars": 1 << 16,
    }
    return StoreSettings.model_validate({**values, **changes})


def write_store(
    path: Path,
    contents: Mapping[str, bytes],
    tokenizer: Tokenizer | None = None,
    val: Sequence[str] = (),
    problems: Sequence[ProblemRecord] = (),
    **changes: object,
) -> Manifest:
    """Writes a store of documents by name, those in `val` held out, with `changes` to `store_settings`."""
    tokenizer = tokenizer or ByteTokenizer()
    settings = store_settings(tokenizer, **changes)
    texts = [_tokens(content, tokenizer, settings) for content in contents.values()]
    lengths = np.array([len(text) for text in texts], np.int64)
    split_of = np.array([name in val for name in contents], np.int64)
    segments, split_rows = _pack(lengths, split_of, settings)
    n_rows = max((stop for _, stop in split_rows.values()), default=0)
    rows = np.full((n_rows, settings.seq_len), settings.eos_id, token_dtype(settings.vocab_size))
    for row, start, length, document, document_start in zip(*segments, strict=True):
        rows[row, start : start + length] = texts[document][document_start : document_start + length]

    layout.create_tokens(path, settings, n_rows)
    for first_row in range(0, n_rows, settings.rows_per_shard):
        layout.write_shard(path, first_row, rows[first_row : first_row + settings.rows_per_shard])
    digests = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    documents = [
        DocumentRecord(number, name, len(content), digest, SPLITS[split], int(length))
        for number, ((name, content), digest, split, length) in enumerate(
            zip(contents.items(), digests, split_of, lengths, strict=True)
        )
    ]
    inputs = [InputRecord(document.name, document.n_bytes, document.sha256) for document in documents]
    layout.write_sidecars(path, segments, n_rows, tokenizer, documents, inputs, problems)
    counts = [f"{problem.problem}/{problem.action}" for problem in problems]
    manifest = Manifest(
        **settings.model_dump(),
        input_sha256=hash_input([(*record, False) for record in inputs]),
        splits={name: _split_record(name, rows, documents, segments) for name, rows in split_rows.items()},
        problems={name: counts.count(name) for name in counts},
        files={name: layout.record_file(path / name) for name in layout.list_files(path) if name != MANIFEST_NAME},
        parts={},
        library_versions={},
    )
    layout.write_manifest(path, manifest)
    return manifest


def _tokens(content: bytes, tokenizer: Tokenizer, settings: StoreSettings) -> np.ndarray:
    marks = np.array([tokenizer.bos_id, tokenizer.eos_id], token_dtype(settings.vocab_size))
    return np.concatenate([marks[: int(settings.bos)], tokenizer.encode(content), marks[2 - int(settings.eos) :]])


def _pack(
    lengths: np.ndarray, split_of: np.ndarray, settings: StoreSettings
) -> tuple[Segments, dict[str, tuple[int, int]]]:
    parts, split_rows, first_row = [], {}, 0
    for number in np.unique(split_of):
        members = np.flatnonzero(split_of == number)
        part = pack(lengths[members], settings.seq_len, settings.packing, settings.stride)
        stop_row = first_row + (int(part.row[-1]) + 1 if len(part.row) else 0)
        parts.append(part._replace(row=part.row + first_row, document=members[part.document]))
        split_rows[SPLITS[number]] = (first_row, stop_row)
        first_row = stop_row
    return Segments(*map(np.concatenate, zip(*parts, strict=True))), split_rows


def _split_record(
    name: str, rows: tuple[int, int], documents: Sequence[DocumentRecord], segments: Segments
) -> SplitRecord:
    members = [document for document in documents if document.split == name]
    inside = (segments.row >= rows[0]) & (segments.row < rows[1])
    together = [set(segments.document[segments.row == row].tolist()) for row in range(*rows)]
    return SplitRecord(
        rows=(rows,),
        documents=len(members),
        n_bytes=sum(document.n_bytes for document in members),
        tokens=sum(document.tokens for document in members),
        placed_tokens=int(segments.length[inside].sum()),
        mixed_rows=sum(len(each) > 1 for each in together),
        byte_fallback_tokens=0,
    )


def cabbage_store(folder: Path) -> Path:
    """A store that is built, of a document to train on and one held out."""
    for name, text in (("train", TRAIN), ("val", HELD_OUT)):
        (folder / name).mkdir()
        (folder / name / f"{name}.txt").write_bytes(text)
    inputs = ["--input", str(folder / "train"), "--val-input", str(folder / "val")]
    settings = ["--tokenizer", "bytes", "--seq-len", "100", "--workers", "1"]
    assert data_pipeline(["build", *inputs, *settings, "--output", str(folder / "store")]) == 0
    return folder / "store"
