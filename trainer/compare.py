"""A model by itself, scored on rows of a store, with one attention or another in its LSH layers.

Each row is scored alone, so that two scores of the same rows can be compared row by row: their difference is known far
better than either of them, which differ by what is in the rows.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from data_pipeline.dataset import Sample
from reformer import Reformer, ReformerConfig
from reformer.diagnostics import ablated
from reformer.weights import assemble
from trainer.scoring import Score, masked_sums, positions, range_ends, range_masks

Attention = int | Literal["dense", "none"] | None
"""Of LSH layers: so many rounds, all tokens (what LSH attention approximates), nothing; None: as in training."""


@dataclass(frozen=True)
class RowScore:
    """How well the tokens of a row are predicted."""

    by_position: tuple[Score, ...]
    """Of the tokens in each range of positions: see scoring.range_ends; without bytes."""
    n_bytes: int
    seconds: float

    @property
    def all(self) -> Score:
        """Of all tokens to predict."""
        nll, n_tokens = (sum(getattr(score, name) for score in self.by_position) for name in ("nll", "n_tokens"))
        return Score(nll, n_tokens, self.n_bytes)


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
    forward: Callable[..., Tensor], rows: Iterable[Sample], token_bytes: Tensor, device: torch.device
) -> Iterator[RowScore]:
    """The score of each row, by a forward pass that `attending` gives; token_bytes: int64 [V], bytes of each token."""
    for row in rows:
        start = time.perf_counter()
        tokens, labels, segment_ids = (x[None].to(device) for x in row)
        losses = forward(tokens, labels, segment_ids=segment_ids, per_token=True)
        masks = range_masks(positions(segment_ids), range_ends(tokens.shape[1]))
        sums = [masked_sums(losses, labels, mask).tolist() for mask in masks]
        by_position = tuple(Score(nll, n_tokens, n_bytes=0) for nll, n_tokens in sums)
        n_bytes = int(token_bytes[row.labels[row.labels >= 0]].sum())
        yield RowScore(by_position, n_bytes, time.perf_counter() - start)


def total(scores: Iterable[Score]) -> Score:
    """Of all tokens that any of these is of."""
    nll, n_tokens, n_bytes = map(sum, zip(*((one.nll, one.n_tokens, one.n_bytes) for one in scores), strict=True))
    return Score(nll, n_tokens, n_bytes)


def standard_error(nll_N: Tensor, n_tokens_N: Tensor) -> float:
    """Of nll.sum() / n_tokens.sum(), a ratio of sums over rows that are drawn at random; NaN for a single row.

    nll_N, n_tokens_N: float64 [N]. By linearisation (Cochran, Sampling Techniques, 3rd ed., equation 6.9, without the
    correction for a finite population).
    """
    n_rows = len(nll_N)
    if n_rows < 2:
        return float("nan")
    residual_N = nll_N - nll_N.sum() / n_tokens_N.sum() * n_tokens_N
    return float((residual_N.square().sum() * n_rows / (n_rows - 1)).sqrt() / n_tokens_N.sum())
