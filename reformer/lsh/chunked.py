"""Attention within chunks of a sorted sequence: sort -> chunk -> attend -> unsort, on any device.

The portable fast path of LSH attention and all of local attention (where the order is the identity and there is one
round). The derivation is in README.md beside this file.

- One autograd Function with a hand-written backward. Nothing of size R*T*D is ever kept: weights are relative to a
  bound of the scores that is the same for all rounds, so that rounds simply add up, and the backward computes them
  again from the bound and the sum.
- The bound is |q| |k| (shared_keys.py: keys of LSH have norm 1), known before any score is. Where queries are so long
  that a weight relative to it could underflow, the largest visible score takes its place.
- Work goes by tiles of a few chunks, gathered by the sort order into one set of buffers that stays in cache: fresh
  memory costs a page fault per 4 KiB: a tile's backward took 6.0 ms with it and 3.8 ms without (measured).

Axes: as in rounds.py. "By place" means in sorted order, "by token" in the original one.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reformer.gradients import refuse_second_derivatives
from reformer.lsh.rounds import Layout, Run, Tile, by_chunk, by_window
from reformer.lsh.scratch import scratch
from reformer.lsh.shared_keys import LOG2_E, SAFE_BOUND, key_gradient_of_query, key_scale_and_bound

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
            out, top, denom = _forward(q, k, v, layout)
        ctx.save_for_backward(q, k, v, out, top, denom)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        refuse_second_derivatives("attention by chunks")
        with torch.autocast(d_out.device.type, enabled=False):
            q, k, v, out, top, denom = ctx.saved_tensors
            dq, dk, dv = _backward(q, k, v, out, top, denom, d_out, ctx.layout)
        return dq, dk, dv, None


class _Heads:
    """Some heads' tensors by token, one head's tokens behind another's [T, …].

    `key_scale` turns keys into those that scores are made with: times log2(e) / |k|.
    """

    def __init__(self, q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, dtype: torch.dtype) -> None:
        self.q, self.v = q_GTD.flatten(0, 1).to(dtype), v_GTD.flatten(0, 1).to(dtype)
        self.is_shared = k_GTD is None
        if k_GTD is None:
            self.k = self.q
            self.key_scale, self.bound = key_scale_and_bound(self.q)
        else:
            norm_T1 = torch.linalg.vector_norm(self.q, dim=-1, keepdim=True)
            self.k, self.key_scale = k_GTD.flatten(0, 1).to(dtype), torch.full_like(norm_T1, LOG2_E)
            longest_G1 = torch.linalg.vector_norm(self.k, dim=-1).view(len(k_GTD), -1).amax(dim=1, keepdim=True)
            self.bound = (LOG2_E * norm_T1.view(len(k_GTD), -1) * longest_G1).view(-1, 1)
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

    def gather(self, heads: _Heads, run: Run, tile: Tile) -> None:
        """Fill in queries, keys and values."""
        key_rows = run.key_rows[tile.key_places]
        torch.index_select(heads.k, 0, key_rows, out=self.unscaled_rows)
        torch.index_select(heads.key_scale, 0, key_rows, out=self.key_scale_rows)
        torch.mul(self.unscaled_rows, self.key_scale_rows, out=self.k_rows)
        torch.index_select(heads.v, 0, key_rows, out=self.v_rows)
        if not heads.is_shared:
            torch.index_select(heads.q, 0, run.query_rows[tile.places], out=self.q_rows)
        if run.has_padding(tile):  # between heads, it would meet keys of which its bound knows nothing
            self.q.masked_fill_(run.is_padding_CL1[tile.chunks], 0)

    def score(self, run: Run, tile: Tile) -> None:
        """Fill in scores, in the place of the weights, and how much each key counts."""
        torch.bmm(self.q, self.k.mT, out=self.weights)
        run.visibility(tile, self.visibility, self.scratch)

    def weigh(self, is_bounded: bool) -> None:
        """Scores to weights: 2 ** (score - top) times how much the key counts."""
        if not is_bounded:
            torch.minimum(self.weights, self.top, out=self.weights)  # what is not visible may be larger: no overflow
        self.weights.sub_(self.top).exp2_().mul_(self.visibility)


class _Runs:
    """A call's runs, each with its tiles, and the memory that tiles of one size share."""

    def __init__(self, layout: Layout, like: Tensor, is_shared: bool) -> None:
        self.layout, self.like, self.is_shared = layout, like, is_shared
        self.memory: dict[int, _TileMemory] = {}

    def heads(self) -> list[slice]:
        """Heads that are computed together."""
        return _slices(len(self.layout.order_GRS), self.layout.at_once[0])

    def of(self, heads: slice, dtype: torch.dtype) -> Iterator[tuple[Run, list[tuple[Tile, _TileMemory]]]]:
        """The runs of these heads, one after the other."""
        for rounds in _slices(self.layout.n_rounds, self.layout.at_once[1]):
            run = Run(self.layout, heads, rounds, dtype)
            yield run, [(tile, self._memory(tile.count)) for tile in self.layout.tiles(run.n_chunks)]

    def _memory(self, n_chunks: int) -> _TileMemory:
        if n_chunks not in self.memory:
            self.memory[n_chunks] = _TileMemory(self.layout, n_chunks, self.like, self.is_shared)
        return self.memory[n_chunks]


def _slices(n: int, at_once: int) -> list[slice]:
    return [slice(start, min(start + at_once, n)) for start in range(0, n, at_once)]


def _forward(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, T, D] and, by token, what weights are relative to, 2 ** (score - top), and their sum [G, T, 1].

    Top and sum are kept apart: a logsumexp would lose the sum to rounding where the top is large.
    """
    dtype = torch.promote_types(q_GTD.dtype, torch.float32)
    width = q_GTD.shape[-1]
    out_GTD = v_GTD.new_empty(v_GTD.shape)
    top_GT1, denom_GT1 = (q_GTD.new_empty(*q_GTD.shape[:2], 1, dtype=dtype) for _ in range(2))
    runs = _Runs(layout, q_GTD, is_shared=k_GTD is None)
    n_gathered, n_spare = _sizes(layout, out_GTD.dtype == dtype)
    out_SD, gathered_TD, spare_TD = scratch(
        q_GTD, dtype, [(n, width) for n in (layout.n_run_places, n_gathered, n_spare)]
    )
    by_place = [out_SD, *(q_GTD.new_empty(layout.n_run_places, 1, dtype=dtype) for _ in range(2))]
    gathered = [gathered_TD, *(q_GTD.new_empty(len(gathered_TD), 1, dtype=dtype) for _ in range(2))]
    for group in runs.heads():
        heads = _Heads(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        out_TD, denom_T1, top_T1 = (x[group].flatten(0, 1) for x in (out_GTD, denom_GT1, top_GT1))
        total_TD, is_bounded = _sums(out_TD, spare_TD), heads.is_bounded
        top_T1.copy_(heads.bound)
        for run, tiles in runs.of(group, dtype):
            if run.is_first:
                total_TD = run.total_by_token(out_SD, total_TD)
            values = [x[: run.n_places] for x in by_place]
            _forward_run(run, heads, tiles, *values)
            if is_bounded:
                for sum_, x, memory in zip((total_TD, denom_T1), values, gathered, strict=False):
                    run.add_by_token(sum_, x, memory)
            else:
                _add_unbounded([total_TD, denom_T1, top_T1], values, gathered, run)
        alone = denom_T1 == 0
        torch.div(total_TD, denom_T1.masked_fill(alone, 1), out=out_TD)
        rows = alone.squeeze(-1).nonzero().squeeze(-1)
        out_TD[rows] = heads.v[rows].to(out_TD.dtype)
    return out_GTD, top_GT1, denom_GT1


def _sizes(layout: Layout, is_exact: bool) -> tuple[int, int]:
    """Rows of what a run's values are gathered in by token, and of the spare memory for sums that results in a dtype
    too coarse for them need. The only round of one local head needs neither."""
    n_heads, n_rounds = layout.at_once
    n_sums = n_heads * layout.n_tokens if layout.is_lsh or n_heads > 1 else 0
    return n_rounds * n_sums if layout.is_lsh else 0, 0 if is_exact else n_sums


def _sums(result_TD: Tensor, spare_TD: Tensor) -> Tensor:
    """The buffer for sums over rounds: the result itself or, if its dtype is too coarse, the spare memory, which each
    group of heads uses again."""
    return spare_TD[: len(result_TD)] if len(spare_TD) else result_TD


def _forward_run(
    run: Run,
    heads: _Heads,
    tiles: list[tuple[Tile, _TileMemory]],
    out_SD: Tensor,
    denom_S1: Tensor,
    top_S1: Tensor,
) -> None:
    """Fills in, by place, the sums of weighted values and of weights and, if not bounded, what they are relative to."""
    out_CLD, denom_CL1, top_CL1 = (by_chunk(x, run.layout.chunk_len) for x in (out_SD, denom_S1, top_S1))
    for tile, memory in tiles:
        memory.gather(heads, run, tile)
        memory.score(run, tile)
        if heads.is_bounded:
            torch.index_select(heads.bound, 0, run.query_rows[tile.places], out=memory.top_rows)
        else:
            visible = memory.weights.masked_fill(memory.visibility == 0, -torch.inf)
            torch.amax(visible, dim=-1, keepdim=True, out=memory.top)
            memory.top.clamp_(min=torch.finfo(visible.dtype).min)
            top_CL1[tile.chunks] = memory.top
        memory.weigh(heads.is_bounded)
        torch.sum(memory.weights, dim=-1, keepdim=True, out=denom_CL1[tile.chunks])
        if run.layout.dropout:
            memory.weights.mul_(run.keep(tile))
        torch.bmm(memory.weights, memory.v, out=out_CLD[tile.chunks])


def _add_unbounded(total: list[Tensor], by_place: list[Tensor], gathered: list[Tensor], run: Run) -> None:
    """Add a run's (output, denom, top) to the sums over the rounds before it, where each has its own top."""
    if not run.layout.is_lsh:
        for sum_, values, memory in zip(total, by_place, gathered, strict=True):
            run.add_by_token(sum_, values, memory)
        return
    total_out, total_denom, total_top = total
    of_rounds = [
        torch.index_select(x, 0, run.inverse, out=memory[: len(run.inverse)]).view(run.n_rounds, *sum_.shape)
        for x, memory, sum_ in zip(by_place, gathered, total, strict=True)
    ]
    for round_, (out, denom, top) in enumerate(zip(*of_rounds, strict=True)):
        if run.is_first and not round_:
            total_out.copy_(out), total_denom.copy_(denom), total_top.copy_(top)
            continue
        new_top = torch.maximum(total_top, top)
        old_weight, new_weight = (total_top - new_top).exp2_(), (top - new_top).exp2_()
        total_out.mul_(old_weight).addcmul_(out, new_weight)
        total_denom.mul_(old_weight).addcmul_(denom, new_weight)
        total_top.copy_(new_top)


def _backward(
    q_GTD: Tensor,
    k_GTD: Tensor | None,
    v_GTD: Tensor,
    out_GTD: Tensor,
    top_GT1: Tensor,
    denom_GT1: Tensor,
    d_out_GTD: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor | None, Tensor]:
    dtype, width = top_GT1.dtype, q_GTD.shape[-1]
    dq_GTD, dv_GTD = q_GTD.new_empty(q_GTD.shape), v_GTD.new_empty(v_GTD.shape)
    dk_GTD = None if k_GTD is None else k_GTD.new_empty(k_GTD.shape)
    runs = _Runs(layout, q_GTD, is_shared=k_GTD is None)
    n_places, n_rows = layout.n_run_places, layout.at_once[0] * layout.n_tokens
    n_gathered, n_spare = _sizes(layout, q_GTD.dtype == dtype)
    n_keys = _sizes(layout, is_exact=False)[1] if dk_GTD is None else n_spare  # shared: those of keys are no result
    sizes = [n_places, n_gathered, n_spare, n_spare, n_keys, n_rows, n_places, n_places]
    dq_SD, gathered_TD, *spare, d_out_TD, dv_SD, dk_SD = scratch(q_GTD, dtype, [(n, width) for n in sizes])
    for group in runs.heads():
        heads = _Heads(q_GTD[group], None if k_GTD is None else k_GTD[group], v_GTD[group], dtype)
        results = [x[group].flatten(0, 1) for x in (dq_GTD, dv_GTD, dq_GTD if dk_GTD is None else dk_GTD)]
        totals = [_sums(result, memory) for result, memory in zip(results, spare, strict=True)]
        out_TD, top_T1, denom_T1, d_TD = (x[group].flatten(0, 1) for x in (out_GTD, top_GT1, denom_GT1, d_out_GTD))
        alone_T1, d_out_rows = denom_T1 == 0, d_out_TD[: len(denom_T1)]
        # Probabilities are weight / sum: the division goes to where there are D numbers, not W.
        torch.div(d_TD, denom_T1.masked_fill(alone_T1, 1), out=d_out_rows)
        delta_T1 = torch.mul(d_out_rows, out_TD, out=dq_SD[: len(d_out_rows)]).sum(dim=-1, keepdim=True)
        for run, tiles in runs.of(group, dtype):
            dq, dv, dk = dq_SD[: run.n_places], dv_SD[: run.n_key_places], dk_SD[: run.n_key_places]
            if run.is_first:
                by_place = (dq, dv[run.own], dk[run.own])
                totals = [run.total_by_token(x, total) for x, total in zip(by_place, totals, strict=True)]
            _backward_run(run, heads, tiles, (d_out_rows, top_T1, delta_T1), dq, dk, dv)
            run.add_by_token(totals[0], dq, gathered_TD)
            run.add_keys_by_token(totals[1], dv, gathered_TD)
            run.add_keys_by_token(totals[2], dk, gathered_TD)
        _finish(heads, totals, results, d_out_rows, alone_T1)
    return dq_GTD, dk_GTD, dv_GTD


def _finish(heads: _Heads, totals: list[Tensor], results: list[Tensor], d_out_TD: Tensor, alone_T1: Tensor) -> None:
    """From the sums over rounds to the gradients of queries, values and keys."""
    dq_TD, dv_TD, dk_TD = totals
    for start in range(0, len(dq_TD), FINISH_TOKENS):
        t = slice(start, start + FINISH_TOKENS)
        dq = dq_TD[t].mul_(1 / LOG2_E)  # the keys that it was made with carry log2(e)
        if heads.is_shared:
            dq.add_(key_gradient_of_query(heads.q[t], dk_TD[t], heads.key_scale[t]))
        results[0][t] = dq
        torch.addcmul(dv_TD[t], alone_T1[t].to(dq.dtype), d_out_TD[t], out=results[1][t])
    if not heads.is_shared:
        results[2].copy_(dk_TD)


def _backward_run(
    run: Run,
    heads: _Heads,
    tiles: list[tuple[Tile, _TileMemory]],
    by_token: tuple[Tensor, Tensor, Tensor],
    dq_SD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Fills in the gradients of the queries by place, and of keys and values by key place.

    `by_token`: the gradient of the output divided by the sum of weights, top, delta = <output, that gradient>.
    """
    dq_CLD = by_chunk(dq_SD, run.layout.chunk_len)
    for tile, memory in tiles:
        memory.gather(heads, run, tile)
        for values, rows in zip(by_token, (memory.d_out_rows, memory.top_rows, memory.delta_rows), strict=True):
            torch.index_select(values, 0, run.query_rows[tile.places], out=rows)
        memory.score(run, tile)
        memory.weigh(heads.is_bounded)
        torch.bmm(memory.d_out, memory.v.mT, out=memory.d_scores)
        dropped = memory.weights
        if run.layout.dropout:
            keep = run.keep(tile)
            memory.d_scores.mul_(keep)
            dropped = torch.mul(memory.weights, keep, out=memory.scratch)
        memory.d_scores.sub_(memory.delta).mul_(memory.weights)
        if run.has_padding(tile):  # its places stand for no query, whatever they hold
            for x in (memory.d_out, memory.d_scores, dropped):
                x.masked_fill_(run.is_padding_CL1[tile.chunks], 0)
        tile.put_windows(dv_SD, torch.bmm(dropped.mT, memory.d_out, out=memory.d_window))
        tile.put_windows(dk_SD, torch.bmm(memory.d_scores.mT, memory.q, out=memory.d_window))
        torch.bmm(memory.d_scores, memory.k, out=dq_CLD[tile.chunks])
