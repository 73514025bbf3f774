"""Attention within chunks of a sorted sequence: sort -> chunk -> attend -> unsort, on any device.

The portable fast path of LSH attention and all of local attention (where the order is the identity and there is
one round). What is special about it:

- One autograd Function with a hand-written backward. Rounds are merged by a running maximum and sum in the
  forward; the backward recomputes probabilities from the totals, so that nothing of size R*T*D is ever kept.
- Work goes by tiles of a few chunks, gathered from memory by the sort order and small enough to stay in cache.
- Visibility is decided by ORIGINAL position, so that one comparison does causality, padding and self at once.

Axes: G batch times heads, R hash rounds, T tokens, D head dim, C chunks of one round, L chunk length,
S = C*L places of one round, N chunks in a tile, W tokens visible from one chunk (its window).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reformer.lsh.reference import SELF_PENALTY

# A tile's scores are N * L * W numbers. 1 MiB of fp32 stays in the second-level cache of current CPUs (half and
# twice as much are within 10%, measured); a GPU wants few, large launches.
TILE_SCORES = {"cpu": 2**18, "cuda": 2**26}


@dataclass(frozen=True)
class Layout:
    """Where every token stands and what it may see. `order` and `inverse` are those of `sort_by_bucket`."""

    order_GRS: Tensor
    """int32 [G, R, S]: the token at each sorted place; T and above at padding."""
    inverse_GRT: Tensor
    """int32 [G, R, T]: the sorted place of each token."""
    chunk_len: int
    causal: bool
    is_lsh: bool
    """LSH: rounds stand in a circle, one behind the other, and a token sees itself only if it sees nothing else.
    Local: nothing stands before the first and behind the last chunk, and a token sees itself like any other."""
    key_mask_GT: Tensor | None = None
    """bool [G, T], True at tokens that others may see."""
    segment_ids_GT: Tensor | None = None
    """integer [G, T]: tokens of different segments do not see each other."""
    buckets_GRT: Tensor | None = None
    """Given when a token sees only its own bucket."""
    duplicate_correction: bool = False
    """Whether each of N_ij occurrences of a key counts as 1 / N_ij (eq. 16 of the paper)."""

    @property
    def n_tokens(self) -> int:
        return self.inverse_GRT.shape[-1]

    @property
    def n_rounds(self) -> int:
        return self.order_GRS.shape[1]

    @property
    def n_places(self) -> int:
        return self.order_GRS.shape[-1]

    @property
    def n_chunks(self) -> int:
        """Chunks of one round."""
        return self.n_places // self.chunk_len

    @property
    def n_halo(self) -> int:
        """Places around a round that its ends see."""
        return sum(self.reach) * self.chunk_len

    @property
    def reach(self) -> tuple[int, int]:
        """Chunks visible before and after the own one; in a small circle no chunk is visible twice."""
        if not self.is_lsh:
            return 1, 0 if self.causal else 1
        others = self.n_rounds * self.n_chunks - 1
        return min(1, others), 0 if self.causal else min(1, max(0, others - 1))


def by_head(x_BT: Tensor | None, n_heads: int, dtype: torch.dtype | None = None) -> Tensor | None:
    """[B, T] -> [B*H, T], without a copy of the data."""
    if x_BT is None:
        return None
    return x_BT.to(dtype or x_BT.dtype)[:, None].expand(-1, n_heads, -1).flatten(0, 1)


def chunked_attention(q_GTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, layout: Layout) -> Tensor:
    """Attention output [G, T, D] under `layout`; scores are q.k as given, statistics in fp32 or better."""
    return _ChunkedAttention.apply(q_GTD, k_GTD, v_GTD, layout)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):  # the dtypes below are chosen with care
            out, top, norm = _forward(q, k, v, layout)
        ctx.save_for_backward(q, k, v, out, top, norm)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        with torch.autocast(d_out.device.type, enabled=False):
            q, k, v, out, top, norm = ctx.saved_tensors
            dq, dk, dv = _backward(q, k, v, out, top, norm, d_out, ctx.layout)
        return dq, dk, dv, None


def _forward(q_GTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, T, D] and, over all rounds, the largest score and the sum of exp(score - largest) [G, T].

    The two are kept apart: their logsumexp would lose the sum to rounding where the largest is the self penalty.
    """
    dtype = torch.promote_types(q_GTD.dtype, torch.float32)
    out_GTD = torch.empty_like(v_GTD)
    top_GT, norm_GT = (q_GTD.new_empty(q_GTD.shape[:2], dtype=dtype) for _ in range(2))
    # One set of buffers for all rounds: fresh memory costs a page fault per 4 KiB, which was a fifth of the time.
    buffers = [q_GTD.new_empty(layout.n_places, width, dtype=dtype) for width in (q_GTD.shape[-1], 1, 1)]
    for group in range(q_GTD.shape[0]):
        for r in range(layout.n_rounds):
            _forward_round(_Round(layout, group, r), q_GTD[group], k_GTD[group], v_GTD[group], *buffers)
            out, top, norm = (x.index_select(0, layout.inverse_GRT[group, r]) for x in buffers)
            if r == 0:
                total_out, total_top, total_norm = out, top, norm
            else:
                new_top = torch.maximum(total_top, top)
                old, new = (total_top - new_top).exp_(), (top - new_top).exp_()
                total_out.mul_(old).addcmul_(out, new)
                total_norm.mul_(old).addcmul_(norm, new)
                total_top = new_top
        out_GTD[group] = total_out.div_(total_norm)
        top_GT[group], norm_GT[group] = total_top[:, 0], total_norm[:, 0]
    return out_GTD, top_GT, norm_GT


def _forward_round(
    round_: "_Round", q_TD: Tensor, k_TD: Tensor, v_TD: Tensor, out_SD: Tensor, top_S1: Tensor, norm_S1: Tensor
) -> None:
    """Fills in, by sorted place, the largest score, and the sums of weights and of weighted values."""
    dtype = out_SD.dtype
    for tile in round_.tiles():
        q = round_.queries(q_TD, tile, dtype)
        k, v = round_.keys(k_TD, tile, dtype), round_.keys(v_TD, tile, dtype)
        out, top, norm = (x[tile.places].view(*q.shape[:2], -1) for x in (out_SD, top_S1, norm_S1))
        scores = round_.masked_scores(q, k, tile)
        torch.amax(scores, dim=-1, keepdim=True, out=top)
        weights = scores.sub_(top).exp_()
        torch.sum(weights, dim=-1, keepdim=True, out=norm)
        torch.bmm(weights, v, out=out)


def _backward(
    q_GTD: Tensor,
    k_GTD: Tensor,
    v_GTD: Tensor,
    out_GTD: Tensor,
    top_GT: Tensor,
    norm_GT: Tensor,
    d_out_GTD: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, width = top_GT.dtype, q_GTD.shape[-1]
    dq_GTD, dk_GTD, dv_GTD = (torch.zeros_like(x, dtype=dtype) for x in (q_GTD, k_GTD, v_GTD))
    dq_SD = top_GT.new_empty(layout.n_places, width)
    dk_SD, dv_SD = (top_GT.new_empty(layout.n_places + layout.n_halo, width) for _ in range(2))
    for group in range(q_GTD.shape[0]):
        # Probabilities are exp(score - top) / norm: the division goes to where there are D numbers, not W.
        d_out_TD = d_out_GTD[group].to(dtype) / norm_GT[group][:, None]
        delta_T = (d_out_TD * out_GTD[group]).sum(dim=-1)
        inputs = q_GTD[group], k_GTD[group], v_GTD[group], d_out_TD, top_GT[group], delta_T
        for r in range(layout.n_rounds):
            round_ = _Round(layout, group, r)
            _backward_round(round_, *inputs, dq_SD, dk_SD.zero_(), dv_SD.zero_())
            dq_GTD[group] += dq_SD.index_select(0, layout.inverse_GRT[group, r])
            round_.add_key_gradient(dk_GTD[group], dk_SD)
            round_.add_key_gradient(dv_GTD[group], dv_SD)
    return dq_GTD.to(q_GTD.dtype), dk_GTD.to(k_GTD.dtype), dv_GTD.to(v_GTD.dtype)


def _backward_round(
    round_: "_Round",
    q_TD: Tensor,
    k_TD: Tensor,
    v_TD: Tensor,
    d_out_TD: Tensor,
    top_T: Tensor,
    delta_T: Tensor,
    dq_SD: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Fills in, by sorted place, the gradients of the round's queries, and adds those of its keys and values."""
    dtype = top_T.dtype
    for tile in round_.tiles():
        q, d_out = round_.queries(q_TD, tile, dtype), round_.queries(d_out_TD, tile, dtype)
        k, v = round_.keys(k_TD, tile, dtype), round_.keys(v_TD, tile, dtype)
        top, delta = (round_.queries(x, tile, dtype)[..., None] for x in (top_T, delta_T))
        weights = round_.masked_scores(q, k, tile).sub_(top).exp_()
        if tile.places.stop > round_.layout.n_tokens:  # places of padding stand for no query
            weights.masked_fill_((round_.query_position[tile.places] >= len(q_TD)).view(top.shape), 0)
        round_.add_windows(dv_SD, torch.bmm(weights.mT, d_out), tile)
        d_scores = torch.bmm(d_out, v.mT).sub_(delta).mul_(weights)
        if round_.layout.is_lsh:
            round_.own_diagonal(d_scores).zero_()  # the self score is a constant
        torch.bmm(d_scores, k, out=dq_SD[tile.places].view_as(q))
        round_.add_windows(dk_SD, torch.bmm(d_scores.mT, q), tile)


@dataclass(frozen=True)
class _Tile:
    """Chunks first..first+count of a round."""

    first: int
    count: int
    chunk_len: int

    @property
    def places(self) -> slice:
        return slice(self.first * self.chunk_len, (self.first + self.count) * self.chunk_len)


class _Round:
    """One round of one head in sorted order, with a halo: the chunks around it that its ends see."""

    def __init__(self, layout: Layout, group: int, round_: int) -> None:
        self.layout, self.group, self.round = layout, group, round_
        L = layout.chunk_len
        order_RS = layout.order_GRS[group]
        before, after = layout.reach
        halo_before = order_RS[round_ - 1, layout.n_places - before * L :]
        halo_after = order_RS[(round_ + 1) % layout.n_rounds, : after * L]
        self.n_before, self.window = before * L, (before + 1 + after) * L
        self.own = slice(self.n_before, self.n_before + layout.n_places)

        self.query_position = order_RS[round_]
        key_position = torch.cat([halo_before, self.query_position, halo_after])
        last = layout.n_tokens - 1
        self.query_rows, self.key_rows = self.query_position.clamp(max=last), key_position.clamp(max=last)
        hidden = key_position > last
        if not layout.is_lsh:
            hidden[: self.own.start] = hidden[self.own.stop :] = True
        if layout.key_mask_GT is not None:
            hidden |= ~layout.key_mask_GT[group][self.key_rows]
        self.key_position = key_position.masked_fill_(hidden, layout.n_tokens)
        self.labels = self._labels()

    def _labels(self) -> list[Tensor]:
        """Integers by key place that must equal the query's for the key to be visible: segment, bucket."""
        layout, labels = self.layout, []
        if layout.segment_ids_GT is not None:
            labels.append(layout.segment_ids_GT[self.group][self.key_rows])
        if layout.buckets_GRT is not None:
            bucket = layout.buckets_GRT[self.group, self.round][self.key_rows].to(torch.int32)
            if layout.n_rounds > 1:  # the halo belongs to other rounds
                bucket[: self.own.start] = bucket[self.own.stop :] = -1
            labels.append(bucket)
        return labels

    def tiles(self) -> Iterator[_Tile]:
        """The round's chunks in runs of as many as TILE_SCORES allows."""
        L = self.layout.chunk_len
        count = max(1, TILE_SCORES.get(self.key_rows.device.type, TILE_SCORES["cuda"]) // (L * self.window))
        n_chunks = self.layout.n_chunks
        for first in range(0, n_chunks, count):
            yield _Tile(first, min(count, n_chunks - first), L)

    def queries(self, x_T: Tensor, tile: _Tile, dtype: torch.dtype) -> Tensor:
        """Rows of x [T, …] at the tile's places, [N, L, …]."""
        rows = x_T.index_select(0, self.query_rows[tile.places]).to(dtype)
        return rows.view(tile.count, tile.chunk_len, *x_T.shape[1:])

    def keys(self, x_T: Tensor, tile: _Tile, dtype: torch.dtype) -> Tensor:
        """Rows of x [T, …] in the windows of the tile's chunks: overlapping views [N, W, …] of one gather."""
        rows = x_T.index_select(0, self.key_rows[self._span(tile)]).to(dtype)
        return self._windows(rows, tile)

    def _span(self, tile: _Tile) -> slice:
        return slice(tile.places.start, tile.places.stop + self.window - tile.chunk_len)

    def _windows(self, rows: Tensor, tile: _Tile) -> Tensor:
        shape = (tile.count, self.window, *rows.shape[1:])
        return rows.as_strided(shape, (tile.chunk_len * rows.stride(0), *rows.stride()))

    def masked_scores(self, q_NLD: Tensor, k_NWD: Tensor, tile: _Tile) -> Tensor:
        """Scores [N, L, W] with -inf at what is not visible and, under LSH, the self penalty at self."""
        scores = torch.bmm(q_NLD, k_NWD.mT)
        own = self.query_position[tile.places].view(tile.count, tile.chunk_len, 1)
        key = self._windows(self.key_position[self._span(tile)], tile)[:, None, :]
        if self.layout.causal:
            blocked = key >= own if self.layout.is_lsh else key > own
        else:
            blocked = key >= self.layout.n_tokens
            if self.layout.is_lsh:
                blocked = blocked | (key == own)
        for label in self.labels:
            query_label = label[self.own][tile.places].view(tile.count, tile.chunk_len, 1)
            blocked = blocked | (self._windows(label[self._span(tile)], tile)[:, None, :] != query_label)
        self_scores = self.own_diagonal(scores)
        penalised = torch.full_like(self_scores, SELF_PENALTY) if self.layout.is_lsh else self_scores.clone()
        scores.masked_fill_(blocked, -torch.inf)
        if self.layout.duplicate_correction:
            scores.sub_(self._multiplicity(tile).to(scores.dtype).log_())
        self.own_diagonal(scores).copy_(penalised)
        return scores

    def own_diagonal(self, scores_NLW: Tensor) -> Tensor:
        """The view [N, L] of the scores of each token with itself in its own chunk."""
        return scores_NLW[:, :, self.n_before :].diagonal(dim1=1, dim2=2)

    def _multiplicity(self, tile: _Tile) -> Tensor:
        """N_ij [N, L, W]: how often, over all rounds, the tile's queries find their keys in their windows."""
        layout, L = self.layout, self.layout.chunk_len
        before, after = layout.reach
        n_total = layout.n_rounds * layout.n_chunks
        chunk_RT = layout.inverse_GRT[self.group] // L
        chunk_RT = chunk_RT + layout.n_chunks * torch.arange(layout.n_rounds, device=chunk_RT.device)[:, None]
        query_rows = self.query_rows[tile.places]
        key_rows = self.key_rows[self._span(tile)]
        count = torch.zeros((), dtype=torch.int32, device=chunk_RT.device)
        for query_round in range(layout.n_rounds):
            query_chunk = chunk_RT[query_round][query_rows].view(tile.count, L, 1)
            for key_round in range(layout.n_rounds):
                key_chunk = self._windows(chunk_RT[key_round][key_rows], tile)[:, None, :]
                if layout.buckets_GRT is not None and key_round != query_round:
                    continue
                offset = (query_chunk - key_chunk + after) % n_total
                found = offset <= before + after
                if layout.buckets_GRT is not None:
                    bucket = layout.buckets_GRT[self.group, query_round]
                    found &= self._windows(bucket[key_rows], tile)[:, None, :] == bucket[query_rows].view(
                        tile.count, L, 1
                    )
                count = count + found
        return count.clamp_(min=1)

    def add_windows(self, total_SD: Tensor, grad_NWD: Tensor, tile: _Tile) -> None:
        """Add gradients by window [N, W, D] to gradients by place; windows overlap by whole chunks."""
        L = tile.chunk_len
        for part in range(self.window // L):
            start = tile.places.start + part * L
            total_SD[start : start + tile.count * L].view(tile.count, L, -1).add_(
                grad_NWD[:, part * L : (part + 1) * L]
            )

    def add_key_gradient(self, total_TD: Tensor, grad_SD: Tensor) -> None:
        """Add gradients by place to gradients by token: the round's own by a gather, then the halo's rows."""
        total_TD += grad_SD[self.own].index_select(0, self.layout.inverse_GRT[self.group, self.round])
        if self.layout.is_lsh:
            for halo in (slice(0, self.own.start), slice(self.own.stop, None)):
                total_TD.index_add_(0, self.key_rows[halo], grad_SD[halo])
