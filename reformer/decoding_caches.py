"""What attention needs of the tokens so far, for each kind of layer: see decoding.py.

Axes: B sequences, H heads, T tokens so far, n new ones, D head dim, R hash rounds, L chunk length, W = R*2L places that
a token looks at.
"""

from copy import copy
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer.attention import LocalSelfAttention, LSHSelfAttention
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.local import local_attention
from reformer.lsh.dispatch import lsh_attention
from reformer.lsh.hashing import (
    as_directions,
    bucket_dtype,
    bucket_factors,
    draw_rotations,
    hash_by_directions,
    stable_order,
)

MOST_LATE = 128
"""Tokens added one by one until all are sorted again; 64 to 512 take the same time (measured, up to 65,536 tokens)."""


class Cache(Protocol):
    def extend(self, projected: list[Tensor]) -> Tensor:
        """The attention's output [B, H, n, D] of new tokens with these projections: several at first, then one."""
        ...

    def select(self, row_b: Tensor) -> Self:
        """Another one, of these of the sequences."""
        ...


def make_cache(attention: nn.Module) -> Cache:
    if isinstance(attention, LocalSelfAttention):
        return LocalCache(attention.config)
    if isinstance(attention, LSHSelfAttention):
        return LSHCache(attention)
    return DenseCache()


def memory_per_token(config: ReformerConfig) -> int:
    """Bytes that a Decoder keeps, at most, for each token of a sequence in fp32, besides two chunks in local layers."""
    assert config.d_head is not None
    bucket_bytes = bucket_dtype(bucket_factors(config.n_buckets, config.max_seq_len, config.lsh_chunk_len)).itemsize
    shared = config.n_heads * config.d_head * 2 * 4 * 3 // 2  # with the room that is made for more
    order = config.n_heads * config.n_hashes * (4 + bucket_bytes + bucket_bytes * 3 // 2)
    by_kind = {"local": 0, "dense": shared, "lsh": shared + order}
    return sum(by_kind[config.attention_kind(layer)] for layer in range(config.n_layers))


class LocalCache:
    """Keys and values of the newest token's chunk and of the one before."""

    def __init__(self, config: ReformerConfig) -> None:
        self.chunk_len, self.n_tokens = config.local_chunk_len, 0

    def extend(self, projected: list[Tensor]) -> Tensor:
        q_BHnD, k_BHnD, v_BHnD = projected
        n_tokens = self.n_tokens + q_BHnD.shape[2]
        # Of what is kept, as much as the newest token sees, or all of it.
        n_seen = (n_tokens - 1) % self.chunk_len + 1 + self.chunk_len
        if not self.n_tokens:
            out_BHnD = local_attention(q_BHnD, k_BHnD, v_BHnD, chunk_len=self.chunk_len)
            self.k, self.v = k_BHnD, v_BHnD
        else:
            self.k, self.v = torch.cat([self.k, k_BHnD], dim=2), torch.cat([self.v, v_BHnD], dim=2)
        # Copies: a view would keep all of a prompt.
        self.k, self.v, self.n_tokens = self.k[:, :, -n_seen:].clone(), self.v[:, :, -n_seen:].clone(), n_tokens
        if n_tokens == q_BHnD.shape[2]:
            return out_BHnD
        return _attended(q_BHnD * q_BHnD.shape[-1] ** -0.5, self.k, self.v)

    def select(self, row_b: Tensor) -> Self:
        other, row_b = copy(self), row_b.to(self.k.device)
        other.k, other.v = self.k.index_select(0, row_b), self.v.index_select(0, row_b)
        return other


class Growing:
    """A tensor whose length along one dimension grows; room is made for half as much again, seldom."""

    def __init__(self, dim: int) -> None:
        self.dim, self.length = dim, 0

    def add(self, new: Tensor) -> None:
        start, self.length = self.length, self.length + new.shape[self.dim]
        if not start:
            self.memory = new.clone()
            return
        if self.length > self.memory.shape[self.dim]:
            shape = list(new.shape)
            shape[self.dim] = self.length // 2 + 1
            self.memory = torch.cat([self.memory.narrow(self.dim, 0, start), new.new_empty(shape)], self.dim)
        self.memory.narrow(self.dim, start, new.shape[self.dim]).copy_(new)

    @property
    def tensor(self) -> Tensor:
        return self.memory.narrow(self.dim, 0, self.length)

    def rows(self, token_BHW: Tensor) -> Tensor:
        """Of a tensor [B, H, T, D] the rows [B, H, W, D] at these places: several times as fast as `gather`."""
        batch, n_heads, room = self.memory.shape[:3]
        first_BH1 = torch.arange(0, batch * n_heads * room, room, device=token_BHW.device).view(batch, n_heads, 1)
        return F.embedding(first_BH1 + token_BHW, self.memory.flatten(0, 2))

    def select(self, row_b: Tensor) -> Self:
        other = copy(self)
        other.memory = self.memory.index_select(0, row_b.to(self.memory.device))
        return other


class SharedKeys:
    """Keys, which are queries of length 1, and values of all tokens."""

    def __init__(self) -> None:
        self.keys, self.values = Growing(dim=2), Growing(dim=2)

    @property
    def n_tokens(self) -> int:
        return self.keys.length

    def put(self, qk_BHnD: Tensor, v_BHnD: Tensor) -> None:
        """Take new tokens in."""
        qk_BHnD = qk_BHnD.to(_exact(qk_BHnD.dtype))
        norm_BHn1 = qk_BHnD.norm(dim=-1, keepdim=True)
        self.keys.add(qk_BHnD / norm_BHn1.masked_fill(norm_BHn1 == 0, torch.inf))  # the key of a zero vector is zero
        self.values.add(v_BHnD)

    def select(self, row_b: Tensor) -> Self:
        other = copy(self)
        other.keys, other.values = self.keys.select(row_b), self.values.select(row_b)
        return other


class DenseCache(SharedKeys):
    def extend(self, projected: list[Tensor]) -> Tensor:
        qk_BHnD, v_BHnD = projected
        self.put(qk_BHnD, v_BHnD)
        if self.n_tokens == qk_BHnD.shape[2]:
            return dense_attention(qk_BHnD, v_BHnD)
        # A token sees itself only if it sees nothing else.
        return _attended(qk_BHnD, self.keys.tensor[:, :, :-1], self.values.tensor[:, :, :-1])


class Order:
    """Tokens sorted by (bucket, position), in each head and round; of the newest ones only their places are known.

    So a token that comes in moves at most MOST_LATE others, however many there are.
    """

    def __init__(self, bucket_BHRT: Tensor) -> None:
        self.buckets = Growing(dim=3)
        self.buckets.add(bucket_BHRT)
        self._sort()

    def _sort(self) -> None:
        order_BHRT = stable_order(self.buckets.tensor)
        self.n_sorted = order_BHRT.shape[-1]
        self.token_BHRT = order_BHRT.to(torch.int32)
        self.bucket_BHRT = self.buckets.tensor.gather(-1, order_BHRT)
        self.late_BHRn = order_BHRT[..., :0].clone()

    def add(self, bucket_BHR1: Tensor) -> Tensor:
        """Take the newest token in; its place [B, H, R, 1] is behind its bucket and those before that."""
        if self.late_BHRn.shape[-1] == MOST_LATE:
            self._sort()
        n_late_BHR1 = (self.buckets.tensor[..., self.n_sorted :] <= bucket_BHR1).sum(dim=-1, keepdim=True)
        place_BHR1 = torch.searchsorted(self.bucket_BHRT, bucket_BHR1, right=True) + n_late_BHR1
        self.late_BHRn = torch.cat([self.late_BHRn + (self.late_BHRn >= place_BHR1), place_BHR1], dim=-1)
        self.buckets.add(bucket_BHR1)
        return place_BHR1

    def tokens(self, round_BHR2: Tensor, place_BHR2L: Tensor) -> Tensor:
        """The tokens [B, H, R, 2, L] at places of two rounds, once a token has been added."""
        row_BHR2 = self._row(round_BHR2)
        late_BHRn, which_BHRn = self.late_BHRn.sort(dim=-1)
        late_BHR2n, which_BHR2n = (F.embedding(row_BHR2, x.flatten(0, 2)) for x in (late_BHRn, which_BHRn))
        n_BHR2L = torch.searchsorted(late_BHR2n, place_BHR2L, right=True)  # how many of the newest are up to there
        last_BHR2L = (n_BHR2L - 1).clamp(min=0)
        earlier = row_BHR2[..., None] * self.n_sorted + (place_BHR2L - n_BHR2L).clamp(min=0)
        return torch.where(
            late_BHR2n.gather(-1, last_BHR2L) == place_BHR2L,
            which_BHR2n.gather(-1, last_BHR2L) + self.n_sorted,
            self.token_BHRT.flatten().take(earlier),
        )

    def buckets_of(self, round_BHR2: Tensor, token_BHR2L: Tensor) -> Tensor:
        """The buckets [B, H, R, 2, L] of tokens in two rounds."""
        memory = self.buckets.memory
        return memory.flatten().take(self._row(round_BHR2)[..., None] * memory.shape[-1] + token_BHR2L)

    def _row(self, round_BHR2: Tensor) -> Tensor:
        """The numbers of these heads and rounds among those of the batch."""
        batch, n_heads, n_rounds = self.token_BHRT.shape[:3]
        first_BH = torch.arange(0, batch * n_heads * n_rounds, n_rounds, device=round_BHR2.device)
        return first_BH.view(batch, n_heads, 1, 1) + round_BHR2

    def select(self, row_b: Tensor) -> Self:
        other, row_b = copy(self), row_b.to(self.token_BHRT.device)
        other.buckets = self.buckets.select(row_b)
        other.token_BHRT, other.bucket_BHRT = (x.index_select(0, row_b) for x in (self.token_BHRT, self.bucket_BHRT))
        other.late_BHRn = self.late_BHRn.index_select(0, row_b)
        return other


class LSHCache(SharedKeys):
    """With the order of the tokens in each head and round."""

    def __init__(self, attention: LSHSelfAttention) -> None:
        super().__init__()
        self.config = config = attention.config
        assert config.d_head is not None
        self.factors = bucket_factors(config.n_buckets, config.max_seq_len, config.lsh_chunk_len)
        self.rotations = draw_rotations(
            config.n_heads, config.d_head, config.n_hashes, self.factors, config.seed, 0, attention.layer
        )

    def extend(self, projected: list[Tensor]) -> Tensor:
        qk_BHnD, v_BHnD = projected
        self.put(qk_BHnD, v_BHnD)
        if self.n_tokens == qk_BHnD.shape[2]:
            return self._first(qk_BHnD, v_BHnD)
        bucket_BHR1 = hash_by_directions(qk_BHnD, self.directions_HND, self.factors)
        token_BHW, is_seen_BHW = self._seen(self.order.add(bucket_BHR1), bucket_BHR1)
        k_BHWD, v_BHWD = self.keys.rows(token_BHW), self.values.rows(token_BHW)
        weight_BHW = (
            self._share(token_BHW, is_seen_BHW) if self.config.duplicate_correction else is_seen_BHW.to(k_BHWD.dtype)
        )
        out_BH1D = _attended(qk_BHnD, k_BHWD, v_BHWD, weight_BHW)
        return torch.where(is_seen_BHW.any(dim=-1)[..., None, None], out_BH1D, v_BHnD)

    def select(self, row_b: Tensor) -> Self:
        other = super().select(row_b)
        other.order = self.order.select(row_b)
        return other

    def _first(self, qk_BHnD: Tensor, v_BHnD: Tensor) -> Tensor:
        config = self.config
        out, buckets = lsh_attention(
            qk_BHnD,
            v_BHnD,
            n_hashes=config.n_hashes,
            chunk_len=config.lsh_chunk_len,
            n_buckets=self.factors,
            attend_across_buckets=config.attend_across_buckets,
            duplicate_correction=config.duplicate_correction,
            rotations=self.rotations,
        )
        self.order = Order(buckets)
        self.directions_HND = as_directions(self.rotations, self.factors, qk_BHnD)
        del self.rotations  # as large
        return out

    def _seen(self, place_BHR1: Tensor, bucket_BHR1: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, H, W] at the places that the newest one looks at, and which of them it sees.

        Rounds stand in a circle, each filled up to whole chunks: before the first chunk of one is the last of another.
        """
        n_rounds, length, device = self.config.n_hashes, self.config.lsh_chunk_len, place_BHR1.device
        n_chunks = -(-self.n_tokens // length)
        round_R1 = torch.arange(n_rounds, device=device)[:, None]
        own_BHR1 = round_R1 * n_chunks + place_BHR1 // length
        chunk_BHR2 = torch.cat([own_BHR1 - 1, own_BHR1], dim=-1) % (n_rounds * n_chunks)
        round_BHR2 = chunk_BHR2 // n_chunks
        place_BHR2L = (chunk_BHR2 % n_chunks * length)[..., None] + torch.arange(length, device=device)
        is_seen = place_BHR2L < self.n_tokens
        token_BHR2L = self.order.tokens(round_BHR2, place_BHR2L.clamp(max=self.n_tokens - 1))
        if not self.config.attend_across_buckets:
            is_alike = self.order.buckets_of(round_BHR2, token_BHR2L) == bucket_BHR1[..., None]
            is_seen &= is_alike & (round_BHR2 == round_R1)[..., None]
        return token_BHR2L.flatten(2), (is_seen & (token_BHR2L != self.n_tokens - 1)).flatten(2)

    def _share(self, token_BHW: Tensor, is_seen_BHW: Tensor) -> Tensor:
        """1 / N_ij for a key that is seen N_ij times (eq. 16), 0 for what is not seen."""
        seen_BHW = is_seen_BHW.to(self.keys.memory.dtype)
        n_BHT = seen_BHW.new_zeros(*seen_BHW.shape[:2], self.n_tokens).scatter_add_(2, token_BHW, seen_BHW)
        return seen_BHW / n_BHT.gather(2, token_BHW).clamp(min=1)


def _attended(q_BH1D: Tensor, k_BHWD: Tensor, v_BHWD: Tensor, weight_BHW: Tensor | None = None) -> Tensor:
    """Softmax attention [B, H, 1, D] of one query to keys that count `weight` times; NaN where none counts."""
    dtype = _exact(q_BH1D.dtype)
    scores_BH1W = q_BH1D.to(dtype) @ k_BHWD.to(dtype).mT
    if weight_BHW is not None:
        scores_BH1W = scores_BH1W + weight_BHW[:, :, None].log()
    return (scores_BH1W.softmax(dim=-1) @ v_BHWD.to(dtype)).to(v_BHWD.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """fp32 or better."""
    return torch.promote_types(dtype, torch.float32)
