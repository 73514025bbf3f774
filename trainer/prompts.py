"""Prompts as lines of JSON, and the lines of JSON that their continuations are.

A line in is an object with a "text", or for models of integers with "values", as `python -m data_pipeline decode
--split` writes them; what else it has comes back in the lines out, which have besides:

    prompt          what was continued: a text, or the values
    seed            of the draws
    continuation    what the model added to it, likewise
    ended           whether the model ended the document there

Bytes of these texts that are not UTF-8 are replaced.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from reformer import ConfigError
from trainer.sampling import encode, values


class Prompt(NamedTuple):
    place: str
    """The line and its file, for errors."""
    others: dict[str, Any]
    """What the line has beside the text or the values."""
    tokens: Tensor
    """int64 [T]: what is to be continued."""


def read_prompts(
    lines: Iterable[bytes], name: str, tokenizer: Tokenizer, bos: bool, n_first: int | None, n_last: int | None
) -> Iterator[Prompt]:
    """The prompts in the lines of a file of this name, in order; empty lines are none.

    bos, n_first, n_last: see `encode`.

    Raises ConfigError for a line that is no such object, or whose text or values cannot be encoded.
    """
    field = _field(tokenizer)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"line {number} of {name}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place} is not JSON ({error}): give an object with {field!r} for each prompt") from None
        try:
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise ConfigError(f"{place} has a value that could not be given back ({error}): leave it out") from None
        given = record.pop(field, None) if isinstance(record, dict) else None
        if field == "values" and isinstance(given, list) and all(type(value) is int for value in given):
            given = " ".join(map(str, given))
        elif field == "values" or not isinstance(given, str):
            kind = "an array of integers" if field == "values" else "a string"
            raise ConfigError(f"{place} is no object with {field!r}, {kind}: give one for each prompt")
        try:
            tokens = encode(given.encode(), tokenizer, bos, n_first, n_last)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        yield Prompt(place, record, tokens)


def continuation_line(prompt: Prompt, tokenizer: Tokenizer, seed: int, added: Sequence[int]) -> str:
    """A line out, without a newline, of the tokens that were added to a prompt."""
    said = {
        "prompt": _spelled(tokenizer, prompt.tokens.numpy()),
        "seed": seed,
        "continuation": _spelled(tokenizer, np.array(added, np.int64)),
        "ended": tokenizer.eos_id in added[-1:],
    }
    return json.dumps({**prompt.others, **said}, ensure_ascii=False)


def _field(tokenizer: Tokenizer) -> str:
    return "values" if tokenizer.kind == "integers" else "text"


def _spelled(tokenizer: Tokenizer, tokens: np.ndarray) -> str | list[int]:
    """The text or the values that tokens [T] stand for."""
    if tokenizer.kind == "integers":
        return values(tokenizer, tokens).tolist()
    return tokenizer.decode(tokens).decode(errors="replace")
