"""Positions and visibility: the index arithmetic of attention within chunks of a sorted sequence.

A `Layout` describes all heads and rounds of a call, a `Run` a round of a head in sorted order (of short sequences
several rounds of several heads, one behind the other), a `Tile` a few of its chunks. Visibility is decided by
ORIGINAL position, so that one comparison does causality and self at once. It is kept as factors of 0 and 1 in floating
point: on CPUs a vectorised product is ten times faster than a masked fill (measured), and exp never meets an infinity.

Axes: G batch times heads, R hash rounds, T tokens, D head dim, C chunks of a run, L chunk length, S = C*L its places,
N chunks in a tile, W tokens visible from one chunk (its window), g heads and r rounds of a run, K key places of one of
these heads.
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

RUN_PLACES, RUN_PLACES_GPU = 2**13, 2**17
"""A run combines several rounds or heads up to so many places only: short rounds cost little but the calls that they
take."""

MAX_EXACT_FLOAT32 = 2**24
"""Positions up to here are exact in fp32."""


def by_head(x_BT: Tensor, n_heads: int) -> Tensor:
    """[B, T] -> [B*H, T], in memory of its own: a backward reads it again, when x may hold the next batch."""
    return x_BT.clone()[:, None].expand(-1, n_heads, -1).flatten(0, 1)


def by_chunk(x_S: Tensor, chunk_len: int) -> Tensor:
    """[C*L, …] by place -> a view [C, L, …]."""
    return x_S.view(-1, chunk_len, *x_S.shape[1:])


def by_window(x_S: Tensor, chunk_len: int, window: int) -> Tensor:
    """[C*L + halo, …] by key place -> overlapping views [C, W, …] without a copy."""
    n_chunks = (len(x_S) - window) // chunk_len + 1
    strides = (chunk_len * x_S.stride(0), *x_S.stride())
    return x_S.as_strided((n_chunks, window, *x_S.shape[1:]), strides, x_S.storage_offset())


def renumbered(labels: Tensor) -> tuple[Tensor, int]:
    """The same labels as 0, 1, 2, …, and how many there are.

    Whatever integers they were, they are exact as floating-point numbers now.
    """
    different, numbers = torch.unique(labels, return_inverse=True)
    return numbers, len(different)


def circular_reach(n_chunks: int, causal: bool) -> tuple[int, int]:
    """Chunks visible before and after the own one where so many stand in a circle; none is visible twice."""
    return min(1, n_chunks - 1), 0 if causal else min(1, max(0, n_chunks - 2))


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
        """Chunks visible before and after the own one."""
        if not self.is_lsh:
            return 1, 0 if self.causal else 1
        return circular_reach(self.n_rounds * self.n_chunks, self.causal)

    @property
    def n_halo(self) -> int:
        """Places around a round that its ends see."""
        return sum(self.reach) * self.chunk_len

    @property
    def at_once(self) -> tuple[int, int]:
        """Heads and rounds of a run; several heads only with all of their rounds."""
        most = RUN_PLACES if self.order_GRS.device.type == "cpu" else RUN_PLACES_GPU
        n_rounds = min(self.n_rounds, max(1, most // self.n_places))
        if n_rounds < self.n_rounds:
            return 1, n_rounds
        return min(len(self.order_GRS), max(1, most // (n_rounds * self.n_places + self.n_halo))), n_rounds

    @property
    def n_run_places(self) -> int:
        """Key places of the largest run."""
        n_heads, n_rounds = self.at_once
        return n_heads * (n_rounds * self.n_places + self.n_halo)

    @property
    def window(self) -> int:
        """Tokens visible from one chunk."""
        return self.n_halo + self.chunk_len

    def tiles(self, n_chunks: int) -> "list[Tile]":
        """So many chunks, as many as fit a tile at a time; only the last may be smaller."""
        on_cpu = self.order_GRS.device.type == "cpu"
        scores = TILE_SCORES_PER_THREAD * torch.get_num_threads() if on_cpu else TILE_SCORES_GPU
        count = min(n_chunks, max(1, scores // (self.chunk_len * self.window)))
        return [
            Tile(first, min(count, n_chunks - first), self.chunk_len, self.window)
            for first in range(0, n_chunks, count)
        ]


@dataclass(frozen=True)
class Tile:
    """Some neighbouring chunks of a run, [N, L] places, and the keys [N, W] of their windows."""

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
        """Sum values by window into values by key place (of the whole run); windows overlap by whole chunks.

        The last chunks of the windows stand where no earlier tile has put anything: the sums start with them.
        """
        newest = self.window - self.chunk_len
        if not self.first:
            total_SD[:newest].zero_()
        for offset in range(newest, -1, -self.chunk_len):
            rows = by_chunk(total_SD[self.places.start + offset : self.places.stop + offset], self.chunk_len)
            part = x_NWD[:, offset : offset + self.chunk_len]
            rows.copy_(part) if offset == newest else rows.add_(part)


class Run:
    """Some rounds of some heads in sorted order, with a halo: the chunks of neighbouring rounds that their ends see.

    Key places are, head by head, the halo before, the rounds, and the halo behind; queries stand at all of them but the
    first halo and the last. So between two heads there are chunks whose queries count for nothing, like padding.
    """

    def __init__(self, layout: Layout, heads: slice, rounds: slice, dtype: torch.dtype) -> None:
        self.layout, self.heads, self.dtype = layout, heads, dtype
        self.is_first = rounds.start == 0
        self.n_heads, self.n_rounds = heads.stop - heads.start, rounds.stop - rounds.start
        last = layout.n_tokens - 1
        before, after = (chunks * layout.chunk_len for chunks in layout.reach)
        self.of_head = slice(before, before + self.n_rounds * layout.n_places)
        self.n_head_places = self.of_head.stop + after
        self.own = slice(before, self.n_heads * self.n_head_places - after)
        """Where queries stand among the key places."""
        self.n_places, self.n_key_places = self.own.stop - before, self.n_heads * self.n_head_places
        self.n_chunks = self.n_places // layout.chunk_len
        order_gRS = layout.order_GRS[heads]
        halos = order_gRS[:, rounds.start - 1, layout.n_places - before :], order_gRS[:, rounds.stop % layout.n_rounds]
        token_gK = torch.cat([halos[0], order_gRS[:, rounds].flatten(1), halos[1][:, :after]], dim=1)
        rows_gK = token_gK.clamp(max=last)
        if self.n_heads > 1:
            rows_gK = rows_gK + self._by_head(layout.n_tokens)
        self.key_rows = rows_gK.flatten()
        self.query_rows = self.key_rows[self.own]
        self.inverse = self._inverse(layout.inverse_GRT[heads, rounds])

        key_token, halo = token_gK.flatten(), self._halo()
        query_token, is_padding = key_token[self.own], key_token[self.own] > last
        if self.n_heads > 1:
            is_padding = is_padding | halo[self.own]
        position_dtype = dtype if layout.n_tokens < MAX_EXACT_FLOAT32 else torch.float64
        hidden = self._hidden(key_token, halo)
        self.is_padding_CL1 = self._of_queries(is_padding)
        self.position_CL1 = self._of_queries(query_token.to(position_dtype))
        self.key_position_C1W = self._of_keys(key_token.masked_fill(hidden, layout.n_tokens).to(position_dtype))
        self.key_seen_C1W = None if layout.causal else self._of_keys((~hidden).to(dtype))
        labels = self._labels(rounds, halo)
        self.labels = [
            (self._of_queries(x[self.own]), self._of_keys(x)) for x in (x.to(position_dtype) for x in labels)
        ]
        if layout.dropout:
            self.query_word_CL1, self.key_word_C1W = self._words(rounds, key_token)

    def _by_head(self, distance: int) -> Tensor:
        """0, distance, 2 * distance, … for the heads, [g, 1]."""
        return torch.arange(self.n_heads, dtype=torch.int32, device=self.layout.order_GRS.device)[:, None] * distance

    def _by_round(self, rounds: slice) -> Tensor:
        """The number of its round for each key place, [g*K]; in the halo anything."""
        number_K = torch.arange(rounds.start, rounds.stop, dtype=torch.int32, device=self.key_rows.device)
        number_K = number_K.repeat_interleave(self.layout.n_places)
        halo = (self.of_head.start, self.n_head_places - self.of_head.stop)
        return torch.nn.functional.pad(number_K, halo).repeat(self.n_heads)

    def _halo(self) -> Tensor:
        """True at the halo's key places [g*K]."""
        halo_gK = torch.ones(self.n_heads, self.n_head_places, dtype=torch.bool, device=self.key_rows.device)
        halo_gK[:, self.of_head] = False
        return halo_gK.flatten()

    def _inverse(self, inverse_grT: Tensor) -> Tensor:
        """Where each token stands among the queries, round by round and in each of them head by head, [r*g*T]."""
        if self.n_heads == self.n_rounds == 1:
            return inverse_grT.flatten()
        starts = torch.arange(self.n_rounds, dtype=torch.int32, device=inverse_grT.device) * self.layout.n_places
        starts_gr = starts + self._by_head(self.n_head_places)
        return (inverse_grT + starts_gr[..., None]).transpose(0, 1).flatten()

    def _of_queries(self, x_S: Tensor) -> Tensor:
        """[S] by place -> [C, L, 1]."""
        return by_chunk(x_S, self.layout.chunk_len)[..., None]

    def _of_keys(self, x_S: Tensor) -> Tensor:
        """[S + halo] by key place -> [C, 1, W]."""
        return by_window(x_S, self.layout.chunk_len, self.layout.window)[:, None, :]

    def _hidden(self, key_token: Tensor, halo: Tensor) -> Tensor:
        """True at key places that no one sees: padding, masked tokens, and what stands around a local sequence."""
        hidden = key_token >= self.layout.n_tokens
        if not self.layout.is_lsh:
            hidden |= halo
        if self.layout.key_mask_GT is not None:
            hidden |= ~self.layout.key_mask_GT[self.heads].flatten()[self.key_rows]
        return hidden

    def _labels(self, rounds: slice, halo: Tensor) -> list[Tensor]:
        """Numbers by key place that must equal the query's for the key to be visible: segment, bucket."""
        layout, labels = self.layout, []
        if layout.segment_ids_GT is not None:
            labels.append(layout.segment_ids_GT[self.heads].flatten()[self.key_rows])
        if layout.buckets_GRT is not None:
            round_ = self._by_round(rounds)
            bucket = layout.buckets_GRT[self.heads].transpose(0, 1).flatten(1)[round_.long(), self.key_rows.long()]
            if layout.n_rounds > 1:  # the halo belongs to other rounds, and neighbours of one round are others
                bucket = (2 * bucket + round_ % 2).masked_fill(halo, -1)
            labels.append(bucket)
        return labels

    def _words(self, rounds: slice, key_token: Tensor) -> tuple[Tensor, Tensor]:
        """The words [C, L, 1] and [C, 1, W] of dropout, whose round is that of the query."""
        assert self.layout.dropout_keys_G is not None
        of_head = self.layout.dropout_keys_G[self.heads, None].expand(-1, self.n_head_places).flatten()
        key_CL1, round_CL1 = (self._of_queries(x[self.own]) for x in (of_head, self._by_round(rounds)))
        of_queries = query_words(key_CL1, round_CL1, self._of_queries(key_token[self.own]))
        return of_queries, key_words(key_CL1[:, :1], round_CL1[:, :1], self._of_keys(key_token))

    def has_padding(self, tile: Tile) -> bool:
        """Whether queries of this tile may count for nothing: of one head, the first at place n_tokens, where the first
        of its rounds ends."""
        layout = self.layout
        ends_in_padding = layout.n_places > layout.n_tokens
        return self.n_heads > 1 or (ends_in_padding and tile.places.stop > layout.n_tokens)

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

        def of_pairs(x_gT: Tensor) -> tuple[Tensor, Tensor]:
            return self._of_queries(x_gT.flatten()[query_rows]), self._of_keys(x_gT.flatten()[key_rows])

        rounds = torch.arange(layout.n_rounds, device=query_rows.device)
        chunk_gRT = layout.inverse_GRT[self.heads] // layout.chunk_len + layout.n_chunks * rounds[:, None]
        chunks = [of_pairs(chunk_gT) for chunk_gT in chunk_gRT.unbind(1)]
        count = torch.zeros((), dtype=self.dtype, device=query_rows.device)
        for r, (query_chunk, key_chunk) in enumerate(chunks):
            if layout.buckets_GRT is None:
                for _, key_chunk_of_any_round in chunks:
                    count = count + self._in_reach(query_chunk, key_chunk_of_any_round)
            else:
                query_bucket, key_bucket = of_pairs(layout.buckets_GRT[self.heads, r])
                count = count + ((query_bucket == key_bucket) & self._in_reach(query_chunk, key_chunk))
        return count.clamp_(min=1)

    def _in_reach(self, query_chunk: Tensor, key_chunk: Tensor) -> Tensor:
        """Whether a chunk sees another, chunks counted through all rounds and round the circle."""
        n_total = self.layout.n_rounds * self.layout.n_chunks
        before, after = self.layout.reach
        return (query_chunk - key_chunk + after) % n_total <= before + after

    def total_by_token(self, x_SD: Tensor, memory_TD: Tensor) -> Tensor:
        """Where the sum over the rounds of values by place is made, [g*T, D]: in the memory that is given. The only
        round of local attention is in the original order: of one head, the values themselves are the sum."""
        return memory_TD if self.layout.is_lsh or self.n_heads > 1 else x_SD[: self.layout.n_tokens]

    def add_by_token(self, total_TD: Tensor, x_SD: Tensor, scratch_TD: Tensor) -> None:
        """Add values by place to the sum [g*T, D] over rounds by token; the first round starts the sum."""
        if not self.layout.is_lsh:
            if total_TD.data_ptr() != x_SD.data_ptr():  # see total_by_token
                n_tokens = self.layout.n_tokens
                total_TD.view(-1, n_tokens, x_SD.shape[1]).copy_(by_window(x_SD, self.n_head_places, n_tokens))
            return
        is_total = self.is_first and self.n_rounds == 1
        by_token = torch.index_select(
            x_SD, 0, self.inverse, out=total_TD if is_total else scratch_TD[: len(self.inverse)]
        )
        if self.n_rounds > 1:
            of_rounds = by_token.view(self.n_rounds, *total_TD.shape)
            by_token = torch.sum(of_rounds, dim=0, out=total_TD) if self.is_first else of_rounds.sum(dim=0)
        if not self.is_first:
            total_TD += by_token

    def add_keys_by_token(self, total_TD: Tensor, x_SD: Tensor, scratch_TD: Tensor) -> None:
        """The same by key place: the rounds' own by a gather, then the halo's few rows."""
        self.add_by_token(total_TD, x_SD[self.own], scratch_TD)
        if self.layout.is_lsh:
            x_gKD, rows_gK = x_SD.view(self.n_heads, self.n_head_places, -1), self.key_rows.view(self.n_heads, -1)
            for halo in (slice(0, self.of_head.start), slice(self.of_head.stop, None)):
                total_TD.index_add_(0, rows_gK[:, halo].flatten(), x_gKD[:, halo].flatten(0, 1))
