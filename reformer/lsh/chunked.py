"""Attention within chunks of a sorted sequence: sort -> chunk -> attend -> unsort, on any device.

The portable fast path of LSH attention and all of local attention (where the order is the identity and there is
one round). The derivation is in README.md beside this file. What is special:

- One autograd Function with a hand-written backward. Nothing of size R*T*D is ever kept: weights are relative to a
  bound of the scores that is the same for all rounds, so that rounds simply add up, and the backward computes them
  again from the bound and the sum.
- The bound is |q| |k| (Cauchy-Schwarz; keys of LSH have norm 1), known before any score is. Where queries are so
  long that a weight relative to it could underflow, the largest visible score takes its place.
- Scores are in base 2 (keys carry a factor log2(e)): on CPUs exp2 is three times as fast as exp (measured).
- Work goes by tiles of a few chunks, gathered by the sort order into one set of buffers that stays in cache: fresh
  memory costs a page fault per 4 KiB, and tripled the time of a tile (measured).

Axes: as in rounds.py. "By place" means in sorted order, "by token" in the original one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer.lsh.rounds import Layout, Round, Tile

LOG2_E = math.log2(math.e)

SAFE_BOUND = {torch.float32: 60.0, torch.float64: 500.0}
"""2 ** (-2 * bound) is still a normal number."""

FINISH_TOKENS = 4096
"""Tokens whose gradients are put together at a time, so that what is between stays in cache."""


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
    """One head's tensors by token, and what turns keys into those that scores are made with: times log2(e) / |q|."""

    def __init__(self, q_TD: Tensor, k_TD: Tensor | None, v_TD: Tensor, dtype: torch.dtype) -> None:
        self.q, self.v = q_TD.to(dtype), v_TD.to(dtype)
        self.k = self.q if k_TD is None else k_TD.to(dtype)
        norm_T1 = torch.linalg.vector_norm(self.q, dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).tiny)
        self.is_shared = k_TD is None
        if self.is_shared:
            self.key_scale, self.bound = LOG2_E / norm_T1, LOG2_E * norm_T1
        else:
            self.key_scale = norm_T1.new_full((), LOG2_E).expand_as(norm_T1)
            self.bound = LOG2_E * norm_T1 * torch.linalg.vector_norm(self.k, dim=-1).max()
        self.is_bounded = bool(self.bound.max() <= SAFE_BOUND[dtype])


class _Buffers:
    """What a tile is computed in. Memory that is never written costs nothing, so all is there for both passes."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        L, W, D, count = layout.chunk_len, layout.window, like.shape[-1], layout.chunks_per_tile(like.device)
        dtype = torch.promote_types(like.dtype, torch.float32)
        places, key_places = count * L, count * L + layout.n_halo

        def empty(*shape: int) -> Tensor:
            return like.new_empty(shape, dtype=dtype)

        self.q, self.d_out = empty(places, D), empty(places, D)
        self.shared, self.k, self.v = (empty(key_places, D) for _ in range(3))
        self.key_scale = empty(key_places, 1)
        self.top, self.delta = empty(places, 1), empty(places, 1)
        self.weights, self.d_scores, self.visibility, self.scratch = (empty(count, L, W) for _ in range(4))
        self.d_window = empty(count, W, D)

    def gather(self, head: _Head, round_: Round, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, L, D], scaled keys and values [N, W, D] of a tile."""
        unscaled = round_.keys(head.k, tile, self.shared)
        n_places = tile.key_places.stop - tile.key_places.start
        round_.keys(head.key_scale, tile, self.key_scale)
        torch.mul(self.shared[:n_places], self.key_scale[:n_places], out=self.k[:n_places])
        # Shared queries are a part of the keys before scaling: one gather less.
        q = unscaled[:, round_.own_window] if head.is_shared else round_.queries(head.q, tile, self.q)
        return q, tile.windows(self.k[:n_places]), round_.keys(head.v, tile, self.v)

    def score(self, q: Tensor, k: Tensor, round_: Round, tile: Tile) -> tuple[Tensor, Tensor]:
        """Scores in base 2 and how much each key counts, [N, L, W]."""
        visibility = round_.visibility(tile, self.visibility[: tile.count], self.scratch[: tile.count])
        return torch.bmm(q, k.mT, out=self.weights[: tile.count]), visibility


def _weigh(scores: Tensor, visibility: Tensor, top: Tensor, head: _Head) -> Tensor:
    """Scores to weights, in place: 2 ** (score - top) times how much the key counts."""
    if not head.is_bounded:
        torch.minimum(scores, top, out=scores)  # what is not visible may be larger, and must not overflow
    return scores.sub_(top).exp2_().mul_(visibility)


def _forward(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, T, D] and, by token, what weights are relative to, 2 ** (score - top), and their sum [G, T, 1].

    Top and sum are kept apart: a logsumexp would lose the sum to rounding where the top is large.
    """
    dtype = torch.promote_types(q_GTD.dtype, torch.float32)
    n_groups, n_tokens, width = q_GTD.shape
    out_GTD = torch.empty_like(v_GTD)
    top_GT1, norm_GT1 = (q_GTD.new_empty(n_groups, n_tokens, 1, dtype=dtype) for _ in range(2))
    buffers = _Buffers(layout, q_GTD)
    by_place = [q_GTD.new_empty(layout.n_places, columns, dtype=dtype) for columns in (width, 1, 1)]
    by_token = [q_GTD.new_empty(n_tokens, columns, dtype=dtype) for columns in (width, 1, 1)]
    total_TD = q_GTD.new_empty(n_tokens, width, dtype=dtype)
    for group in range(n_groups):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        total = [total_TD, norm_GT1[group], top_GT1[group]]
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _forward_round(round_, head, buffers, *by_place)
            into = by_token if r else total
            for place_values, token_values in zip(by_place, into, strict=True):
                torch.index_select(place_values, 0, round_.inverse, out=token_values)
            if r:
                _add_round(total, by_token, head.is_bounded)
        alone = norm_GT1[group] == 0
        torch.div(total_TD, norm_GT1[group].masked_fill(alone, 1), out=out_GTD[group])
        rows = alone.squeeze(-1).nonzero().squeeze(-1)
        out_GTD[group, rows] = v_GTD[group, rows]
    return out_GTD, top_GT1, norm_GT1


def _forward_round(
    round_: Round, head: _Head, buffers: _Buffers, out_SD: Tensor, norm_S1: Tensor, top_S1: Tensor
) -> None:
    """Fills in, by place, the sums of weighted values and of weights, and what the weights are relative to."""
    for tile in round_.tiles():
        q, k, v = buffers.gather(head, round_, tile)
        out, norm, top = (tile.queries(x[tile.places]) for x in (out_SD, norm_S1, top_S1))
        scores, visibility = buffers.score(q, k, round_, tile)
        if head.is_bounded:
            round_.queries(head.bound, tile, top_S1[tile.places])
        else:
            visible = scores.masked_fill(visibility == 0, -torch.inf)
            top.copy_(visible.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min))
        weights = _weigh(scores, visibility, top, head)
        torch.sum(weights, dim=-1, keepdim=True, out=norm)
        if round_.layout.dropout:
            weights.mul_(round_.keep(tile))
        torch.bmm(weights, v, out=out)


def _add_round(total: list[Tensor], round_: list[Tensor], is_bounded: bool) -> None:
    """Add a round's (output, norm, top) by token to the sums over the rounds before it, in place."""
    (total_out, total_norm, total_top), (out, norm, top) = total, round_
    if not is_bounded:
        new_top = torch.maximum(total_top, top)
        for x, x_top in ((total_out, total_top), (total_norm, total_top), (out, top), (norm, top)):
            x.mul_((x_top - new_top).exp2_())
        total_top.copy_(new_top)
    total_out.add_(out)
    total_norm.add_(norm)


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
    dtype, (n_groups, n_tokens, width) = top_GT1.dtype, q_GTD.shape
    dq_GTD, dv_GTD = torch.empty_like(q_GTD), torch.empty_like(v_GTD)
    dk_GTD = None if k_GTD is None else torch.empty_like(k_GTD)
    buffers = _Buffers(layout, q_GTD)
    key_places = layout.n_places + layout.n_halo
    by_place = [top_GT1.new_empty(n, width) for n in (layout.n_places, key_places, key_places)]
    d_out_TD, dq_TD, dk_TD, dv_TD, scratch_TD = (top_GT1.new_empty(n_tokens, width) for _ in range(5))
    for group in range(n_groups):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        alone_T1 = norm_GT1[group] == 0
        # Probabilities are weight / sum: the division goes to where there are D numbers, not W.
        torch.div(d_out_GTD[group], norm_GT1[group].masked_fill(alone_T1, 1), out=d_out_TD)
        delta_T1 = torch.mul(d_out_TD, out_GTD[group], out=dq_TD).sum(dim=-1, keepdim=True)
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _backward_round(round_, head, buffers, d_out_TD, top_GT1[group], delta_T1, *by_place)
            round_.add_queries_by_token(dq_TD, by_place[0], scratch_TD)
            round_.add_keys_by_token(dk_TD, by_place[1], scratch_TD)
            round_.add_keys_by_token(dv_TD, by_place[2], scratch_TD)
        for start in range(0, n_tokens, FINISH_TOKENS):
            t = slice(start, start + FINISH_TOKENS)
            dq = dq_TD[t].mul_(1 / LOG2_E)  # the keys that it was made with carry log2(e)
            if dk_GTD is None:
                dq.add_(_key_gradient_of_query(head.q[t], dk_TD[t], head.key_scale[t]))
            dq_GTD[group, t] = dq
            torch.addcmul(dv_TD[t], alone_T1[t].to(dtype), d_out_TD[t], out=dv_GTD[group, t])
        if dk_GTD is not None:
            dk_GTD[group] = dk_TD
    return dq_GTD, dk_GTD, dv_GTD


def _backward_round(
    round_: Round,
    head: _Head,
    buffers: _Buffers,
    d_out_TD: Tensor,
    top_T1: Tensor,
    delta_T1: Tensor,
    dq_SD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Fills in the gradients of the queries by place, and of keys and values by key place."""
    n_tokens = len(d_out_TD)
    for tile in round_.tiles():
        q, k, v = buffers.gather(head, round_, tile)
        d_out = round_.queries(d_out_TD, tile, buffers.d_out)
        top, delta = round_.queries(top_T1, tile, buffers.top), round_.queries(delta_T1, tile, buffers.delta)
        if tile.places.stop > n_tokens:  # the places of padding stand for no query
            padding = tile.queries(round_.query_position[tile.places] >= n_tokens)[..., None]
            d_out.masked_fill_(padding, 0), delta.masked_fill_(padding, 0)
        weights = _weigh(*buffers.score(q, k, round_, tile), top, head)
        d_scores = torch.bmm(d_out, v.mT, out=buffers.d_scores[: tile.count])
        dropped = weights
        if round_.layout.dropout:
            keep = round_.keep(tile)
            d_scores.mul_(keep)
            dropped = torch.mul(weights, keep, out=buffers.scratch[: tile.count])
        d_scores.sub_(delta).mul_(weights)
        dk_SD[tile.new_key_places].zero_(), dv_SD[tile.new_key_places].zero_()
        d_window = buffers.d_window[: tile.count]
        tile.add_windows(dv_SD, torch.bmm(dropped.mT, d_out, out=d_window))
        tile.add_windows(dk_SD, torch.bmm(d_scores.mT, q, out=d_window))
        torch.bmm(d_scores, k, out=tile.queries(dq_SD[tile.places]))


def _key_gradient_of_query(q: Tensor, dk: Tensor, key_scale: Tensor) -> Tensor:
    """What reaches q by way of k = q / |q|: (dk - k (k.dk)) / |q|."""
    inverse_norm = key_scale / LOG2_E
    k = q * inverse_norm
    return dk.sub(k.mul_((k * dk).sum(dim=-1, keepdim=True))).mul_(inverse_norm)
