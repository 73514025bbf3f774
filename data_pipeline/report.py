"""What a store holds, in figures for people: the summary of a build, and `inspect`."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.manifest import SplitRecord
from data_pipeline.store import Store

_BAR_WIDTH = 40
_LONGEST_SHOWN = 5


def summarize(store: Store) -> str:
    """The figures of a store: a line per split, then what holds for all of it."""
    manifest = store.manifest
    splits = manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    n_bytes = sum(split.n_bytes for split in splits.values())
    fallback = sum(split.byte_fallback_tokens for split in splits.values())
    stored = sum(record.n_bytes for name, record in manifest.files.items() if name.startswith("tokens/"))
    header = ("split", "documents", "bytes", "tokens", "bytes/token", "rows", "padding")
    lines = [
        f"{store.path}: {store.n_rows} rows of {store.seq_len:,} tokens, packing {manifest.packing}, "
        f"{manifest.tokenizer_kind} tokenizer of {store.vocab_size:,}",
        _table([header, *(_split_row(name, split, store.seq_len) for name, split in splits.items())]),
        f"all: {n_bytes:,} bytes, {tokens:,} tokens, {n_bytes / tokens:.3f} bytes per token, "
        f"{fallback / tokens:.3%} byte fallback, {1 - tokens / (store.n_rows * store.seq_len):.2%} padding, "
        f"{stored / tokens:.3f} stored bytes per token",
    ]
    return "\n".join(lines)


def inspect(store: Store) -> str:
    """`summarize`, a histogram of the documents' lengths, and the longest documents."""
    lengths = np.array([document.tokens for document in store.documents])
    longest = sorted(store.documents, key=lambda document: (-document.tokens, document.name))[:_LONGEST_SHOWN]
    return "\n".join(
        [
            summarize(store),
            "",
            "documents by length in tokens:",
            *length_histogram(lengths),
            "",
            "longest documents:",
            *(f"  {document.tokens:>14,} tokens  {document.split:<6} {document.name}" for document in longest),
        ]
    )


def length_histogram(lengths: np.ndarray) -> list[str]:
    """A line per power of two between the shortest and the longest of `lengths` [n]."""
    exponents = np.floor(np.log2(lengths)).astype(int)
    counts = np.bincount(exponents)
    lines = []
    for exponent in range(exponents.min(), exponents.max() + 1):
        bar = "#" * round(_BAR_WIDTH * counts[exponent] / counts.max())
        lines.append(f"  {2**exponent:>12,} to {2 ** (exponent + 1) - 1:>12,} {counts[exponent]:>8,} {bar}".rstrip())
    return lines


def _split_row(name: str, split: SplitRecord, seq_len: int) -> tuple[str, ...]:
    rows = sum(stop - start for start, stop in split.rows)
    return (
        name,
        f"{split.documents:,}",
        f"{split.n_bytes:,}",
        f"{split.tokens:,}",
        f"{split.n_bytes / split.tokens:.3f}",
        f"{rows:,}",
        f"{1 - split.tokens / (rows * seq_len):.2%}",
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
