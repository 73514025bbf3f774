"""Dense attention with shared queries and keys: what LSH attention approximates, for comparison and evaluation.

A token sees every other token that the masks allow, and itself only if it sees nothing else; keys are qk / ||qk||,
scores q.k. LSH attention (without dropout, and across buckets) is the same with keys that count as often as its rounds
find them, and takes this path with `Counts` where the sequence is short. Scores exist for a block of queries at a time
(of one head, or of several where they are short), in the backward too, so that memory grows with T and not with T * T;
counts alone take a number for each token and chunk.

Axes: B batch, H heads, T tokens, D head dim, G = B*H, g heads and L queries of a block, W keys that they may see.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer.arguments import check_heads, switch
from reformer.gradients import refuse_second_derivatives
from reformer.lsh.counts import Counts, PairCounts
from reformer.lsh.dropout import check_dropout, keep_factor
from reformer.lsh.rounds import by_head
from reformer.lsh.shared_keys import LOG2_E, SAFE_BOUND, key_gradient_of_query, key_scale_and_bound

BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**26}
"""Scores of one block; on a CPU 2 MiB of fp32, the fastest from 2**17 to 2**23 (measured at 8,192 tokens)."""

MIN_BLOCK, MAX_BLOCK = 64, {"cpu": 256, "cuda": 2**12}
"""Fewest queries of a block, since each block reads all keys and values and adds to all their gradients; and most,
since hidden scores of a block are computed anyway. Short sequences have several heads in a block instead."""


def dense_attention(
    qk: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    counts: Counts | None = None,
) -> Tensor:
    """Softmax attention [B, H, T, D] in v's dtype, statistics in fp32 or better.

    O(T^2) time and, without counts, O(T) memory.

    Args:
        qk: shared queries and keys [B, H, T, D], floating point. The key of a zero vector is zero, without gradient.
        v: values [B, H, T, D], of qk's dtype.
        causal: whether a token sees only what stands before it.
        key_padding_mask: [B, T], True (non-zero) at tokens that may be seen.
        segment_ids: integer [B, T]; tokens of different segments do not see each other.
        dropout: probability of dropping a weight after the softmax, the rest scaled by 1 / (1 - dropout); the own
            value of a token that sees nothing but itself is never dropped.
        dropout_keys: integers [B, H] in the range of int32, needed with dropout: they decide what is dropped, as in
            round 0 of LSH attention.
        counts: how often each key counts, of G = B*H; None: once. They take two numbers for each token and chunk, of as
            many heads as a block has.

    Raises:
        ValueError: a shape, dtype or probability that does not fit, with what was expected.
    """
    check_heads({"qk": qk, "v": v}, key_padding_mask, segment_ids)
    check_dropout(dropout, dropout_keys, qk.shape[:2])
    n_heads = qk.shape[1]
    view = _View(
        causal=switch("causal", causal),
        counts=counts,
        key_mask_GT=None if key_padding_mask is None else by_head(key_padding_mask.bool(), n_heads),
        segment_ids_GT=None if segment_ids is None else by_head(segment_ids, n_heads),
        dropout=dropout,
        dropout_keys_G=None if dropout_keys is None else dropout_keys.flatten().clone(),
    )
    return _DenseAttention.apply(qk, v, view)


@dataclass(frozen=True)
class _View:
    """Who sees whom, how much it counts, and what is dropped of it."""

    causal: bool
    counts: Counts | None
    key_mask_GT: Tensor | None
    segment_ids_GT: Tensor | None
    dropout: float
    dropout_keys_G: Tensor | None

    def blocks(self, like_GTD: Tensor) -> "Iterator[_Block]":
        """All queries of all heads, block by block, each with the keys that they may see."""
        n_heads, n_tokens, _ = like_GTD.shape
        kind = "cpu" if like_GTD.device.type == "cpu" else "cuda"
        scores = BLOCK_SCORES[kind]
        length = min(n_tokens, MAX_BLOCK[kind], max(MIN_BLOCK, scores // n_tokens))
        at_once = max(1, scores // (length * n_tokens))
        for head in range(0, n_heads, at_once):
            heads = slice(head, min(head + at_once, n_heads))
            counts = None if self.counts is None else self.counts.of_heads(heads, like_GTD.dtype)
            for first in range(0, n_tokens, length):
                queries = slice(first, min(first + length, n_tokens))
                yield _Block(heads, queries, slice(0, queries.stop if self.causal else n_tokens), counts)

    def hide(self, x_gLW: Tensor, at: "_Block") -> Tensor:
        """Numbers of a block, in place: 0 where a query does not see a key, times how often it counts elsewhere."""
        if self.causal:
            x_gLW[..., at.queries].tril_(-1)
        else:
            x_gLW.diagonal(at.queries.start, dim1=-2, dim2=-1).zero_()
        if self.key_mask_GT is not None:
            x_gLW.masked_fill_(~self.key_mask_GT[at.heads, None, at.keys], 0)
        if self.segment_ids_GT is not None:
            segment_gT = self.segment_ids_GT[at.heads]
            x_gLW.masked_fill_(segment_gT[:, at.queries, None] != segment_gT[:, None, at.keys], 0)
        if at.counts is not None:
            x_gLW.mul_(at.counts.between(at.queries, at.keys))
        return x_gLW

    def drop(self, x_gLW: Tensor, at: "_Block") -> Tensor:
        """x times the factors of dropout; x itself without dropout."""
        if not self.dropout:
            return x_gLW
        assert self.dropout_keys_G is not None
        position = torch.arange(at.keys.stop, device=x_gLW.device)
        key_g11 = self.dropout_keys_G[at.heads, None, None]
        return x_gLW * keep_factor(key_g11, 0, position[at.queries, None], position, self.dropout, x_gLW.dtype)


@dataclass(frozen=True)
class _Block:
    """Some heads, the queries of these, and the keys that any of them may see."""

    heads: slice
    queries: slice
    keys: slice
    counts: PairCounts | None


class _DenseAttention(torch.autograd.Function):
    """Of shared queries and keys and of values [B, H, T, D], and nothing of size T * T."""

    @staticmethod
    def forward(ctx: Any, qk_BHTD: Tensor, v_BHTD: Tensor, view: _View) -> Tensor:
        with torch.autocast(qk_BHTD.device.type, enabled=False):
            q_GTD, v_GTD = _heads(qk_BHTD), _heads(v_BHTD)
            scores = _Scores(q_GTD, view)
            out_GTD = torch.empty_like(v_GTD)
            denom_GT1 = torch.empty_like(scores.top_GT1)
            for at in view.blocks(v_GTD):
                weights = scores.weights(at, find_top=True)
                torch.sum(weights, dim=-1, keepdim=True, out=denom_GT1[at.heads, at.queries])
                torch.bmm(view.drop(weights, at), v_GTD[at.heads, at.keys], out=out_GTD[at.heads, at.queries])
            alone = denom_GT1 == 0
            out_GTD = torch.where(alone, v_GTD, out_GTD.div_(denom_GT1.masked_fill(alone, 1)))
        ctx.save_for_backward(qk_BHTD, v_BHTD, out_GTD, scores.top_GT1, denom_GT1)
        ctx.view = view
        return out_GTD.view(v_BHTD.shape).to(v_BHTD.dtype)

    @staticmethod
    def backward(ctx: Any, d_out_BHTD: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivatives("dense attention")
        with torch.autocast(d_out_BHTD.device.type, enabled=False):
            qk, v, out, top, denom = ctx.saved_tensors
            dq_GTD, dv_GTD = _gradients(_heads(qk), _heads(v), out, top, denom, _heads(d_out_BHTD), ctx.view)
        return dq_GTD.view(qk.shape).to(qk.dtype), dv_GTD.view(v.shape).to(v.dtype), None


def _heads(x_BHTD: Tensor) -> Tensor:
    """[G, T, D] in fp32 or better."""
    return x_BHTD.flatten(0, 1).to(torch.promote_types(x_BHTD.dtype, torch.float32))


class _Scores:
    """What scores are made of, and the weights that they give, block by block."""

    def __init__(self, q_GTD: Tensor, view: _View, top_GT1: Tensor | None = None) -> None:
        self.q, self.view = q_GTD, view
        self.key_scale_GT1, bound_GT1 = key_scale_and_bound(q_GTD)
        self.k = q_GTD * self.key_scale_GT1
        self.is_bounded = bool(bound_GT1.max() <= SAFE_BOUND[q_GTD.dtype])
        self.top_GT1 = bound_GT1 if top_GT1 is None else top_GT1
        """What weights are relative to: 2 ** (score - top)."""

    def weights(self, at: _Block, find_top: bool = False) -> Tensor:
        """The weights [g, L, W] of a block, where a key is not seen 0."""
        x_gLW = torch.bmm(self.q[at.heads, at.queries], self.k[at.heads, at.keys].mT)
        top_gL1 = self.top_GT1[at.heads, at.queries]
        if not self.is_bounded:
            if find_top:
                hidden = self.view.hide(torch.ones_like(x_gLW), at) == 0
                highest = x_gLW.masked_fill(hidden, -torch.inf).amax(dim=-1, keepdim=True)
                top_gL1.copy_(highest.clamp_(min=torch.finfo(x_gLW.dtype).min))
            x_gLW = torch.minimum(x_gLW, top_gL1)  # what is not visible may be larger: no overflow
        return self.view.hide(x_gLW.sub_(top_gL1).exp2_(), at)


def _gradients(
    q_GTD: Tensor, v_GTD: Tensor, out_GTD: Tensor, top_GT1: Tensor, denom_GT1: Tensor, d_out_GTD: Tensor, view: _View
) -> tuple[Tensor, Tensor]:
    """The gradients of shared queries and keys, and of values."""
    scores = _Scores(q_GTD, view, top_GT1)
    dq_GTD, dk_GTD = torch.empty_like(q_GTD), torch.zeros_like(q_GTD)
    alone_GT1 = denom_GT1 == 0
    # Probabilities are weight / sum: the division goes to where there are D numbers, not W.
    d_out_GTD = d_out_GTD / denom_GT1.masked_fill(alone_GT1, 1)
    delta_GT1 = (d_out_GTD * out_GTD).sum(dim=-1, keepdim=True)
    dv_GTD = d_out_GTD * alone_GT1  # who sees nothing else has its own value
    for at in view.blocks(v_GTD):
        queries, keys = (at.heads, at.queries), (at.heads, at.keys)
        weights = scores.weights(at)
        dv_GTD[keys].baddbmm_(view.drop(weights, at).mT, d_out_GTD[queries])
        d_weights = view.drop(torch.bmm(d_out_GTD[queries], v_GTD[keys].mT), at)
        d_scores = d_weights.sub_(delta_GT1[queries]).mul_(weights)
        torch.bmm(d_scores, scores.k[keys], out=dq_GTD[queries])
        dk_GTD[keys].baddbmm_(d_scores.mT, q_GTD[queries])
    dq_GTD.mul_(1 / LOG2_E)  # the keys that it was made with carry log2(e)
    return dq_GTD.add_(key_gradient_of_query(q_GTD, dk_GTD, scores.key_scale_GT1)), dv_GTD
