"""Dense attention with shared queries and keys: what LSH attention approximates, for comparison and evaluation.

A token sees every other token that the masks allow, and itself only if it sees nothing else; keys are qk / ||qk||,
scores q.k. LSH attention whose chunks are as long as the sequence is the same function. What is special: scores
exist for one head and a block of queries at a time, in the backward too, so that memory grows with T and not with
T * T.

Axes: B batch, H heads, T tokens, D head dim, G = B*H, L queries of a block, W keys that any of them may see.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer.lsh.dropout import check_dropout, keep_factor
from reformer.lsh.rounds import by_head

BLOCK_SCORES = {"cpu": 2**19, "cuda": 2**26}
"""Scores of one block; on a CPU 2 MiB of fp32, the fastest from 2**17 to 2**23 (measured at 8,192 tokens)."""

MIN_BLOCK = 64
"""Queries of a block at least: each block reads all keys and values, and adds to all of their gradients."""


def dense_attention(
    qk: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """Softmax attention [B, H, T, D] in v's dtype, statistics in fp32 or better; O(T^2) time, O(T) memory.

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

    Raises:
        ValueError: a shape, dtype or probability that does not fit, with what was expected.
    """
    _check_arguments(qk, v, key_padding_mask, segment_ids)
    check_dropout(dropout, dropout_keys, qk.shape[:2])
    n_heads = qk.shape[1]
    view = _View(
        causal=causal,
        hidden_GT=None if key_padding_mask is None else by_head(~key_padding_mask.bool(), n_heads),
        segment_ids_GT=None if segment_ids is None else by_head(segment_ids, n_heads),
        dropout=dropout,
        dropout_keys_G=None if dropout_keys is None else dropout_keys.flatten(),
    )
    dtype = torch.promote_types(qk.dtype, torch.float32)
    with torch.autocast(qk.device.type, enabled=False):
        q = qk.to(dtype)
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True)
        k = q / norm.masked_fill(norm == 0, torch.inf)
        out: Tensor = _DenseAttention.apply(*(x.flatten(0, 1) for x in (q, k, v.to(dtype))), view)
    return out.view_as(v).to(v.dtype)


@dataclass(frozen=True)
class _View:
    """Who sees whom, and what is dropped of it."""

    causal: bool
    hidden_GT: Tensor | None
    segment_ids_GT: Tensor | None
    dropout: float
    dropout_keys_G: Tensor | None

    def blocks(self, like_GTD: Tensor) -> Iterator[tuple[slice, slice]]:
        """Queries [L] and the keys [W] that they may see, block by block."""
        n_tokens = like_GTD.shape[1]
        scores = BLOCK_SCORES.get(like_GTD.device.type, BLOCK_SCORES["cuda"])
        length = max(MIN_BLOCK, scores // n_tokens)
        for first in range(0, n_tokens, length):
            queries = slice(first, min(first + length, n_tokens))
            yield queries, slice(0, queries.stop if self.causal else n_tokens)

    def hide(self, scores_LW: Tensor, group: int, queries: slice, keys: slice) -> Tensor:
        """The scores with -inf where a query does not see a key, in place."""
        own = scores_LW[:, queries]
        hidden = torch.ones(own.shape, dtype=torch.bool, device=own.device)
        own.masked_fill_(hidden.triu() if self.causal else hidden.triu().tril(), -torch.inf)
        if self.hidden_GT is not None:
            scores_LW.masked_fill_(self.hidden_GT[group, keys], -torch.inf)
        if self.segment_ids_GT is not None:
            segment_T = self.segment_ids_GT[group]
            scores_LW.masked_fill_(segment_T[queries, None] != segment_T[keys], -torch.inf)
        return scores_LW

    def drop(self, x_LW: Tensor, group: int, queries: slice, keys: slice) -> Tensor:
        """x times the factors of dropout; x itself without dropout."""
        if not self.dropout:
            return x_LW
        assert self.dropout_keys_G is not None
        position = torch.arange(keys.stop, device=x_LW.device)
        key = self.dropout_keys_G[group]
        return x_LW * keep_factor(key, 0, position[queries, None], position, self.dropout, x_LW.dtype)


class _DenseAttention(torch.autograd.Function):
    """Of queries, keys and values [G, T, D], and nothing of size T * T."""

    @staticmethod
    def forward(ctx: Any, q_GTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, view: _View) -> Tensor:
        out_GTD, lse_GT1 = torch.empty_like(v_GTD), v_GTD.new_empty(*v_GTD.shape[:2], 1)
        for group, (q, k, v, out, lse) in enumerate(zip(q_GTD, k_GTD, v_GTD, out_GTD, lse_GT1, strict=True)):
            for queries, keys in view.blocks(v_GTD):
                scores = view.hide(q[queries] @ k[keys].T, group, queries, keys)
                lse[queries] = scores.logsumexp(dim=-1, keepdim=True)
                weights = _weights(scores, lse[queries])
                out[queries] = view.drop(weights, group, queries, keys) @ v[keys]
            out.copy_(torch.where(lse == -torch.inf, v, out))
        ctx.save_for_backward(q_GTD, k_GTD, v_GTD, out_GTD, lse_GT1)
        ctx.view = view
        return out_GTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_GTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.autocast(d_out_GTD.device.type, enabled=False):
            q, k, v, out, lse = ctx.saved_tensors
            return *_gradients(q, k, v, out, lse, d_out_GTD, ctx.view), None


def _gradients(
    q_GTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, out_GTD: Tensor, lse_GT1: Tensor, d_out_GTD: Tensor, view: _View
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    dq_GTD, dk_GTD = torch.empty_like(q_GTD), torch.zeros_like(k_GTD)
    dv_GTD = d_out_GTD * (lse_GT1 == -torch.inf)  # who sees nothing else has its own value
    delta_GT1 = (d_out_GTD * out_GTD).sum(dim=-1, keepdim=True)
    for group, (q, k, v) in enumerate(zip(q_GTD, k_GTD, v_GTD, strict=True)):
        for queries, keys in view.blocks(v_GTD):
            d_out = d_out_GTD[group, queries]
            weights = _weights(view.hide(q[queries] @ k[keys].T, group, queries, keys), lse_GT1[group, queries])
            dv_GTD[group, keys].addmm_(view.drop(weights, group, queries, keys).T, d_out)
            d_weights = view.drop(d_out @ v[keys].T, group, queries, keys)
            d_scores = d_weights.sub_(delta_GT1[group, queries]).mul_(weights)
            dq_GTD[group, queries] = d_scores @ k[keys]
            dk_GTD[group, keys].addmm_(d_scores.T, q[queries])
    return dq_GTD, dk_GTD, dv_GTD


def _weights(scores_LW: Tensor, lse_L1: Tensor) -> Tensor:
    """exp(score - lse), in place; zeros in rows that see nothing."""
    return scores_LW.sub_(lse_L1.masked_fill(lse_L1 == -torch.inf, 0)).exp_()


def _check_arguments(qk: Tensor, v: Tensor, key_padding_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    if qk.ndim != 4 or v.shape != qk.shape or qk.shape[2] == 0:
        raise ValueError(f"qk and v must both be [B, H, T, D] with T >= 1, got {list(qk.shape)} and {list(v.shape)}")
    if not qk.is_floating_point() or v.dtype != qk.dtype:
        raise ValueError(f"qk and v must have one floating-point dtype, got {qk.dtype} and {v.dtype}")
    for name, mask in (("key_padding_mask", key_padding_mask), ("segment_ids", segment_ids)):
        if mask is not None and list(mask.shape) != [qk.shape[0], qk.shape[2]]:
            raise ValueError(f"{name} must be [B, T] = {[qk.shape[0], qk.shape[2]]}, got {list(mask.shape)}")
