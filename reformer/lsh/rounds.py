"""Who stands where and who sees whom: the index arithmetic of attention within chunks of a sorted sequence.

A `Layout` describes all heads and rounds of a call, a `Round` one round of one head in sorted order, a `Tile` a few
of its chunks. Visibility is decided by ORIGINAL position, so that one comparison does causality and self at once.
It is kept as factors of 0 and 1 in floating point: on CPUs a vectorised product is ten times faster than a masked
fill (measured), and exp never meets an infinity.

Axes: G batch times heads, R hash rounds, T tokens, D head dim, C chunks of one round, L chunk length,
S = C*L places of one round, N chunks in a tile, W tokens visible from one chunk (its window).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from reformer.lsh.dropout import keep_factor_of_words, key_words, query_words

# A tile's scores are N * L * W numbers. On a CPU 512 KiB of fp32 for each thread stay in its second-level cache with
# what else the tile needs (twice as many take 1.3 times as long, measured); a GPU wants few, large launches.
TILE_SCORES_PER_THREAD = 2**17
TILE_SCORES_GPU = 2**26

MAX_EXACT_FLOAT32 = 2**24
"""Positions up to here are exact in fp32."""


def by_head(x_BT: Tensor, n_heads: int) -> Tensor:
    """[B, T] -> [B*H, T]."""
    return x_BT[:, None].expand(-1, n_heads, -1).flatten(0, 1)


def by_chunk(x_S: Tensor, chunk_len: int) -> Tensor:
    """[C*L, …] by place -> a view [C, L, …]."""
    return x_S.view(-1, chunk_len, *x_S.shape[1:])


def by_window(x_S: Tensor, chunk_len: int, window: int) -> Tensor:
    """[C*L + halo, …] by key place -> overlapping views [C, W, …] without a copy."""
    n_chunks = (len(x_S) - window) // chunk_len + 1
    strides = (chunk_len * x_S.stride(0), *x_S.stride())
    return x_S.as_strided((n_chunks, window, *x_S.shape[1:]), strides, x_S.storage_offset())


def renumbered(labels: Tensor) -> Tensor:
    """The same labels as 0, 1, 2, …: whatever integers they were, they are exact as floating-point numbers now."""
    return torch.unique(labels, return_inverse=True)[1]


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
    """LSH: rounds stand in a circle, one behind the other, and a token does not see itself.
    Local: nothing stands before the first and behind the last chunk, and a token sees itself like any other."""
    key_mask_GT: Tensor | None = None
    """bool [G, T], True at tokens that may be seen."""
    segment_ids_GT: Tensor | None = None
    """`renumbered` [G, T]: tokens of different segments do not see each other."""
    buckets_GRT: Tensor | None = None
    """`renumbered` [G, R, T], given when a token sees only its own bucket."""
    duplicate_correction: bool = False
    """Whether each of N_ij occurrences of a key counts as 1 / N_ij (eq. 16 of the paper)."""
    dropout: float = 0.0
    """Probability that a weight is dropped after the softmax of its round."""
    dropout_keys_G: Tensor | None = None
    """Integers in the range of int32, given with dropout: what is dropped is a function of them."""

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
    def reach(self) -> tuple[int, int]:
        """Chunks visible before and after the own one; in a small circle no chunk is visible twice."""
        if not self.is_lsh:
            return 1, 0 if self.causal else 1
        others = self.n_rounds * self.n_chunks - 1
        return min(1, others), 0 if self.causal else min(1, max(0, others - 1))

    @property
    def n_halo(self) -> int:
        """Places around a round that its ends see."""
        return sum(self.reach) * self.chunk_len

    @property
    def own(self) -> slice:
        """Where a round itself stands among its key places."""
        before = self.reach[0] * self.chunk_len
        return slice(before, before + self.n_places)

    def total_by_token(self, x_SD: Tensor, memory_TD: Tensor) -> Tensor:
        """Where the sum over the rounds of values by place is made: in the memory that is given. Local attention's only
        round is in the original order: there it is the values themselves."""
        return memory_TD if self.is_lsh else x_SD[: self.n_tokens]

    @property
    def window(self) -> int:
        """Tokens visible from one chunk."""
        return self.n_halo + self.chunk_len

    def tiles(self) -> "list[Tile]":
        """The chunks of a round in runs of as many as fit a tile; only the last may be smaller."""
        on_cpu = self.order_GRS.device.type == "cpu"
        scores = TILE_SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else TILE_SCORES_GPU
        count = min(self.n_chunks, max(1, scores // (self.chunk_len * self.window)))
        return [
            Tile(first, min(count, self.n_chunks - first), self.chunk_len, self.window)
            for first in range(0, self.n_chunks, count)
        ]


@dataclass(frozen=True)
class Tile:
    """Some neighbouring chunks of a round, [N, L] places, and the keys [N, W] of their windows."""

    first: int
    count: int
    chunk_len: int
    window: int

    @cached_property
    def chunks(self) -> slice:
        return slice(self.first, self.first + self.count)

    @cached_property
    def places(self) -> slice:
        return slice(self.first * self.chunk_len, (self.first + self.count) * self.chunk_len)

    @cached_property
    def key_places(self) -> slice:
        """The same in a sequence that has the halo around it."""
        return slice(self.places.start, self.places.stop + self.window - self.chunk_len)

    def put_windows(self, total_SD: Tensor, x_NWD: Tensor) -> None:
        """Sum values by window into values by key place (of the whole round); windows overlap by whole chunks.

        The last chunks of the windows stand where no earlier tile has put anything: the sums start with them.
        """
        newest = self.window - self.chunk_len
        if not self.first:
            total_SD[:newest].zero_()
        for offset in range(newest, -1, -self.chunk_len):
            rows = by_chunk(total_SD[self.places.start + offset : self.places.stop + offset], self.chunk_len)
            part = x_NWD[:, offset : offset + self.chunk_len]
            rows.copy_(part) if offset == newest else rows.add_(part)


class Round:
    """One round of one head in sorted order, with a halo: the chunks of neighbouring rounds that its ends see."""

    def __init__(self, layout: Layout, group: int, round_: int, dtype: torch.dtype) -> None:
        self.layout, self.group, self.round, self.dtype = layout, group, round_, dtype
        order_RS = layout.order_GRS[group]
        last = layout.n_tokens - 1
        before, after = (chunks * layout.chunk_len for chunks in layout.reach)
        self.own = layout.own
        query_token = order_RS[round_]
        key_token = torch.cat(
            [
                order_RS[round_ - 1, layout.n_places - before :],
                query_token,
                order_RS[(round_ + 1) % layout.n_rounds, :after],
            ]
        )
        self.query_rows, self.key_rows = query_token.clamp(max=last), key_token.clamp(max=last)
        self.inverse = layout.inverse_GRT[group, round_]

        position_dtype = dtype if layout.n_tokens < MAX_EXACT_FLOAT32 else torch.float64
        hidden = self._hidden(key_token)
        self.is_padding_CL1 = self._of_queries(query_token > last)
        self.position_CL1 = self._of_queries(query_token.to(position_dtype))
        self.key_position_C1W = self._of_keys(key_token.masked_fill(hidden, layout.n_tokens).to(position_dtype))
        self.key_seen_C1W = None if layout.causal else self._of_keys((~hidden).to(dtype))
        self.labels = [(self._of_queries(x[self.own]), self._of_keys(x)) for x in self._labels(position_dtype)]
        if layout.dropout:
            assert layout.dropout_keys_G is not None
            key = layout.dropout_keys_G[group]
            self.query_word_CL1 = self._of_queries(query_words(key, round_, query_token))
            self.key_word_C1W = self._of_keys(key_words(key, round_, key_token))

    def _of_queries(self, x_S: Tensor) -> Tensor:
        """[S] by place -> [C, L, 1]."""
        return by_chunk(x_S, self.layout.chunk_len)[..., None]

    def _of_keys(self, x_S: Tensor) -> Tensor:
        """[S + halo] by key place -> [C, 1, W]."""
        return by_window(x_S, self.layout.chunk_len, self.layout.window)[:, None, :]

    def _hidden(self, key_token: Tensor) -> Tensor:
        """True at key places that no one sees: padding, masked tokens, and what stands around a local sequence."""
        hidden = key_token >= self.layout.n_tokens
        if not self.layout.is_lsh:
            hidden[: self.own.start] = hidden[self.own.stop :] = True
        if self.layout.key_mask_GT is not None:
            hidden |= ~self.layout.key_mask_GT[self.group][self.key_rows]
        return hidden

    def _labels(self, dtype: torch.dtype) -> list[Tensor]:
        """Numbers by key place that must equal the query's for the key to be visible: segment, bucket."""
        layout, labels = self.layout, []
        if layout.segment_ids_GT is not None:
            labels.append(layout.segment_ids_GT[self.group][self.key_rows].to(dtype))
        if layout.buckets_GRT is not None:
            bucket = layout.buckets_GRT[self.group, self.round][self.key_rows].to(dtype)
            if layout.n_rounds > 1:  # the halo belongs to other rounds
                bucket[: self.own.start] = bucket[self.own.stop :] = -1
            labels.append(bucket)
        return labels

    def visibility(self, tile: Tile, factor: Tensor, scratch: Tensor) -> Tensor:
        """How much each key counts for each query: 0 where it is not visible, 1 (or 1 / N_ij) elsewhere.

        Both [N, L, W]; `factor` is filled in and returned, `scratch` is written to.
        """
        own, key = self.position_CL1[tile.chunks], self.key_position_C1W[tile.chunks]
        if self.layout.causal:
            torch.lt(key, own, out=factor) if self.layout.is_lsh else torch.le(key, own, out=factor)
        else:
            torch.ne(key, own, out=factor) if self.layout.is_lsh else factor.fill_(1)
            assert self.key_seen_C1W is not None
            factor.mul_(self.key_seen_C1W[tile.chunks])
        for query_label, key_label in self.labels:
            factor.mul_(torch.eq(key_label[tile.chunks], query_label[tile.chunks], out=scratch))
        if self.layout.duplicate_correction:
            factor.div_(self._multiplicity(tile))
        return factor

    def keep(self, tile: Tile) -> Tensor:
        """Factors of dropout [N, L, W] for the weights of a tile."""
        words = self.query_word_CL1[tile.chunks], self.key_word_C1W[tile.chunks]
        return keep_factor_of_words(*words, self.layout.dropout, self.dtype)

    def _multiplicity(self, tile: Tile) -> Tensor:
        """N_ij [N, L, W]: how often, over all rounds, the tile's queries find their keys in their windows."""
        layout = self.layout
        query_rows, key_rows = self.query_rows[tile.places], self.key_rows[tile.key_places]

        def of_pairs(x_T: Tensor) -> tuple[Tensor, Tensor]:
            return self._of_queries(x_T[query_rows]), self._of_keys(x_T[key_rows])

        rounds = torch.arange(layout.n_rounds, device=query_rows.device)
        chunk_RT = layout.inverse_GRT[self.group] // layout.chunk_len + layout.n_chunks * rounds[:, None]
        chunks = [of_pairs(chunk_T) for chunk_T in chunk_RT]
        count = torch.zeros((), dtype=self.dtype, device=query_rows.device)
        for r, (query_chunk, key_chunk) in enumerate(chunks):
            if layout.buckets_GRT is None:
                for _, key_chunk_of_any_round in chunks:
                    count = count + self._in_reach(query_chunk, key_chunk_of_any_round)
            else:
                query_bucket, key_bucket = of_pairs(layout.buckets_GRT[self.group, r])
                count = count + ((query_bucket == key_bucket) & self._in_reach(query_chunk, key_chunk))
        return count.clamp_(min=1)

    def _in_reach(self, query_chunk: Tensor, key_chunk: Tensor) -> Tensor:
        """Whether a chunk sees another, chunks counted through all rounds and round the circle."""
        n_total = self.layout.n_rounds * self.layout.n_chunks
        before, after = self.layout.reach
        return (query_chunk - key_chunk + after) % n_total <= before + after

    def add_by_token(self, total_TD: Tensor, x_SD: Tensor, scratch_TD: Tensor) -> None:
        """Add values by place to the sum over rounds by token; the first round starts the sum."""
        if not self.layout.is_lsh:
            if total_TD.data_ptr() != x_SD.data_ptr():  # see Layout.total_by_token
                total_TD.copy_(x_SD[: self.layout.n_tokens])
        elif self.round == 0:
            torch.index_select(x_SD, 0, self.inverse, out=total_TD)
        else:
            total_TD += torch.index_select(x_SD, 0, self.inverse, out=scratch_TD)

    def add_keys_by_token(self, total_TD: Tensor, x_SD: Tensor, scratch_TD: Tensor) -> None:
        """The same by key place: the round's own by a gather, then the halo's few rows."""
        self.add_by_token(total_TD, x_SD[self.own], scratch_TD)
        if self.layout.is_lsh:
            for halo in (slice(0, self.own.start), slice(self.own.stop, None)):
                total_TD.index_add_(0, self.key_rows[halo], x_SD[halo])
