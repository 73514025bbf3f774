"""A model by itself, scored on rows of a store, with one attention or another in its LSH layers.

Sums are kept by document: tokens of one document are correlated, so the effective sample size is the number of
documents, not of rows or tokens. Two scores of the same rows are compared document by document: their difference is
known far better than either of them, since what the documents contain cancels out.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.store import Store
from data_pipeline.tokenizer_folder import read_record
from reformer import ConfigError, Reformer, ReformerConfig
from reformer.diagnostics import ablated
from reformer.weights import assemble
from trainer.batches import repeated_tokens, without_repeated
from trainer.exported import tokenizer_notes
from trainer.scoring import Score, masked_sums, positions, range_ends, range_masks, range_name
from trainer.token_losses import TokenLosses

Attention = int | Literal["dense", "none"] | None
"""Of LSH layers: so many rounds, all tokens (what LSH attention approximates), nothing; None: as in training."""


@dataclass(frozen=True)
class Scores:
    """How well some rows are predicted."""

    by_document: dict[int, Score]
    """By the document's number in the store, of what is in these rows."""
    by_position: dict[str, Score]
    """Of the tokens in each range of positions that has any: see scoring.range_name; without bytes."""
    seconds_a_row: float
    """The median."""

    @property
    def all(self) -> Score:
        """Of all tokens to predict."""
        return total(self.by_document.values())


def check(model: Reformer, store: Store, folder: Path) -> list[str]:
    """What is to be said of a model, read from a folder, and a store. Raises ConfigError where they do not fit."""
    config = model.config
    if not config.causal:
        raise ConfigError(f"the model in {folder} sees the tokens that it would have to predict (causal=False)")
    if config.vocab_size != store.vocab_size:
        raise ConfigError(
            f"the model in {folder} has {config.vocab_size} tokens, and the tokenizer of {store.path} "
            f"{store.vocab_size}: give a store that was built with the model's tokenizer"
        )
    if config.max_seq_len < store.seq_len:
        raise ConfigError(
            f"the model in {folder} takes {config.max_seq_len} tokens at most, and the rows of {store.path} have "
            f"{store.seq_len}: build a store with --seq-len {config.max_seq_len}"
        )
    manifest = store.manifest
    notes = tokenizer_notes(folder, str(folder), store.path, manifest.tokenizer_sha256)
    marks = {"bos": manifest.bos, "eos": manifest.eos}
    trained = {name: value for name, value in read_record(folder).items() if name in marks}
    if other := [name.upper() for name, value in trained.items() if value != marks[name]]:
        notes.append(
            f"documents of {store.path} differ from those of the training in whether they have {' and '.join(other)}: "
            "the model is scored on what it has not learnt"
        )
    if repeated_tokens(store):
        notes.append(
            f"rows of {store.path} overlap (--stride {manifest.stride}): of each, the tokens count that no row before "
            "it has"
        )
    return notes


@contextmanager
def attending(model: Reformer, attention: Attention) -> Iterator[Callable[..., Tensor]]:
    """The forward pass of a model in evaluation mode, with this attention in its LSH layers while the statement lasts.

    Hash rotations are those of step 0, as in evaluations during training.
    """
    if attention == "dense":
        pattern = tuple("dense" if kind == "lsh" else kind for kind in model.config.attn_pattern)
        config = ReformerConfig(**{**model.config.model_dump(), "attn_pattern": pattern})
        yield assemble(config, model.state_dict()).eval()
    elif attention == "none":
        with ablated(model):
            yield model
    else:
        yield partial(model, n_hashes=attention)


@torch.no_grad()
def score_rows(
    forward: Callable[..., Tensor],
    rows: RowDataset,
    numbers: Iterable[int],
    device: torch.device,
    of_tokens: TokenLosses | None = None,
) -> Scores:
    """Score rows of a split, by their numbers, with a forward pass that `attending` gives.

    Of a row the tokens count that no row before it has. Raises DataError where a row is damaged.

    of_tokens: where to put the loss of each token, too.
    """
    ends = range_ends(rows.store.seq_len)
    token_bytes = torch.from_numpy(rows.store.token_bytes.astype("int64"))
    of_documents: dict[int, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    of_ranges, seconds = torch.zeros(len(ends), 2, dtype=torch.float64), []
    for number in numbers:
        start, segments = time.perf_counter(), rows.segments_of(number).tolist()
        sample = without_repeated(rows, number)
        tokens, labels, segment_ids = (x[None].to(device) for x in sample)
        losses = forward(tokens, labels, segment_ids=segment_ids, per_token=True)
        masks = range_masks(positions(segment_ids), ends)
        of_ranges += torch.stack([masked_sums(losses, labels, mask) for mask in masks]).cpu()
        is_counted = sample.labels != IGNORED_LABEL
        n_bytes = token_bytes[sample.labels.where(is_counted, 0)] * is_counted
        of_tokens_T3 = torch.stack([losses[0].double().cpu(), is_counted.double(), n_bytes.double()], dim=1)
        if of_tokens is not None:
            of_tokens.add(losses[0], sample.labels, segments)
        sums_S3 = torch.zeros(1 + len(segments), 3, dtype=torch.float64)  # segment 0 is padding
        sums_S3.index_add_(0, sample.segment_ids.long(), of_tokens_T3)
        for (_, _, document, _), sums in zip(segments, sums_S3[1:], strict=True):
            of_documents[document] += sums
        seconds.append(time.perf_counter() - start)
    names = [range_name(end, rows.store.seq_len).lstrip("0") for end in ends]
    return Scores(
        {document: Score(*sums.tolist()) for document, sums in of_documents.items() if sums[1]},
        {name: Score(nll, n, n_bytes=0) for name, (nll, n) in zip(names, of_ranges.tolist(), strict=True) if n},
        median(seconds),
    )


def total(scores: Iterable[Score]) -> Score:
    """Of all tokens that any of these is of."""
    sums = [(one.nll, one.n_tokens, one.n_bytes) for one in scores]
    return Score(*map(sum, zip(*sums, strict=True))) if sums else Score(0, 0, 0)


def report(scores: Scores, first: Scores, documents: Mapping[int, str]) -> dict[str, Any]:
    """What is said of scores, beside others of the same rows; None for what is not finite. documents: names."""
    score, ours, theirs = scores.all, list(scores.by_document.values()), list(first.by_document.values())
    differences = [
        Score(own.nll - other.nll, own.n_tokens, own.n_bytes) for own, other in zip(ours, theirs, strict=True)
    ]
    values = {
        "nats_per_token": score.loss,
        "standard_error": standard_error(ours),
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "perplexity": score.perplexity,
        "more_than_first": score.loss - first.all.loss,
        "more_standard_error": standard_error(differences),
        "seconds_a_row": scores.seconds_a_row,
    }
    return {name: finite(value) for name, value in values.items()} | {
        "by_position": {name: finite(one.loss) for name, one in scores.by_position.items()},
        "by_document": [
            {
                "document": number,
                "name": documents.get(number),
                "nats": finite(one.nll),
                "tokens": int(one.n_tokens),
                "bytes": int(one.n_bytes),
            }
            for number, one in scores.by_document.items()
        ],
    }


def finite(value: float) -> float | None:
    """The value; None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def standard_error(scores: Sequence[Score]) -> float:
    """Of the mean loss of all tokens, where documents, whose scores these are, are drawn at random; NaN for one alone.

    The loss is a ratio of sums over documents, so by linearisation (Cochran, Sampling Techniques, 3rd ed., equation
    6.9, without the correction for a finite population).
    """
    n, of_all = len(scores), total(scores)
    if n < 2:
        return math.nan
    squares = sum((one.nll - of_all.loss * one.n_tokens) ** 2 for one in scores)
    return math.sqrt(squares * n / (n - 1)) / of_all.n_tokens
