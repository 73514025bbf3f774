"""What a store holds, in figures: the summary of a build, and `inspect`, for people and as JSON."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from heapq import nsmallest
from typing import Any

import numpy as np

from data_pipeline.manifest import DocumentRecord, FileRecord, SplitRecord
from data_pipeline.output import table
from data_pipeline.store import Store

_BAR_WIDTH = 40
_LONGEST_SHOWN = 5


def summary(store: Store) -> dict[str, Any]:
    """The figures of a store as JSON has them. Shares are fractions of 1; a share of nothing is 0."""
    manifest = store.manifest
    splits = manifest.splits
    lengths, longest, also_in_train = _read_documents(store)
    stored = sum(_token_file_bytes(part.manifest.files) for part in store.parts)
    tokens = sum(split.tokens for split in splits.values())
    return {
        "store": str(store.path),
        "parts": len(store.parts),
        "seq_len": store.seq_len,
        "packing": manifest.packing,
        "stride": manifest.stride,
        "tokenizer": manifest.tokenizer_kind,
        "vocab_size": store.vocab_size,
        **_figures(list(splits.values()), store.seq_len),
        "stored_bytes_per_token": _share(stored, tokens),
        "splits": {name: _figures([split], store.seq_len) for name, split in splits.items()},
        "also_in_train": also_in_train,
        "problems": manifest.problems,
        "length_histogram": length_histogram(lengths),
        "longest": [{"name": one.name, "split": one.split, "tokens": one.tokens} for one in longest],
    }


def _read_documents(store: Store) -> tuple[np.ndarray, list[DocumentRecord], dict[str, int]]:
    """Of one reading of a long table: the length of each document in tokens; the longest documents; and how many of
    each held-out split are in train too, byte for byte. Empty ones do not count as that.
    """
    lengths = array("q")
    # Of each hash 64 bits: among a million documents, two different ones share them in one of ten million stores.
    contents = {name: array("Q") for name in ("train", *store.manifest.splits)}

    def documents() -> Iterator[DocumentRecord]:
        for document in store.each_document():
            lengths.append(document.tokens)
            if document.n_bytes:
                contents[document.split].append(int(document.sha256[:16], 16))
            yield document

    longest = nsmallest(_LONGEST_SHOWN, documents(), key=lambda document: (-document.tokens, document.name))
    train = np.unique(np.array(contents.pop("train"), np.uint64))
    also_in_train = {  # kind: by itself, numpy 2.0 may choose one that fails where numbers are beyond int64
        name: int(np.isin(np.array(hashes, np.uint64), train, kind="sort").sum()) for name, hashes in contents.items()
    }
    return np.array(lengths, np.int64), longest, also_in_train


def _token_file_bytes(files: Mapping[str, FileRecord]) -> int:
    return sum(record.n_bytes for name, record in files.items() if name.startswith("tokens/"))


def _figures(splits: Sequence[SplitRecord], seq_len: int) -> dict[str, float]:
    """Of one split, or of several as one."""
    rows = sum(stop - start for split in splits for start, stop in split.rows)
    documents, n_bytes, tokens, placed, mixed, fallback = (
        sum(getattr(split, name) for split in splits)
        for name in ("documents", "n_bytes", "tokens", "placed_tokens", "mixed_rows", "byte_fallback_tokens")
    )
    return {
        "documents": documents,
        "bytes": n_bytes,
        "tokens": tokens,
        "bytes_per_token": _share(n_bytes, tokens),
        "byte_fallback_share": _share(fallback, tokens),
        "rows": rows,
        "padding_share": _share(rows * seq_len - placed, rows * seq_len),
        "mixed_rows": mixed,
        "mixed_rows_share": _share(mixed, rows),
    }


def length_histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """How many of `lengths` int64 [n] lie between one power of two and the next: {"from", "to", "documents"}.

    From the shortest to the longest, without a gap. Documents of no tokens are counted by themselves.
    """
    counts = np.bincount(np.frexp(lengths.astype(float))[1])  # 0 for 0, else 1 + the exponent of the power below
    used = np.flatnonzero(counts)
    return [
        {"from": 1 << bit >> 1, "to": (1 << bit) - 1, "documents": int(counts[bit])}
        for bit in (range(used[0], used[-1] + 1) if len(used) else ())
    ]


def inspect(store: Store) -> str:
    """The figures of a store as a table, a histogram of the documents' lengths, and the longest documents."""
    figures = summary(store)
    return "\n".join(
        [
            _summarize(figures),
            "",
            "documents by length in tokens:",
            *_bars(figures["length_histogram"]),
            "",
            "longest documents:",
            *(f"  {one['tokens']:>14,} tokens  {one['split']:<6} {one['name']}" for one in figures["longest"]),
        ]
    )


def _summarize(figures: dict[str, Any]) -> str:
    is_text = figures["tokenizer"] == "sentencepiece"  # the ids of the others are bytes or values already
    header = ["split", "documents", "bytes", "tokens", *["bytes/token"] * is_text, "rows", "padding", "mixed rows"]
    of_text = f"{figures['bytes_per_token']:.3f} bytes per token, {figures['byte_fallback_share']:.3%} byte fallback, "
    packing = figures["packing"] + (f" with stride {figures['stride']:,}" if figures["packing"] == "book" else "")
    parts = f", in {figures['parts']} parts" if figures["parts"] > 1 else ""
    lines = [
        f"{figures['store']}: {figures['rows']:,} rows of {figures['seq_len']:,} tokens, packing {packing}, "
        f"{figures['tokenizer']} tokenizer of {figures['vocab_size']:,}{parts}",
        table([header, *(_split_row(name, split, is_text) for name, split in figures["splits"].items())]),
        f"all: {figures['bytes']:,} bytes, {figures['tokens']:,} tokens, {of_text if is_text else ''}"
        f"{figures['padding_share']:.2%} padding, "
        f"{figures['mixed_rows_share']:.2%} of rows with more than one document, "
        f"{figures['stored_bytes_per_token']:.3f} stored bytes per token",
    ]
    for name, count in figures["also_in_train"].items():
        if count:
            documents = figures["splits"][name]["documents"]
            lines.append(
                f"{count:,} of the {documents:,} documents of {name} are in train too, byte for byte: a new store "
                "built with --duplicates drop leaves out the copies in train"
            )
    if figures["problems"]:
        counts = (f"{count:,} {name.replace('/', ' ')}" for name, count in figures["problems"].items())
        lines.append(f"problems: {', '.join(counts)}: problems.jsonl lists them")
    return "\n".join(lines)


def _bars(histogram: Sequence[dict[str, int]]) -> list[str]:
    most = max((entry["documents"] for entry in histogram), default=1)
    return [
        f"  {entry['from']:>12,} to {entry['to']:>12,} {entry['documents']:>10,} "
        f"{'#' * round(_BAR_WIDTH * entry['documents'] / most)}".rstrip()
        for entry in histogram
    ]


def _split_row(name: str, split: dict[str, float], is_text: bool) -> list[str]:
    return [
        name,
        f"{split['documents']:,}",
        f"{split['bytes']:,}",
        f"{split['tokens']:,}",
        *[f"{split['bytes_per_token']:.3f}"] * is_text,
        f"{split['rows']:,}",
        f"{split['padding_share']:.2%}",
        f"{split['mixed_rows']:,}",
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
