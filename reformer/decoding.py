"""Tokens that are added to a sequence one by one, without computing those before them again.

Of each layer's attention the keys and values so far are kept (in local layers of two chunks), in LSH layers also the
buckets and each round's sorted order. A new token takes its place in these orders, and sees of every round what a
sequence's last token sees there: its chunk of the sorted sequence and the one before. What was there stays as it is.

A pass over the whole sequence, as in training, is not quite the same function: there a new token also moves earlier
ones to other chunks, and so changes what comes out of them. Without LSH layers both are the same.

Axes: H heads, T tokens so far, n new ones, D head dim, M model, V vocabulary, R hash rounds, L chunk length, W = R*2L
places that a token looks at.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from reformer.attention import LocalSelfAttention, LSHSelfAttention
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.heads import check_tokens
from reformer.local import local_attention
from reformer.lsh.dispatch import lsh_attention
from reformer.lsh.hashing import bucket_factors, draw_rotations, hash_to_buckets, stable_order
from reformer.model import Reformer
from reformer.reversible import ReversibleBlock

ANEW = 64
"""A pass over T tokens takes as long as T / 400 to T / 35 tokens one by one (measured on a CPU: 256 to 60,000 tokens,
models of 2 layers of width 64 and of 6 of width 256 and 512; a smaller share for longer sequences and smaller models).
Where more than T / 64 are new, it is made."""


class Decoder:
    """A model that remembers a sequence: called with all of it, it computes what is new.

    The first call takes any number of tokens at once, and is a forward pass of the model. Later ones take a token or a
    few one by one. Where there are so many that a pass over all is less work (two or more, and more than one in 64 of
    all), it begins anew: the result is then that of a new decoder, which in LSH layers is not quite the same.

    There are as many hash buckets as in a sequence of max_seq_len, however short this one is. Dropout is never applied.
    The weights must stay as they are meanwhile.
    """

    def __init__(self, model: Reformer) -> None:
        """Raises ValueError for a model that is not causal."""
        if not model.config.causal:
            raise ValueError("a model with causal=False computes every token again when one is added: call the model")
        self.model, self.seen_T, self.is_sound = model, torch.zeros(0, dtype=torch.int64), True
        self.blocks = cast(Sequence[ReversibleBlock], model.blocks)
        self.caches = self._empty()

    @torch.no_grad()
    def __call__(self, tokens_1T: Tensor) -> Tensor:
        """The logits [1, 1, V] of what follows tokens [1, T], which begin with those of the call before.

        Raises ValueError where they do not, nothing is new, or they are more than max_seq_len; RuntimeError where an
        earlier call was interrupted.
        """
        self._check(tokens_1T)
        self.is_sound = False  # until all layers have taken the tokens in
        tokens_1T = tokens_1T.long()
        done, n_tokens = len(self.seen_T), tokens_1T.shape[1]
        if done and n_tokens - done > max(1, n_tokens // ANEW):
            self.caches, done = self._empty(), 0
        for stop in range(done + 1, n_tokens + 1) if done else (n_tokens,):
            streams = self._added(tokens_1T[:, done:stop], done)
            done = stop
        self.seen_T, self.is_sound = tokens_1T[0].clone(), True
        return self.model.head(*(x[:, -1:] for x in streams))

    def copy(self) -> "Decoder":
        """Another one that has seen the same tokens, so that a sequence can be continued in several ways."""
        other = copy(self)
        other.caches = deepcopy(self.caches)
        return other

    def _empty(self) -> list["_Cache"]:
        return [_cache(block.attention) for block in self.blocks]

    def _check(self, tokens_1T: Tensor) -> None:
        if not self.is_sound:
            raise RuntimeError("this decoder was interrupted while it took tokens in: make another one")
        done, most = len(self.seen_T), self.model.config.max_seq_len
        if tokens_1T.ndim != 2 or len(tokens_1T) != 1 or not done < tokens_1T.shape[1] <= most:
            raise ValueError(
                f"tokens are {list(tokens_1T.shape)}, expected [1, T] with T above the {done} that this decoder has "
                f"seen and at most max_seq_len={most}; another sequence takes another decoder"
            )
        self.model.check_parameters()
        check_tokens(tokens_1T, self.model.config.vocab_size)
        if done and not torch.equal(tokens_1T[0, :done].long(), self.seen_T):
            raise ValueError("the tokens do not begin with those that this decoder has seen: make another one for them")

    def _added(self, tokens_1n: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The two streams [1, n, M] after the stack, of tokens from position `start` on."""
        x = self.model.embedding(tokens_1n, start)
        x1 = x2 = x.to(torch.promote_types(x.dtype, torch.float32))
        for block, cache in zip(self.blocks, self.caches, strict=True):
            projected = [x_1HnD[0] for x_1HnD in block.attention.project(x2)]
            with torch.autocast(x.device.type, enabled=False):  # rounded products would change buckets
                out_HnD = cache.extend(projected)
            x1 = x1 + block.attention.merged(out_HnD[None])
            x2 = x2 + block.feed_forward(x1)[0]
        return x1, x2


class _Cache(Protocol):
    def extend(self, projected: list[Tensor]) -> Tensor:
        """The attention's output [H, n, D] of new tokens, whose projections these are: several at first, then one."""
        ...


def _cache(attention: nn.Module) -> _Cache:
    if isinstance(attention, LocalSelfAttention):
        return _LocalCache(attention.config)
    if isinstance(attention, LSHSelfAttention):
        return _LSHCache(attention)
    return _DenseCache()


class _LocalCache:
    """Keys and values of the newest token's chunk and of the one before."""

    def __init__(self, config: ReformerConfig) -> None:
        self.chunk_len, self.n_tokens = config.local_chunk_len, 0

    def extend(self, projected: list[Tensor]) -> Tensor:
        q_HnD, k_HnD, v_HnD = projected
        n_tokens = self.n_tokens + q_HnD.shape[1]
        # Of what is kept, as much as the newest token sees.
        n_seen = min(n_tokens, (n_tokens - 1) % self.chunk_len + 1 + self.chunk_len)
        if not self.n_tokens:
            out_HnD = local_attention(q_HnD[None], k_HnD[None], v_HnD[None], chunk_len=self.chunk_len)[0]
            self.k, self.v = k_HnD, v_HnD
        else:
            self.k, self.v = torch.cat([self.k, k_HnD], dim=1), torch.cat([self.v, v_HnD], dim=1)
        # Copies: a view would keep all of a prompt.
        self.k, self.v, self.n_tokens = self.k[:, -n_seen:].clone(), self.v[:, -n_seen:].clone(), n_tokens
        if n_tokens == q_HnD.shape[1]:
            return out_HnD
        return _attended(q_HnD * q_HnD.shape[-1] ** -0.5, self.k, self.v)


class _Growing:
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


class _SharedKeys:
    """Keys, which are queries of length 1, and values of all tokens."""

    def __init__(self) -> None:
        self.keys, self.values = _Growing(dim=1), _Growing(dim=1)

    @property
    def n_tokens(self) -> int:
        return self.keys.length

    def put(self, qk_HnD: Tensor, v_HnD: Tensor) -> tuple[Tensor, Tensor]:
        """Take new tokens in; keys and values [H, T, D] of all."""
        qk_HnD = qk_HnD.to(_exact(qk_HnD.dtype))
        norm_Hn1 = qk_HnD.norm(dim=-1, keepdim=True)
        self.keys.add(qk_HnD / norm_Hn1.masked_fill(norm_Hn1 == 0, torch.inf))  # the key of a zero vector is zero
        self.values.add(v_HnD)
        return self.keys.tensor, self.values.tensor


class _DenseCache(_SharedKeys):
    def extend(self, projected: list[Tensor]) -> Tensor:
        qk_HnD, v_HnD = projected
        k_HTD, v_HTD = self.put(qk_HnD, v_HnD)
        if self.n_tokens == qk_HnD.shape[1]:
            return dense_attention(qk_HnD[None], v_HnD[None])[0]
        # A token sees itself only if it sees nothing else.
        return _attended(qk_HnD, k_HTD[:, :-1], v_HTD[:, :-1])


class _LSHCache(_SharedKeys):
    """With the buckets, and the tokens sorted by (bucket, position), of each head and round."""

    def __init__(self, attention: LSHSelfAttention) -> None:
        super().__init__()
        self.buckets, self.order_HRT = _Growing(dim=2), torch.zeros(0)
        self.config = config = attention.config
        assert config.d_head is not None
        self.factors = bucket_factors(config.n_buckets, config.max_seq_len, config.lsh_chunk_len)
        self.rotations = draw_rotations(
            config.n_heads, config.d_head, config.n_hashes, self.factors, config.seed, 0, attention.layer
        )

    def extend(self, projected: list[Tensor]) -> Tensor:
        qk_HnD, v_HnD = projected
        k_HTD, v_HTD = self.put(qk_HnD, v_HnD)
        if self.n_tokens == qk_HnD.shape[1]:
            return self._first(qk_HnD, v_HnD)
        bucket_HR1 = hash_to_buckets(qk_HnD[None], self.rotations, self.factors)[0]
        place_HR1 = self._insert(bucket_HR1)
        token_HW, is_seen_HW = self._seen(place_HR1, bucket_HR1)
        k_HWD, v_HWD = (x.gather(1, token_HW[..., None].expand(-1, -1, x.shape[-1])) for x in (k_HTD, v_HTD))
        weight_HW = (
            self._share(token_HW, is_seen_HW) if self.config.duplicate_correction else is_seen_HW.to(k_HWD.dtype)
        )
        out_H1D = _attended(qk_HnD, k_HWD, v_HWD, weight_HW)
        return torch.where(is_seen_HW.any(dim=1)[:, None, None], out_H1D, v_HnD)

    def _first(self, qk_HnD: Tensor, v_HnD: Tensor) -> Tensor:
        config = self.config
        out, buckets = lsh_attention(
            qk_HnD[None],
            v_HnD[None],
            n_hashes=config.n_hashes,
            chunk_len=config.lsh_chunk_len,
            n_buckets=self.factors,
            attend_across_buckets=config.attend_across_buckets,
            duplicate_correction=config.duplicate_correction,
            rotations=self.rotations,
        )
        self.buckets.add(buckets[0])
        self.order_HRT = stable_order(buckets[0]).to(torch.int32)
        return out[0]

    def _insert(self, bucket_HR1: Tensor) -> Tensor:
        """Take the newest token into the orders; its place [H, R, 1] is behind its bucket and those before that."""
        place_HR1 = (self.buckets.tensor <= bucket_HR1).sum(dim=-1, keepdim=True)
        self.buckets.add(bucket_HR1)
        index_T = torch.arange(self.n_tokens, dtype=torch.int32, device=place_HR1.device)
        same, later = (torch.nn.functional.pad(self.order_HRT, ends) for ends in ((0, 1), (1, 0)))
        self.order_HRT = torch.where(index_T > place_HR1, later, same).scatter_(-1, place_HR1, self.n_tokens - 1)
        return place_HR1

    def _seen(self, place_HR1: Tensor, bucket_HR1: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [H, W] at the places that the newest one looks at, and which of them it sees.

        Rounds stand in a circle, each filled up to whole chunks: before the first chunk of one is the last of another.
        """
        n_rounds, length = self.config.n_hashes, self.config.lsh_chunk_len
        n_places = -(-self.n_tokens // length) * length
        device = place_HR1.device
        round_R1 = torch.arange(n_rounds, device=device)[:, None]
        first_HR1 = round_R1 * n_places + place_HR1 // length * length - length
        circle_HRw = (first_HR1 + torch.arange(2 * length, device=device)) % (n_rounds * n_places)
        round_HRw, place_HRw = circle_HRw // n_places, circle_HRw % n_places
        is_seen = place_HRw < self.n_tokens
        at_HW = (round_HRw * self.n_tokens + place_HRw.clamp(max=self.n_tokens - 1)).flatten(1)
        token_HW = self.order_HRT.flatten(1).gather(1, at_HW).long()
        if not self.config.attend_across_buckets:
            of_round_HW = (round_HRw * self.n_tokens).flatten(1) + token_HW
            bucket_HRw = self.buckets.tensor.flatten(1).gather(1, of_round_HW).view_as(is_seen)
            is_seen &= (bucket_HRw == bucket_HR1) & (round_HRw == round_R1)
        return token_HW, is_seen.flatten(1) & (token_HW != self.n_tokens - 1)

    def _share(self, token_HW: Tensor, is_seen_HW: Tensor) -> Tensor:
        """1 / N_ij for a key that is seen N_ij times (eq. 16), 0 for what is not seen."""
        seen_HW = is_seen_HW.to(self.keys.memory.dtype)
        n_HT = seen_HW.new_zeros(len(seen_HW), self.n_tokens).scatter_add_(1, token_HW, seen_HW)
        return seen_HW / n_HT.gather(1, token_HW).clamp(min=1)


def _attended(q_H1D: Tensor, k_HWD: Tensor, v_HWD: Tensor, weight_HW: Tensor | None = None) -> Tensor:
    """Softmax attention [H, 1, D] of one query to keys that count `weight` times; NaN where none counts."""
    dtype = _exact(q_H1D.dtype)
    scores_H1W = q_H1D.to(dtype) @ k_HWD.to(dtype).mT
    if weight_HW is not None:
        scores_H1W = scores_H1W + weight_HW[:, None].log()
    return (scores_H1W.softmax(dim=-1) @ v_HWD.to(dtype)).to(v_HWD.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """fp32 or better."""
    return torch.promote_types(dtype, torch.float32)
