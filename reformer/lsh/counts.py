"""How often LSH attention's rounds find each key for each query, for whole blocks of a short sequence at once.

Rounds add up: the sum over the rounds of exp(score) is exp(score) N_ij, with N_ij the number of times that their
chunks bring query i and key j together. So they all are one dense softmax whose weights count N_ij times
(README.md, section 13), and N is a product of two matrices of zeros and ones: the chunks that a query stands in, one
a round, and the chunks that see a key.

Axes: G batch times heads, R hash rounds, T tokens, C chunks of all rounds, g heads, L queries, W keys of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer.lsh.hashing import stable_order
from reformer.lsh.rounds import circular_reach


@dataclass(frozen=True)
class Counts:
    """Where each token stands, and which chunks see each other."""

    chunk_GRT: Tensor
    """int64 [G, R, T]: the chunk of each token, counted through all rounds."""
    n_chunks: int
    reach: tuple[int, int]
    """Chunks visible before and after the own one, round the circle of all chunks."""
    once: bool
    """Whether a key counts once, however often it is found (duplicate correction)."""

    @classmethod
    def of(cls, buckets_GRT: Tensor, chunk_len: int, causal: bool, once: bool) -> "Counts":
        """Of rounds of LSH attention with these buckets, whose tokens see other buckets too."""
        order_GRT = stable_order(buckets_GRT)
        n_rounds, n_tokens = order_GRT.shape[1:]
        per_round = -(-n_tokens // chunk_len)
        rounds_R, places_T = (torch.arange(n, device=order_GRT.device) for n in (n_rounds, n_tokens))
        chunk_RT = rounds_R[:, None] * per_round + places_T // chunk_len
        chunk_GRT = torch.empty_like(order_GRT).scatter_(-1, order_GRT, chunk_RT.expand_as(order_GRT))
        n_chunks = n_rounds * per_round
        return cls(chunk_GRT, n_chunks, circular_reach(n_chunks, causal), once)

    def of_heads(self, heads: slice, dtype: torch.dtype) -> "PairCounts":
        """What N of these heads is a product of: a number for each token and chunk."""
        chunk_gRT = self.chunk_GRT[heads]
        stands_gCT = torch.zeros(
            len(chunk_gRT), self.n_chunks, chunk_gRT.shape[-1], dtype=dtype, device=chunk_gRT.device
        )
        stands_gCT.scatter_(1, chunk_gRT, 1)
        before, after = self.reach
        seen_gCT = stands_gCT
        for offset in (*range(1, before + 1), *range(-after, 0)):  # a chunk c sees the keys of chunk c - offset
            seen_gCT = seen_gCT + stands_gCT.roll(offset, dims=1)
        return PairCounts(stands_gCT, seen_gCT, self.once)


@dataclass(frozen=True)
class PairCounts:
    """Of some heads, the chunks that queries stand in and the chunks that see keys, as zeros and ones [g, C, T]."""

    stands_gCT: Tensor
    seen_gCT: Tensor
    once: bool

    def between(self, queries: slice, keys: slice) -> Tensor:
        """N_ij [g, L, W], or 0 and 1 with `once`."""
        counts = torch.bmm(self.stands_gCT[..., queries].mT, self.seen_gCT[..., keys])
        return counts.clamp_(max=1) if self.once else counts
