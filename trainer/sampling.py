"""Documents that a model continues: prompts as tokens, the tokens that may follow, and what these stand for.

launch/generate.py continues a prompt with an exported model; samples.py shows a continuation during a run.
"""

import codecs
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer, value_dtype
from reformer import ConfigError, Reformer
from reformer.decoding import Decoder
from reformer.generation import continue_tokens

Forward = Callable[[Tensor], Tensor]
"""Tokens [1, T] -> logits [1, T, V], or those of the last place alone [1, 1, V]."""


def encode(text: bytes, tokenizer: Tokenizer, bos: bool) -> Tensor:
    """The ids [T] of the beginning of a document. Raises ConfigError where the text cannot be encoded."""
    try:
        tokens = integers(text, tokenizer.bos_id) if tokenizer.kind == "integers" else tokenizer.encode(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt is not UTF-8 at byte {error.start} ({error.reason}): convert it") from None
    if not len(tokens) and not bos:
        raise ConfigError("the prompt is empty, and documents of this model begin without BOS: give it a beginning")
    return torch.tensor([tokenizer.bos_id] * bos + tokens.tolist(), dtype=torch.int64)


def integers(text: bytes, n_values: int) -> np.ndarray:
    """The values [T] that a text names. Raises ConfigError for what is none of 0 to n_values - 1."""
    words = text.split()
    for word in words:
        # Python refuses to read numbers of thousands of digits.
        if not (word.isdigit() and len(word) <= 20 and int(word) < n_values):
            raise ConfigError(
                f"the prompt has {word[:20].decode(errors='replace')!r} in it: this model continues integers from 0 to "
                f"{n_values - 1}, with spaces between them"
            )
    return np.array([int(word) for word in words], np.int64)


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

    def masked(tokens_1T: Tensor) -> Tensor:
        logits = forward(tokens_1T).clone()
        logits[..., never] = -torch.inf
        return logits

    return masked


class Continuations:
    """Of one prompt, any number of them: its forward pass is made once."""

    def __init__(self, model: Reformer, tokenizer: Tokenizer, prompt_T: Tensor, eos: bool, n_draws: int = 1) -> None:
        """eos: whether documents ended with EOS in training; n_draws: how many there are to be."""
        self.model, self.tokenizer, self.prompt_T, self.eos = model, tokenizer, prompt_T, eos
        self.n_left = n_draws

    def draw(self, n_tokens: int, *, temperature: float, top_p: float, seed: int) -> Iterator[Tensor]:
        """The tokens [1] that the model adds, one by one: n_tokens of them, or up to EOS, which is the last."""
        tokens, forward = self.prompt_T, within_documents(self._forward(), self.tokenizer, self.eos)
        for _ in range(n_tokens):  # one at a time, which gives the same tokens as all at once
            added = continue_tokens(
                forward, self.model.config, tokens, 1, temperature=temperature, top_p=top_p, seed=seed
            )
            yield added
            if int(added) == self.tokenizer.eos_id:
                return
            tokens = torch.cat([tokens, added])

    @cached_property
    def _prompted(self) -> tuple[Decoder, Tensor]:
        """A decoder that has seen the prompt, and the logits of what follows."""
        decoder = Decoder(self.model)
        return decoder, decoder(self.prompt_T[None])

    def _forward(self) -> Forward:
        self.n_left -= 1
        is_last = not self.n_left
        own: list[Decoder] = []

        def forward(tokens_1T: Tensor) -> Tensor:
            decoder, logits = self._prompted
            if tokens_1T.shape[1] == len(self.prompt_T):
                return logits
            if not own:  # what a long prompt keeps may be gigabytes: the last draw needs no copy
                own.append(decoder if is_last else decoder.copy())
            return own[0](tokens_1T)

        return forward
