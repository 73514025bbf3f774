"""What the user should know of a plan that is made: splits, padding, items and text that are hardly what was meant."""

from collections.abc import Sequence

import numpy as np

from data_pipeline.files import InputFile
from data_pipeline.planning import Documents, Plan, PlanSettings

_FEW_TOKENS = 32
"""In so many nothing can be learned that is worth a document."""
_FAR_OFF = 4
"""A split is noted whose share of the tokens is so many times more or less than its share of the documents."""
_MUCH_PADDING, _ROWS_ENOUGH = 0.5, 16
"""Above this share padding is noted, from so many rows on: of fewer, the last one of each split is much of it."""
_MUCH_FALLBACK = 0.1
"""Above this share tokens that are single bytes are noted."""
_MANY_REMNANTS = 0.01
"""Above this share rows with next to nothing to predict are noted: a few books happen to end just after a row."""


def notes_on_plan(documents: Documents, plan: Plan, settings: PlanSettings, arrays: Sequence[InputFile]) -> list[str]:
    """All of them, a line each. arrays: the files, where their documents are integers."""
    return [
        *_notes_on_fallback(documents, plan, settings.appends),
        *([] if settings.appends else _notes_on_rows(documents, plan, settings)),
        *(_notes_on_items(documents, plan.kept, arrays) if arrays else []),
    ]


def _notes_on_items(documents: Documents, kept: np.ndarray, files: Sequence[InputFile]) -> list[str]:
    """What the user should know of arrays whose items, each a document, are hardly what was meant."""
    kept = kept[documents.record[kept] >= 0]
    n_tokens = documents.n_tokens[kept]
    numbers, file, n_items = np.unique(documents.file[kept], return_inverse=True, return_counts=True)
    is_cut = (n_items > 1) & np.array([files[number].name.lower().endswith(".npy") for number in numbers], bool)
    if is_cut.sum() > 1:
        is_uniform = len(np.unique(n_items[is_cut])) == len(np.unique(n_tokens[is_cut[file]])) == 1
        return [
            f"{is_cut.sum():,} .npy files came to {n_items[is_cut].sum():,} documents, one for each item of the first "
            f"dimension{', and all have one shape, as files of one document each do' if is_uniform else ''}: if a file "
            "is one document, stack all into one array, or save numpy.expand_dims(array, 0)"
        ]
    if len(kept) < 2 or (typical := int(np.median(n_tokens))) > _FEW_TOKENS:
        return []
    return [
        f"{len(kept):,} documents out of arrays have {typical} tokens (the median). An array of more than one "
        "dimension is a document for each item of the first: if such an array is one piece, save it flat, or with a "
        "leading dimension of 1"
    ]


def _notes_on_fallback(documents: Documents, plan: Plan, appends: bool) -> list[str]:
    """What the user should know of text for which the tokenizer has no pieces."""
    n_fallback, n_tokens = (
        np.bincount(plan.split, column[plan.kept], len(plan.split_names))
        for column in (documents.n_byte_fallback, documents.n_tokens)
    )
    shares = zip(plan.split_names, n_fallback / np.maximum(n_tokens, 1), strict=True)
    of = "added to" if appends else "of"
    much = [f"{share:.0%} of the tokens {of} {name}" for name, share in shares if share > _MUCH_FALLBACK]
    if not much:
        return []
    return [
        f"{' and '.join(much)} are single bytes, of characters that the tokenizer has no piece for (byte fallback). "
        "Likely causes: another Unicode normalisation than it was trained on (see --normalize nfc), another language, "
        "a vocabulary too small for its characters, or a wrong --encoding"
    ]


def _notes_on_rows(documents: Documents, plan: Plan, settings: PlanSettings) -> list[str]:
    """What the user should know of held-out splits, by tokens, and of padding."""
    weights = documents.n_tokens[plan.kept]
    tokens = dict(zip(plan.split_names, np.bincount(plan.split, weights, len(plan.split_names)), strict=True))
    total = sum(tokens[name] for name in ("train", *settings.split))  # without those of files that are named
    shares = {name: tokens[name] / max(total, 1) for name in settings.split}
    held = dict(zip(plan.split_names, np.bincount(plan.split, minlength=len(plan.split_names)), strict=True))
    n_documents = sum(held[name] for name in ("train", *settings.split))

    def is_far_off(share: float, asked: float) -> bool:
        return not asked / _FAR_OFF <= share <= asked * _FAR_OFF

    def cause(name: str, asked: float) -> str:
        few = is_far_off(held[name] / max(n_documents, 1), asked)
        return f"being {held[name]:,} of {n_documents:,}" if few else "since documents differ in length"

    notes = [
        f"{name}={asked:g} of the documents are {shares[name]:.2g} of the tokens, {cause(name, asked)}: to choose, "
        "name files with --val-input or --test-input"
        for name, asked in settings.split.items()
        if is_far_off(shares[name], asked)
    ]
    if remnants := _notes_on_remnants(weights, plan, settings):
        return notes + remnants  # instead of advice for shorter rows
    n_places = plan.n_rows * settings.seq_len
    if plan.n_rows >= _ROWS_ENOUGH and (padding := 1 - plan.segments.length.sum() / n_places) > _MUCH_PADDING:
        notes.append(
            f"{padding:.0%} of the rows is padding, which takes as long to train on as tokens: choose a smaller "
            "--seq-len, or --packing bestfit"
        )
    return notes


def _notes_on_remnants(lengths: np.ndarray, plan: Plan, settings: PlanSettings) -> list[str]:
    """What the user should know of rows that hold the last token or two of documents a little longer than a row.

    lengths: of the documents in tokens. The first token of a stretch is predicted by nothing. In packing "stream" what
    a row holds does not follow from the length of one document.
    """
    if settings.packing == "stream":
        return []
    segments, seq_len = plan.segments, settings.seq_len
    n_labels = np.bincount(segments.row, segments.length - 1, plan.n_rows)
    is_remnant = (n_labels[segments.row] <= 1) & (segments.document_start > 0)
    n_rows = len(np.unique(segments.row[is_remnant]))
    if n_rows < _MANY_REMNANTS * plan.n_rows or not n_rows or settings.stride < seq_len:
        return []
    kinds, counts = np.unique(lengths[segments.document[is_remnant]], return_counts=True)
    typical = int(kinds[counts.argmax()])
    longer = -(-typical // (typical // seq_len))  # in which it takes a row less
    left_over = typical % seq_len
    marks = [name for name, there in (("EOS", settings.eos), ("BOS", settings.bos)) if there]
    included = f", {' and '.join(sorted(marks))} included" if marks else ""
    fewer = " ".join(f"--no-{name.lower()}" for name in marks[:left_over])
    or_fewer = f", or {fewer}" if left_over <= len(marks) else ""
    return [
        f"{n_rows:,} of {plan.n_rows:,} rows have one token to predict, or none: what rows of {seq_len:,} tokens leave "
        f"over of documents of {typical:,}{included}. Choose --seq-len {longer} or more{or_fewer}"
    ]
