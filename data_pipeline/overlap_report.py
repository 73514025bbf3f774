"""What `overlap` prints and writes: figures of each split, and the worst documents."""

from collections.abc import Sequence
from typing import Any

from data_pipeline.output import table
from data_pipeline.overlap import DocumentOverlap
from data_pipeline.store import Store


def overlap_summary(
    store: Store, held_out: Sequence[str], train: Sequence[Store], min_tokens: int, overlaps: Sequence[DocumentOverlap]
) -> dict[str, Any]:
    """The figures as JSON has them, given what `find_overlap` returned. Shares are fractions of 1."""
    return {
        "store": str(store.path),
        "train": [str(one.path) for one in train],
        "min_tokens": min_tokens,
        "splits": {name: _figures([one for one in overlaps if one.split == name], min_tokens) for name in held_out},
        "worst": [_document(one) for one in overlaps if one.longest],
    }


def _figures(overlaps: Sequence[DocumentOverlap], min_tokens: int) -> dict[str, float]:
    tokens, overlapping = (sum(getattr(one, name) for one in overlaps) for name in ("tokens", "overlapping"))
    return {
        "documents": len(overlaps),
        "overlapping_documents": sum(one.overlapping > 0 for one in overlaps),
        "too_short_documents": sum(one.tokens < min_tokens for one in overlaps),
        "tokens": tokens,
        "overlapping_tokens": overlapping,
        "overlapping_share": overlapping / tokens if tokens else 0.0,
    }


def _document(overlap: DocumentOverlap) -> dict[str, Any]:
    assert overlap.longest
    return {
        "name": overlap.name,
        "split": overlap.split,
        "tokens": overlap.tokens,
        "overlapping_tokens": overlap.overlapping,
        "overlapping_share": overlap.share,
        "longest_run_tokens": overlap.longest.tokens,
        "train_document": overlap.longest.document,
        "train_store": overlap.longest.store,
    }


def overlap_text(figures: dict[str, Any]) -> str:
    """The same for people."""
    train, splits = figures["train"], figures["splits"]
    header = ["split", "documents", "overlapping", "tokens", "overlapping", "share"]
    lines = [
        f"{figures['store']}: tokens in runs of {figures['min_tokens']:,} or more that a training document of "
        f"{', '.join(train)} has too",
        table([header, *(_split_row(name, split) for name, split in splits.items())]),
    ]
    for name, split in splits.items():
        if split["too_short_documents"]:
            lines.append(
                f"{split['too_short_documents']:,} of the {split['documents']:,} documents of {name} are shorter than "
                f"{figures['min_tokens']:,} tokens, so they cannot overlap: a lower --min-tokens includes them"
            )
    if figures["worst"]:
        header = ["worst documents", "split", "tokens", "share", "longest run", "in training document"]
        rows = [_document_row(one, with_store=len(train) > 1) for one in figures["worst"]]
        lines += ["", table([header, *rows])]
    return "\n".join(lines)


def _split_row(name: str, split: dict[str, float]) -> list[str]:
    counts = (split[key] for key in ("documents", "overlapping_documents", "tokens", "overlapping_tokens"))
    return [name, *(f"{count:,}" for count in counts), f"{split['overlapping_share']:.2%}"]


def _document_row(one: dict[str, Any], with_store: bool) -> list[str]:
    return [
        one["name"],
        one["split"],
        f"{one['tokens']:,}",
        f"{one['overlapping_share']:.2%}",
        f"{one['longest_run_tokens']:,}",
        one["train_document"] + (f" of {one['train_store']}" if with_store else ""),
    ]
