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
  memory costs a page fault per 4 KiB: a tile's backward took 6.0 ms with it and 3.8 ms without (measured).

Axes: as in rounds.py. "By place" means in sorted order, "by token" in the original one.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer.lsh.rounds import Layout, Round, Tile, by_chunk, by_window
from reformer.lsh.scratch import scratch

LOG2_E = math.log2(math.e)

SAFE_BOUND = {torch.float32: 40.0, torch.float64: 400.0}
"""The smallest weight, 2 ** (-2 * bound), leaves its inverse as much room again before it overflows."""

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
    """One head's tensors by token, and what turns keys into those that scores are made with: times log2(e) / |k|."""

    def __init__(self, q_TD: Tensor, k_TD: Tensor | None, v_TD: Tensor, dtype: torch.dtype) -> None:
        self.q, self.v = q_TD.to(dtype), v_TD.to(dtype)
        norm_T1 = torch.linalg.vector_norm(self.q, dim=-1, keepdim=True)
        self.is_shared = k_TD is None
        if k_TD is None:
            # The key of a zero vector is zero, without gradient.
            self.key_scale = (LOG2_E / norm_T1).masked_fill_(norm_T1 < torch.finfo(dtype).tiny, 0)
            self.k, self.bound = self.q, LOG2_E * norm_T1
        else:
            self.k, self.key_scale = k_TD.to(dtype), torch.full_like(norm_T1, LOG2_E)
            self.bound = LOG2_E * norm_T1 * torch.linalg.vector_norm(self.k, dim=-1).max()
        self.is_bounded = bool(self.bound.max() <= SAFE_BOUND[dtype])


class _TileMemory:
    """What a tile of N chunks is computed in. Memory that is never written costs nothing: all is there for both passes.

    Rows are what is gathered, [N*L (+ halo), …]; the names without it are views of them, [N, L or W, …].
    """

    def __init__(self, layout: Layout, n_chunks: int, like: Tensor, is_shared: bool) -> None:
        L, W, D = layout.chunk_len, layout.window, like.shape[-1]
        n_places, n_key_places = n_chunks * L, n_chunks * L + layout.n_halo
        dtype = torch.promote_types(like.dtype, torch.float32)

        def rows(n: int, width: int) -> Tensor:
            return like.new_empty(n, width, dtype=dtype)

        self.unscaled_rows, self.k_rows, self.v_rows = (rows(n_key_places, D) for _ in range(3))
        self.key_scale_rows = rows(n_key_places, 1)
        self.q_rows, self.d_out_rows = rows(n_places, D), rows(n_places, D)
        self.top_rows, self.delta_rows = rows(n_places, 1), rows(n_places, 1)
        self.k, self.v = (by_window(x, L, W) for x in (self.k_rows, self.v_rows))
        self.d_out, self.top, self.delta = (by_chunk(x, L) for x in (self.d_out_rows, self.top_rows, self.delta_rows))
        own = layout.reach[0] * L
        # Shared queries are a part of the keys before scaling: one gather less.
        self.q = by_chunk(self.unscaled_rows[own : own + n_places] if is_shared else self.q_rows, L)
        self.weights, self.d_scores, self.visibility, self.scratch = (
            rows(n_places, W).view(-1, L, W) for _ in range(4)
        )
        self.d_window = rows(n_chunks * W, D).view(-1, W, D)

    def gather(self, head: _Head, round_: Round, tile: Tile) -> None:
        """Fill in queries, keys and values."""
        key_rows = round_.key_rows[tile.key_places]
        torch.index_select(head.k, 0, key_rows, out=self.unscaled_rows)
        torch.index_select(head.key_scale, 0, key_rows, out=self.key_scale_rows)
        torch.mul(self.unscaled_rows, self.key_scale_rows, out=self.k_rows)
        torch.index_select(head.v, 0, key_rows, out=self.v_rows)
        if not head.is_shared:
            torch.index_select(head.q, 0, round_.query_rows[tile.places], out=self.q_rows)

    def score(self, round_: Round, tile: Tile) -> None:
        """Fill in scores, in the place of the weights, and how much each key counts."""
        torch.bmm(self.q, self.k.mT, out=self.weights)
        round_.visibility(tile, self.visibility, self.scratch)

    def weigh(self, is_bounded: bool) -> None:
        """Scores to weights: 2 ** (score - top) times how much the key counts."""
        if not is_bounded:
            torch.minimum(self.weights, self.top, out=self.weights)  # what is not visible may be larger: no overflow
        self.weights.sub_(self.top).exp2_().mul_(self.visibility)


def _tiles(layout: Layout, like: Tensor, is_shared: bool) -> list[tuple[Tile, _TileMemory]]:
    """The tiles of a round, and the memory that those of one size share."""
    memory: dict[int, _TileMemory] = {}
    tiles = layout.tiles()
    for tile in tiles:
        memory.setdefault(tile.count, _TileMemory(layout, tile.count, like, is_shared))
    return [(tile, memory[tile.count]) for tile in tiles]


def _forward(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, T, D] and, by token, what weights are relative to, 2 ** (score - top), and their sum [G, T, 1].

    Top and sum are kept apart: a logsumexp would lose the sum to rounding where the top is large.
    """
    dtype = torch.promote_types(q_GTD.dtype, torch.float32)
    n_groups, n_tokens, width = q_GTD.shape
    out_GTD = v_GTD.new_empty(v_GTD.shape)
    top_GT1, norm_GT1 = (q_GTD.new_empty(n_groups, n_tokens, 1, dtype=dtype) for _ in range(2))
    tiles = _tiles(layout, q_GTD, is_shared=k_GTD is None)
    n_sums = n_tokens if layout.is_lsh else 0  # local attention's values by place are its sums
    n_spare = 0 if out_GTD.dtype == dtype else n_sums
    out_SD, one_TD, spare_TD = scratch(q_GTD, dtype, [(n, width) for n in (layout.n_places, n_sums, n_spare)])
    total_GTD = _sums(out_GTD, spare_TD)
    by_place = [out_SD, *(q_GTD.new_empty(layout.n_places, 1, dtype=dtype) for _ in range(2))]
    one_round = [one_TD, *(torch.empty_like(top_GT1[0]) for _ in range(2))]
    for group in range(n_groups):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        total_TD = layout.total_by_token(out_SD, total_GTD[group])
        total = [total_TD, norm_GT1[group], top_GT1[group].copy_(head.bound)]
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _forward_round(round_, head, tiles, *by_place)
            if head.is_bounded:
                for sum_, values, one in zip(total[:2], by_place, one_round, strict=False):
                    round_.add_by_token(sum_, values, one)
            else:
                _add_unbounded(total, by_place, one_round, round_)
        alone = norm_GT1[group] == 0
        torch.div(total_TD, norm_GT1[group].masked_fill(alone, 1), out=out_GTD[group])
        rows = alone.squeeze(-1).nonzero().squeeze(-1)
        out_GTD[group, rows] = v_GTD[group, rows]
    return out_GTD, top_GT1, norm_GT1


def _sums(result_GTD: Tensor, spare_TD: Tensor) -> Tensor:
    """Where sums over rounds are made: in the result itself or, if its dtype is too coarse, in the spare memory, in
    which then each head's follow those of another."""
    return spare_TD.expand_as(result_GTD) if len(spare_TD) else result_GTD


def _forward_round(
    round_: Round,
    head: _Head,
    tiles: list[tuple[Tile, _TileMemory]],
    out_SD: Tensor,
    norm_S1: Tensor,
    top_S1: Tensor,
) -> None:
    """Fills in, by place, the sums of weighted values and of weights and, if not bounded, what they are relative to."""
    out_CLD, norm_CL1, top_CL1 = (by_chunk(x, round_.layout.chunk_len) for x in (out_SD, norm_S1, top_S1))
    for tile, memory in tiles:
        memory.gather(head, round_, tile)
        memory.score(round_, tile)
        if head.is_bounded:
            torch.index_select(head.bound, 0, round_.query_rows[tile.places], out=memory.top_rows)
        else:
            visible = memory.weights.masked_fill(memory.visibility == 0, -torch.inf)
            torch.amax(visible, dim=-1, keepdim=True, out=memory.top)
            memory.top.clamp_(min=torch.finfo(visible.dtype).min)
            top_CL1[tile.chunks] = memory.top
        memory.weigh(head.is_bounded)
        torch.sum(memory.weights, dim=-1, keepdim=True, out=norm_CL1[tile.chunks])
        if round_.layout.dropout:
            memory.weights.mul_(round_.keep(tile))
        torch.bmm(memory.weights, memory.v, out=out_CLD[tile.chunks])


def _add_unbounded(total: list[Tensor], by_place: list[Tensor], one_round: list[Tensor], round_: Round) -> None:
    """Add a round's (output, norm, top) to the sums over the rounds before it, where each has its own top."""
    if round_.round == 0:
        for sum_, values, one in zip(total, by_place, one_round, strict=True):
            round_.add_by_token(sum_, values, one)
        return
    out, norm, top = (
        torch.index_select(x, 0, round_.inverse, out=one) for x, one in zip(by_place, one_round, strict=True)
    )
    total_out, total_norm, total_top = total
    new_top = torch.maximum(total_top, top)
    old_weight, new_weight = (total_top - new_top).exp2_(), (top - new_top).exp2_()
    total_out.mul_(old_weight).addcmul_(out, new_weight)
    total_norm.mul_(old_weight).addcmul_(norm, new_weight)
    total_top.copy_(new_top)


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
    dq_GTD, dv_GTD = q_GTD.new_empty(q_GTD.shape), v_GTD.new_empty(v_GTD.shape)
    dk_GTD = None if k_GTD is None else k_GTD.new_empty(k_GTD.shape)
    tiles = _tiles(layout, q_GTD, is_shared=k_GTD is None)
    n_sums = n_tokens if layout.is_lsh else 0
    n_spare = 0 if q_GTD.dtype == dtype else n_sums
    n_rows = [layout.n_places, n_sums, n_spare, n_spare, n_sums if dk_GTD is None else n_spare]
    n_rows += [n_tokens, *[layout.n_places + layout.n_halo] * 2]
    dq_SD, one_TD, *spare, d_out_TD, dv_SD, dk_SD = scratch(q_GTD, dtype, [(n, width) for n in n_rows])
    results = (dq_GTD, dv_GTD, dq_GTD if dk_GTD is None else dk_GTD)  # shared: that of the keys is in spare memory
    totals_GTD = [_sums(result, memory) for result, memory in zip(results, spare, strict=True)]
    by_place = (dq_SD, dv_SD[layout.own], dk_SD[layout.own])
    for group in range(n_groups):
        head = _Head(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        dq_TD, dv_TD, dk_TD = (
            layout.total_by_token(x, total[group]) for x, total in zip(by_place, totals_GTD, strict=True)
        )
        alone_T1 = norm_GT1[group] == 0
        # Probabilities are weight / sum: the division goes to where there are D numbers, not W.
        torch.div(d_out_GTD[group], norm_GT1[group].masked_fill(alone_T1, 1), out=d_out_TD)
        delta_T1 = torch.mul(d_out_TD, out_GTD[group], out=dq_TD).sum(dim=-1, keepdim=True)
        for r in range(layout.n_rounds):
            round_ = Round(layout, group, r, dtype)
            _backward_round(round_, head, tiles, (d_out_TD, top_GT1[group], delta_T1), dq_SD, dk_SD, dv_SD)
            round_.add_by_token(dq_TD, dq_SD, one_TD)
            round_.add_keys_by_token(dk_TD, dk_SD, one_TD)
            round_.add_keys_by_token(dv_TD, dv_SD, one_TD)
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
    tiles: list[tuple[Tile, _TileMemory]],
    by_token: tuple[Tensor, Tensor, Tensor],
    dq_SD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Fills in the gradients of the queries by place, and of keys and values by key place.

    `by_token`: the gradient of the output divided by the sum of weights, top, delta = <output, that gradient>.
    """
    dq_CLD = by_chunk(dq_SD, round_.layout.chunk_len)
    for tile, memory in tiles:
        memory.gather(head, round_, tile)
        for values, rows in zip(by_token, (memory.d_out_rows, memory.top_rows, memory.delta_rows), strict=True):
            torch.index_select(values, 0, round_.query_rows[tile.places], out=rows)
        if tile.places.stop > round_.layout.n_tokens:  # the places of padding stand for no query
            padding = round_.is_padding_CL1[tile.chunks]
            memory.d_out.masked_fill_(padding, 0), memory.delta.masked_fill_(padding, 0)
        memory.score(round_, tile)
        memory.weigh(head.is_bounded)
        torch.bmm(memory.d_out, memory.v.mT, out=memory.d_scores)
        dropped = memory.weights
        if round_.layout.dropout:
            keep = round_.keep(tile)
            memory.d_scores.mul_(keep)
            dropped = torch.mul(memory.weights, keep, out=memory.scratch)
        memory.d_scores.sub_(memory.delta).mul_(memory.weights)
        tile.put_windows(dv_SD, torch.bmm(dropped.mT, memory.d_out, out=memory.d_window))
        tile.put_windows(dk_SD, torch.bmm(memory.d_scores.mT, memory.q, out=memory.d_window))
        torch.bmm(memory.d_scores, memory.k, out=dq_CLD[tile.chunks])


def _key_gradient_of_query(q: Tensor, dk: Tensor, key_scale: Tensor) -> Tensor:
    """What reaches q by way of k = q / |q|: (dk - k (k.dk)) / |q|."""
    inverse_norm = key_scale / LOG2_E
    k = q * inverse_norm
    return dk.sub(k.mul_((k * dk).sum(dim=-1, keepdim=True))).mul_(inverse_norm)
