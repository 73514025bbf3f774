"""Tokens that are added to a sequence one by one, without computing those before them again.

Of each layer's attention the keys and values so far are kept (in local layers of two chunks), in LSH layers also the
buckets and each round's sorted order. A new token takes its place in these orders, and sees of every round what a
sequence's last token sees there: its chunk of the sorted sequence and the one before. What was there stays as it is.

A pass over the whole sequence, as in training, is not quite the same function: there a new token also moves earlier
ones to other chunks, and so changes what comes out of them. Without LSH layers both are the same.

Several sequences of one length are continued side by side, in less time than one after another.

Axes: B sequences, H heads, T tokens so far, n new ones, D head dim, M model, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from typing import cast

import torch
from torch import Tensor

from reformer.arguments import check_is_tensor, check_tokens, whole_number
from reformer.decoding_caches import Cache, make_cache
from reformer.model import Reformer
from reformer.reversible import ReversibleBlock

ANEW = 64
"""A pass over T tokens takes as long as T / 126 to T / 29 tokens one by one (measured on a CPU: 1,024 to 65,536 tokens,
models of 2 layers of width 64 and of 6 of width 256; a smaller share for smaller models). Where more than T / 64 are
new, it is made."""


class Decoder:
    """A model that remembers sequences: called with all of them, it computes what is new.

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
        self.model, self.seen_BT, self.is_sound = model, torch.zeros(0, 0, dtype=torch.int64), True
        self.blocks = cast(Sequence[ReversibleBlock], model.blocks)
        self.caches, self.logits_B1V = self._empty(), torch.zeros(0)

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """The logits [B, 1, V] of what follows tokens [B, T], which begin with those of the call before.

        Where nothing is new, they are those of the call before. Raises ValueError where the tokens begin otherwise, or
        are more than max_seq_len; RuntimeError where an earlier call was interrupted.
        """
        self._check(tokens_BT)
        done, n_tokens = self.seen_BT.shape[1], tokens_BT.shape[1]
        if done == n_tokens:
            return self.logits_B1V.clone()
        self.is_sound = False  # until all layers have taken the tokens in
        tokens_BT = tokens_BT.long()
        if done and n_tokens - done > max(1, n_tokens // ANEW):
            self.caches, done = self._empty(), 0
        for stop in range(done + 1, n_tokens + 1) if done else (n_tokens,):
            streams = self._added(tokens_BT[:, done:stop], done)
            done = stop
        self.logits_B1V = self.model.head(*(x[:, -1:] for x in streams))
        self.seen_BT, self.is_sound = tokens_BT.clone(), True
        return self.logits_B1V.clone()

    def select(self, rows: Iterable[int]) -> "Decoder":
        """Another one that has seen these of the sequences, by their numbers.

        [0, 0, 0] continues the first in three ways. Raises ValueError where one is none of them.
        """
        other = copy(self)
        other.caches = list(self.caches)
        other.keep(rows)
        return other

    def keep(self, rows: Iterable[int]) -> None:
        """Go on with these of the sequences alone: [0, 2] leaves out the second of three. Raises what `select` does.

        One layer after another, so that there is never much more memory than before.
        """
        numbers = [whole_number("rows", row) for row in rows]
        if not numbers or not 0 <= min(numbers) <= max(numbers) < len(self.seen_BT):
            raise ValueError(f"rows={numbers}: this decoder has seen {len(self.seen_BT)} sequences, counted from 0")
        row_b = torch.tensor(numbers)
        was_sound, self.is_sound = self.is_sound, False
        for layer, cache in enumerate(self.caches):
            self.caches[layer] = cache.select(row_b)
        self.seen_BT, self.logits_B1V = (x.index_select(0, row_b.to(x.device)) for x in (self.seen_BT, self.logits_B1V))
        self.is_sound = was_sound

    def _empty(self) -> list[Cache]:
        return [make_cache(block.attention) for block in self.blocks]

    def _check(self, tokens_BT: Tensor) -> None:
        if not self.is_sound:
            raise RuntimeError("this decoder was interrupted while it took tokens in: make another one")
        check_is_tensor(tokens_BT)
        (n_rows, done), most = self.seen_BT.shape, self.model.config.max_seq_len
        is_batch = tokens_BT.ndim == 2 and (len(tokens_BT) == n_rows if done else len(tokens_BT) > 0)
        least = max(1, done)
        if not is_batch or not least <= tokens_BT.shape[1] <= most:
            raise ValueError(
                f"tokens are {list(tokens_BT.shape)}, expected [{n_rows if done else 'B'}, T] with T from {least}, as "
                f"this decoder has seen {done}, to max_seq_len={most}; other sequences take another decoder"
            )
        self.model.check_parameters()
        check_tokens(tokens_BT, self.model.config.vocab_size)
        if done and not torch.equal(tokens_BT[:, :done].long(), self.seen_BT):
            raise ValueError("the tokens do not begin with those that this decoder has seen: make another one for them")

    def _added(self, tokens_Bn: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The two streams [B, n, M] after the stack, of tokens from position `start` on."""
        x = self.model.embedding(tokens_Bn, start)
        x1 = x2 = x.to(torch.promote_types(x.dtype, torch.float32))
        for block, cache in zip(self.blocks, self.caches, strict=True):
            projected = block.attention.project(x2)
            with torch.autocast(x.device.type, enabled=False):  # rounded products would change buckets
                out_BHnD = cache.extend(projected)
            x1 = x1 + block.attention.merged(out_BHnD)
            x2 = x2 + block.feed_forward(x1)[0]
        return x1, x2
