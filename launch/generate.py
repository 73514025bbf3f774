"""Continue a text, or integers, with the model in a folder that launch/export.py wrote.

    python launch/generate.py exported "It was a dark and stormy night"
    python launch/generate.py exported "It was a dark" --tokens 200 --temperature 0.8 --top-p 0.9 --seed 0
    python launch/generate.py exported "" --temperature 0              a new document; the likeliest token each time
    python launch/generate.py exported - < chapter.txt > longer.txt    the text of standard input, its last newline too
    python launch/generate.py exported "67 60 52 48"                   a model of integers: values, with spaces between

The text and its continuation go to standard output as the tokens are drawn, and nothing else does; bytes that are not
UTF-8 are replaced. It ends where the model ends the document, which a note on standard error says, or after --tokens.
The same arguments give the same text, on the same device.

The prompt takes one forward pass. What attention needs of it is kept (reformer/decoding.py), so that no token after it
takes another; seconds are in benchmarks/LOG.md.
"""

import argparse
import codecs
import io
import os
import sys
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from data_pipeline.output import exit_code
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import Ends, read_tokenizer
from reformer import ConfigError, Reformer, ReformerConfig
from reformer.decoding import Decoder
from reformer.generation import check_continuation, continue_tokens
from trainer.exported import read_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EXPORT", help="folder that launch/export.py wrote")
    parser.add_argument("prompt", metavar="PROMPT", help="what to continue; - reads it from standard input")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="to add, at most (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits; 0 takes the likeliest token (default: 1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this probability (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda where there is one)")
    return parser.parse_args()


def read_folder(folder: Path) -> tuple[Reformer, Tokenizer, Ends]:
    """The model, its tokenizer, and what its documents have around them.

    Raises ConfigError or DataError where the folder is not an export, is damaged, or has no tokenizer.
    """
    model = read_model(folder, str(folder)).eval()
    tokenizer, ends = read_tokenizer(folder)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer of {folder} has {tokenizer.vocab_size} tokens, and its model {model.config.vocab_size}: "
            "export the model again"
        )
    return model, tokenizer, ends


def read_prompt(argument: str) -> bytes:
    """The bytes that were typed, or those of standard input."""
    return sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)


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
        if not (word.isdigit() and int(word) < n_values):
            raise ConfigError(
                f"the prompt has {word.decode(errors='replace')!r} in it: this model continues integers from 0 to "
                f"{n_values - 1}, with spaces between them"
            )
    return np.array([int(word) for word in words], np.int64)


def spelling(tokenizer: Tokenizer) -> Callable[[Tensor], str]:
    """What turns ids [n] that come one after another into text; without ids, what is left of the text."""
    if tokenizer.kind == "integers":
        return lambda ids: "".join(f"{value} " for value in ids.tolist() if value < tokenizer.bos_id)
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda ids: characters.decode(tokenizer.decode(ids.cpu().numpy()), final=not len(ids))


def check_draws(config: ReformerConfig, tokens: Tensor, n_tokens: int, draws: Mapping[str, float]) -> None:
    """Raises ConfigError where the tokens [T] cannot be continued so."""
    try:
        check_continuation(config, tokens, n_tokens, **draws)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def within_documents(model: Reformer, tokenizer: Tokenizer, eos: bool) -> Callable[[Tensor], Tensor]:
    """The model as `continue_tokens` asks for it, without what it has never been taught to predict: BOS, or any EOS."""
    decoder = Decoder(model)
    never = [tokenizer.bos_id] if eos else [tokenizer.bos_id, tokenizer.eos_id]

    def forward(tokens: Tensor) -> Tensor:
        logits = decoder(tokens).clone()
        logits[..., never] = -torch.inf
        return logits

    return forward


def text_of(
    model: Reformer,
    tokenizer: Tokenizer,
    tokens: Tensor,
    n_tokens: int,
    eos: bool,
    *,
    temperature: float,
    top_p: float,
    seed: int,
) -> Generator[str, None, int | None]:
    """The text of tokens [T], and then of each token that the model adds, to the end of the document or n_tokens.

    A character whose bytes are several tokens comes with the last of them. Returns how many tokens were added before
    the model ended the document, None where it did not.
    """
    spelled, forward = spelling(tokenizer), within_documents(model, tokenizer, eos)
    yield spelled(tokens)
    for n_added in range(n_tokens):  # one at a time, which gives the same tokens as all at once
        added = continue_tokens(forward, model.config, tokens, 1, temperature=temperature, top_p=top_p, seed=seed)
        if int(added) == tokenizer.eos_id:
            yield spelled(tokens[:0])
            return n_added
        tokens = torch.cat([tokens, added])
        yield spelled(added)
    yield spelled(tokens[:0])
    return None


def print_all(pieces: Generator[str, None, int | None]) -> int | None:
    """Each as it comes. Returns what the generator does."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return cast(int | None, end.value)


def choose_device(name: str | None) -> torch.device:
    """The one that was asked for, or the best that there is. Raises ConfigError where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; leave it out, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(arguments: argparse.Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the terminal's is: the text is to be had as it is
    draws = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    device = choose_device(arguments.device)
    model, tokenizer, ends = read_folder(arguments.folder)
    tokens = encode(read_prompt(arguments.prompt), tokenizer, ends.bos).to(device)
    check_draws(model.config, tokens, arguments.tokens, draws)  # before anything is printed
    pieces = text_of(model.to(device), tokenizer, tokens, arguments.tokens, ends.eos, seed=arguments.seed, **draws)
    n_added = print_all(pieces)
    if n_added is not None:
        print(f"note: the model ended the document after {n_added} tokens", file=sys.stderr)


def main() -> int:
    return exit_code(partial(run, parse_arguments()), ConfigError, FloatingPointError)


if __name__ == "__main__":
    sys.exit(main())
