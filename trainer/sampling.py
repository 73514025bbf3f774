"""Documents that a model continues: prompts as tokens, the tokens that may follow, and what these stand for.

launch/generate.py continues a prompt with an exported model; text_sample.py shows a continuation during a run.
"""

import codecs
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.arrays import open_arrays
from data_pipeline.errors import BadDocument
from data_pipeline.tokenizer import Tokenizer, value_dtype
from reformer import ConfigError, Reformer, ReformerConfig
from reformer.decoding import Decoder
from reformer.decoding_caches import memory_per_token
from reformer.generation import continue_tokens

Forward = Callable[[Tensor], Tensor]
"""Tokens [B, T] -> logits [B, T, V], or those of the last place alone [B, 1, V]."""
AT_ONCE = 16
"""Sequences that are continued side by side: a CPU gains nothing by more (benchmarks/LOG.md)."""
MEMORY = 2**31
"""Bytes that they and the prompt may keep, all together; one alone may keep any number."""


def encode(
    text: bytes, tokenizer: Tokenizer, bos: bool, n_first: int | None = None, n_last: int | None = None
) -> Tensor:
    """The ids [T] of the beginning of a document. Raises ConfigError where the text cannot be encoded.

    bos: whether documents begin with BOS. n_first: how many tokens are taken at most, BOS aside; n_last: the same from
    the end, without BOS if the beginning is left out, as in a row that begins amid a document.
    """
    try:
        tokens = integers(text, tokenizer.bos_id) if tokenizer.kind == "integers" else tokenizer.encode(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 at byte {error.start} ({error.reason}): convert it") from None
    if not len(tokens) and not bos:
        raise ConfigError("the prompt is empty, and documents of this model begin without BOS: give it a beginning")
    if n_last is not None and n_last < len(tokens):
        return torch.tensor(tokens[-n_last:].tolist(), dtype=torch.int64)
    return torch.tensor([tokenizer.bos_id] * bos + tokens[:n_first].tolist(), dtype=torch.int64)


def integers(text: bytes, n_values: int) -> np.ndarray:
    """The values [T] that a text names, or that an .npy file holds, whatever its shape, in C order.

    Raises ConfigError for what is none of 0 to n_values - 1.
    """
    if text.startswith(np.lib.format.MAGIC_PREFIX):
        return array_values(text, n_values)
    words = text.split()
    for word in words:
        # Python refuses to read numbers of thousands of digits.
        if not (word.isdigit() and len(word) <= 20 and int(word) < n_values):
            raise ConfigError(
                f"the prompt has {word[:20].decode(errors='replace')!r} in it: this model continues integers from 0 to "
                f"{n_values - 1}, with spaces between them"
            )
    return np.array([int(word) for word in words], np.int64)


def array_values(file: bytes, n_values: int) -> np.ndarray:
    """The values [T] of the content of an .npy file. Raises ConfigError where they are not integers below n_values."""
    blocks: list[bytes] = []
    try:
        for array in open_arrays(io.BytesIO(file), is_archive=False, member=None):
            if isinstance(array, BadDocument):
                raise array
            for item in range(array.n_items):
                blocks += array.read_item(item, n_values)
    except BadDocument as error:
        raise ConfigError(f"the prompt {error.detail}") from None
    return np.frombuffer(b"".join(blocks), value_dtype(n_values)).astype(np.int64)


def values(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """The integers that ids [T] of a tokenizer of integers stand for, in the smallest type; BOS and EOS are none."""
    return np.frombuffer(tokenizer.decode(ids), value_dtype(tokenizer.bos_id))


def spelling(tokenizer: Tokenizer) -> Callable[[Tensor], str]:
    """What turns ids [n] that come one after another into text; without ids, what is left of the text.

    Bytes that are not UTF-8 are replaced; of integers, it is the numbers, each with a space behind it.
    """
    if tokenizer.kind == "integers":
        return lambda ids: "".join(f"{value} " for value in values(tokenizer, ids.cpu().numpy()))
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda ids: characters.decode(tokenizer.decode(ids.cpu().numpy()), final=not len(ids))


def within_documents(forward: Forward, tokenizer: Tokenizer, eos: bool) -> Forward:
    """`forward` without what a model has never been taught to predict: BOS, and EOS where no document had one."""
    never = [tokenizer.bos_id] if eos else [tokenizer.bos_id, tokenizer.eos_id]

    def masked(tokens_BT: Tensor) -> Tensor:
        logits = forward(tokens_BT).clone()
        logits[..., never] = -torch.inf
        return logits

    return masked


def at_once(config: ReformerConfig, n_tokens: int) -> int:
    """How many sequences of n_tokens are continued side by side."""
    return max(1, min(AT_ONCE, MEMORY // max(1, n_tokens * memory_per_token(config)) - 1))


class Continuations:
    """Of one prompt, any number of them: its forward pass is made once."""

    def __init__(self, model: Reformer, tokenizer: Tokenizer, prompt_T: Tensor, eos: bool, n_draws: int) -> None:
        """eos: whether documents ended with EOS in training; n_draws: how many there are to be."""
        self.model, self.tokenizer, self.prompt_T, self.eos = model, tokenizer, prompt_T, eos
        self.n_left = n_draws

    def draw(
        self, n_tokens: int, *, temperature: float, top_p: float, seeds: Sequence[int]
    ) -> Iterator[dict[int, int]]:
        """The tokens that the model adds by each seed, one after another, side by side.

        n_tokens times those of all seeds, without the ones that have come to EOS, which is the last of a sequence.
        """
        self.n_left -= len(seeds)
        going_on, tokens_BT = list(seeds), self.prompt_T.repeat(len(seeds), 1)
        # What a long prompt keeps may be gigabytes: the last draw needs no copy.
        is_last = not self.n_left and len(seeds) == 1
        decoder = self._prompted if is_last else self._prompted.select([0] * len(seeds))
        forward = within_documents(decoder, self.tokenizer, self.eos)
        for _ in range(n_tokens):  # one at a time, which gives the same tokens as all at once
            added_B1 = continue_tokens(
                forward, self.model.config, tokens_BT, 1, temperature=temperature, top_p=top_p, seed=going_on
            )
            added = added_B1[:, 0].tolist()
            yield dict(zip(going_on, added, strict=True))
            rows = [row for row, token in enumerate(added) if token != self.tokenizer.eos_id]
            if not rows:
                return
            if len(rows) < len(added):
                decoder.keep(rows)
            going_on, tokens_BT = [going_on[row] for row in rows], torch.cat([tokens_BT, added_B1], dim=1)[rows]

    @cached_property
    def _prompted(self) -> Decoder:
        """That has seen the prompt."""
        decoder = Decoder(self.model)
        decoder(self.prompt_T[None])
        return decoder
