"""Attention within chunks of a sorted sequence: sort -> chunk -> attend -> unsort, on any device.

The portable fast path of LSH attention and all of local attention (where the order is the identity and there is
one round). What is special about it:

- One autograd Function with a hand-written backward. Nothing of size R*T*D is ever kept: weights are relative to a
  bound of the scores that is the same for all rounds, so that rounds simply add up, and the backward computes them
  again from the bound and the sum.
- The bound is |q| |k| (Cauchy-Schwarz; keys of LSH have norm 1), known before any score is. Where queries are so
  long that exp(score - bound) could underflow, the largest visible score takes its place.
- Work goes by tiles of a few chunks, gathered from memory by the sort order and small enough to stay in cache.

Axes: as in rounds.py. "By place" means in sorted order, "by token" in the original one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer.lsh.rounds import Layout, Round, Tile

SAFE_BOUND = {torch.float32: 40.0, torch.float64: 340.0}
"""exp(-2 * bound) is still a normal number."""


def chunked_attention(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> Tensor:
    """Attention output [G, T, D] under `layout`; scores are q.k, or q.q/|q| where no keys are given.

    A token that sees nothing gets its own value. Statistics are in fp32 or better.
    """
    return _ChunkedAttention.apply(q_GTD, k_GTD, v_GTD, layout)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, v: Tensor, layout: Layout) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # the dtypes below are chosen with care
            out, top, norm = _forward(q, k, v, layout)
        ctx.save_for_backward(q, k, v, out, top, norm)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        with torch.autocast(d_out.device.type, enabled=False):
            q, k, v, out, top, norm = ctx.saved_tensors
            dq, dk, dv = _backward(q, k, v, out, top, norm, d_out, ctx.layout)
        return dq, dk, dv, None


class _Head:
    """One head's queries [T, D], and its keys and values side by side [T, 2D], so that one gather fetches both."""

    def __init__(self, q_TD: Tensor, k_TD: Tensor | None, v_TD: Tensor, dtype: torch.dtype) -> None:
        self.q = q_TD.to(dtype)
        self.width = q_TD.shape[-1]
        self.q_norm = torch.linalg.vector_norm(self.q, dim=-1, keepdim=True)
        k = self.q / self.q_norm.clamp(min=torch.finfo(dtype).tiny) if k_TD is None else k_TD.to(dtype)
        self.kv = torch.cat([k, v_TD.to(dtype)], dim=-1)
        longest_key = 1.0 if k_TD is None else torch.linalg.vector_norm(k, dim=-1).max()
        self.bound = self.q_norm * longest_key
        self.is_bounded = bool(self.bound.max() <= SAFE_BOUND[dtype])

    def tile(self, round_: Round, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, L, D], keys and values [N, W, D] of a tile."""
        kv = round_.keys(self.kv, tile)
        return round_.queries(self.q, tile), kv[..., : self.width], kv[..., self.width :]


def _forward(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, T, D] and, by token, what weights are relative to, exp(score - top), and their sum [G, T, 1].

    Top and sum are kept apart: a logsumexp would lose the sum to rounding where the top is large.
    """
    dtype = torch.promote_types(q_GTD.dtype, torch.float32)
    out_GTD = torch.empty_like(v_GTD)
    top_GT1, norm_GT1 = (q_GTD.new_empty(*q_GTD.shape[:2], 1, dtype=dtype) for _ in range(2))
    # One set of buffers for all rounds: fresh memory costs a page fault per 4 KiB, which was a fifth of the time.
    buffers = [q_GTD.new_empty(layout.n_places, width, dtype=dtype) for width in (q_GTD.shape[-1], 1, 1)]
    for group in range(q_GTD.shape[0]):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _forward_round(round_, head, *buffers)
            out, norm, top = (x.index_select(0, round_.inverse) for x in buffers)
            if r == 0:
                total_out, total_norm, total_top = out, norm, top
            elif head.is_bounded:
                total_out, total_norm = total_out.add_(out), total_norm.add_(norm)
            else:
                new_top = torch.maximum(total_top, top)
                old, new = (total_top - new_top).exp_(), (top - new_top).exp_()
                total_out.mul_(old).addcmul_(out, new)
                total_norm.mul_(old).addcmul_(norm, new)
                total_top = new_top
        alone = total_norm == 0
        out_GTD[group] = torch.where(alone, v_GTD[group], total_out.div_(total_norm))
        top_GT1[group], norm_GT1[group] = total_top, total_norm
    return out_GTD, top_GT1, norm_GT1


def _forward_round(round_: Round, head: _Head, out_SD: Tensor, norm_S1: Tensor, top_S1: Tensor) -> None:
    """Fills in, by place, the sums of weighted values and of weights, and what the weights are relative to."""
    for tile in round_.tiles():
        q, k, v = head.tile(round_, tile)
        out, norm, top = (tile.queries(x[tile.places]) for x in (out_SD, norm_S1, top_S1))
        scores = torch.bmm(q, k.mT)
        visibility = round_.visibility(tile)
        if head.is_bounded:
            top.copy_(round_.queries(head.bound, tile))
        else:
            visible = scores.masked_fill(visibility == 0, -torch.inf)
            top.copy_(visible.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min))
            scores = torch.minimum(scores, top)  # what is not visible may be larger, and must not overflow
        weights = scores.sub_(top).exp_().mul_(visibility)
        torch.sum(weights, dim=-1, keepdim=True, out=norm)
        torch.bmm(weights, v, out=out)


def _backward(
    q_GTD: Tensor,
    k_GTD: Tensor | None,
    v_GTD: Tensor,
    out_GTD: Tensor,
    top_GT1: Tensor,
    norm_GT1: Tensor,
    d_out_GTD: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor | None, Tensor]:
    dtype, width = top_GT1.dtype, q_GTD.shape[-1]
    dq_GTD, dv_GTD = torch.empty_like(q_GTD), torch.empty_like(v_GTD)
    dk_GTD = None if k_GTD is None else torch.empty_like(k_GTD)
    dq_SD = top_GT1.new_empty(layout.n_places, width)
    dkv_SE = top_GT1.new_empty(layout.n_places + layout.n_halo, 2 * width)
    dq_TD, dkv_TE = top_GT1.new_empty(layout.n_tokens, width), top_GT1.new_empty(layout.n_tokens, 2 * width)
    for group in range(q_GTD.shape[0]):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        d_out_TD, alone = d_out_GTD[group].to(dtype), norm_GT1[group] == 0
        # Probabilities are weight / sum: the division goes to where there are D numbers, not W.
        d_scaled_TD = d_out_TD / norm_GT1[group].masked_fill(alone, 1)
        delta_T1 = (d_scaled_TD * out_GTD[group]).sum(dim=-1, keepdim=True)
        dq_TD.zero_(), dkv_TE.zero_()
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _backward_round(round_, head, d_scaled_TD, top_GT1[group], delta_T1, dq_SD, dkv_SE.zero_())
            dq_TD += dq_SD.index_select(0, round_.inverse)
            round_.add_by_token(dkv_TE, dkv_SE)
        dk_TD, dv_TD = dkv_TE.split(width, dim=-1)
        if dk_GTD is None:
            _add_key_gradient_to_query(dq_TD, dk_TD, head)
        else:
            dk_GTD[group] = dk_TD
        dq_GTD[group] = dq_TD
        dv_GTD[group] = dv_TD + alone * d_out_TD
    return dq_GTD, dk_GTD, dv_GTD


def _backward_round(
    round_: Round, head: _Head, d_out_TD: Tensor, top_T1: Tensor, delta_T1: Tensor, dq_SD: Tensor, dkv_SE: Tensor
) -> None:
    """Fills in the gradients of the queries by place, and adds those of keys and values by key place."""
    n_tokens = len(d_out_TD)
    dk_SD, dv_SD = dkv_SE.split(head.width, dim=-1)
    for tile in round_.tiles():
        q, k, v = head.tile(round_, tile)
        d_out, top, delta = (round_.queries(x, tile) for x in (d_out_TD, top_T1, delta_T1))
        if tile.places.stop > n_tokens:  # the places of padding stand for no query
            padding = tile.queries(round_.query_position[tile.places] >= n_tokens)[..., None]
            d_out, delta = d_out.masked_fill(padding, 0), delta.masked_fill(padding, 0)
        scores = torch.bmm(q, k.mT)
        if not head.is_bounded:
            scores = torch.minimum(scores, top)
        weights = scores.sub_(top).exp_().mul_(round_.visibility(tile))
        tile.add_windows(dv_SD, torch.bmm(weights.mT, d_out))
        d_scores = torch.bmm(d_out, v.mT).sub_(delta).mul_(weights)
        torch.bmm(d_scores, k, out=tile.queries(dq_SD[tile.places]))
        tile.add_windows(dk_SD, torch.bmm(d_scores.mT, q))


def _add_key_gradient_to_query(dq_TD: Tensor, dk_TD: Tensor, head: _Head) -> None:
    """k = q / |q|, so dq += (dk - k (k.dk)) / |q|."""
    k_TD = head.kv[:, : head.width]
    along = (k_TD * dk_TD).sum(dim=-1, keepdim=True)
    dq_TD.add_((dk_TD - k_TD * along) / head.q_norm.clamp(min=torch.finfo(dq_TD.dtype).tiny))
