"""Continue a text, or integers, with the model in a folder that launch/export.py wrote.

    python launch/generate.py exported "It was a dark and stormy night"
    python launch/generate.py exported "It was a dark" --tokens 200 --temperature 0.8 --top-p 0.9 --seed 0
    python launch/generate.py exported "" --temperature 0              a new document; the likeliest token each time
    python launch/generate.py exported - < chapter.txt > longer.txt    the text of standard input, its last newline too
    python launch/generate.py exported - --last 8000 < book.txt        its last 8,000 tokens, if it is too long
    python launch/generate.py exported "67 60 52 48"                   a model of integers: values, with spaces between
    python launch/generate.py exported - < piece.npy                   or an array of them
    python launch/generate.py exported "" --samples 16 --output new    16 files, new/seed0000.txt and so on
    python launch/generate.py exported --prompts prompts.jsonl > new.jsonl    a prompt, and its continuation, a line

The text and its continuation go to standard output as the tokens are drawn, and nothing else does; bytes that are not
UTF-8 are replaced. It ends where the model ends the document, which a note on standard error says, or after --tokens.
The same arguments give the same text, on the same device.

With --output nothing is printed: the seeds --seed, --seed + 1, … write a file each, with the text's bytes as they are
(.txt) or the integers as an array (.npy).

--prompts takes objects with a "text", or for models of integers with "values", and gives each back for each seed, as
soon as it is drawn, with prompt, seed, continuation and ended in place of these (trainer/prompts.py). Held-out
documents, of which the first 1,000 tokens are continued:

    python -m data_pipeline decode data/books_cpu --split val |
        python launch/generate.py exported --prompts - --first 1000 > new.jsonl

A prompt takes one forward pass, for all samples. What attention needs of it is kept (reformer/decoding.py), so that
no token after it takes another; seconds are in benchmarks/LOG.md. Samples of a prompt are drawn side by side, up to 16
that fit into 2 GiB, and written when all of these are drawn: who interrupts it loses them alone.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.bar import Bar
from data_pipeline.output import as_path, exit_code, positive
from data_pipeline.staging import check_writable, staged
from data_pipeline.tokenizer import Tokenizer
from reformer import ConfigError, Reformer, ReformerConfig
from reformer.generation import check_continuation
from trainer.exported import choose_device, read_generator
from trainer.prompts import Prompt, continuation_line, read_prompts
from trainer.sampling import Continuations, at_once, encode, spelling, values

MOST_SAMPLES = 1_000_000
"""Far more than are of use: a typing error does not fill memory with names of files."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=as_path, metavar="EXPORT", help="folder that launch/export.py wrote")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to continue; - reads it from standard input")
    what.add_argument("--prompts", metavar="FILE", help="lines of JSON to continue; - reads standard input")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--first", type=positive, metavar="N", help="of each prompt the first N tokens (default: all)")
    part.add_argument("--last", type=positive, metavar="N", help="of each prompt the last N tokens")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to add (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits; 0 takes the likeliest token (default: 1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this probability (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws, from 0 on (default: 0)")
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="how many; several need --output or --prompts (default: 1)"
    )
    parser.add_argument("--output", type=as_path, metavar="FOLDER", help="write a file for each, replacing none")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cuda where there is one)")
    return parser.parse_args()


def read_prompt(argument: str) -> bytes:
    """The bytes that were typed, or those of standard input."""
    if argument != "-" and os.path.isfile(argument):  # noqa: PTH113 (Path's raises for long prompts)
        print("note: the prompt is the name of a file; to continue what is in it, give - and < FILE", file=sys.stderr)
    return sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)


def read_file(argument: str, tokenizer: Tokenizer, bos: bool, n_first: int | None, n_last: int | None) -> list[Prompt]:
    """The prompts in a file, or in standard input. Raises ConfigError where one is wrong, or there is none."""
    name = "standard input" if argument == "-" else argument
    try:
        with nullcontext(sys.stdin.buffer) if argument == "-" else Path(argument).open("rb") as lines:
            prompts = list(read_prompts(lines, name, tokenizer, bos, n_first, n_last))
    except OSError as error:
        raise ConfigError(f"cannot read --prompts {name}: {error.strerror}: give a file of JSON lines") from None
    if not prompts:
        raise ConfigError(f"{name} has no prompts: give a line of JSON for each")
    return prompts


def check_draws(
    config: ReformerConfig, tokens: Tensor, n_tokens: int, draws: Mapping[str, float], bos_id: int, place: str = ""
) -> None:
    """Raises ConfigError where the tokens [T] cannot be continued so.

    place: what the error begins with.
    """
    try:
        check_continuation(config, tokens, n_tokens, **draws)
    except ValueError as error:
        more = ""
        if "max_seq_len" in str(error):
            counted = " (BOS, which the prompt begins with, is one of them)" if tokens[0] == bos_id else ""
            end = ", or take the end of the prompt with --last N" if n_tokens < config.max_seq_len else ""
            more = f"{counted}{end}"
        raise ConfigError(f"{place}{error}{more}") from None


def print_text(tokenizer: Tokenizer, tokens: Tensor, added: Iterable[int]) -> None:
    """The text of tokens [T], and then of each that is added; a character of several tokens comes with the last."""
    spelled, n_to_end = spelling(tokenizer), None
    print(spelled(tokens), end="", flush=True)
    for n_before, token in enumerate(added):
        if token == tokenizer.eos_id:
            n_to_end = n_before
        else:
            print(spelled(torch.tensor([token])), end="", flush=True)
    print(spelled(tokens[:0]))
    if n_to_end is not None:
        print(f"note: the model ended the document after {n_to_end} tokens", file=sys.stderr)


def write_sample(file: Path, tokenizer: Tokenizer, tokens: np.ndarray) -> None:
    """The bytes that tokens [T] stand for, or the values of integers as an array; BOS and EOS are not among them."""
    with staged(file) as unfinished, unfinished.open("xb") as stream:
        if tokenizer.kind == "integers":
            np.save(stream, values(tokenizer, tokens))
        else:
            stream.write(tokenizer.decode(tokens))


def drawn(
    continuations: Continuations, seeds: Sequence[int], n_tokens: int, progress: Bar, **draws: float
) -> Iterator[tuple[int, list[int]]]:
    """Of each seed the up to n_tokens tokens that it adds."""
    side_by_side = at_once(continuations.model.config, len(continuations.prompt_T) + n_tokens)
    for start in range(0, len(seeds), side_by_side):
        added: dict[int, list[int]] = {seed: [] for seed in seeds[start : start + side_by_side]}
        for step in continuations.draw(n_tokens, seeds=list(added), **draws):
            for seed, token in step.items():
                added[seed].append(token)
            progress.update(len(step))
        for seed, tokens in added.items():
            yield seed, tokens
            progress.update(n_tokens - len(tokens))  # of a document that ended


def write_samples(files: Mapping[int, Path], continuations: Continuations, n_tokens: int, **draws: float) -> None:
    """A file for each seed, of the prompt and up to n_tokens tokens that are added to it."""
    prompt = continuations.prompt_T.tolist()
    with Bar(desc="generate", total=len(files) * n_tokens, unit="token") as progress:
        for seed, tokens in drawn(continuations, list(files), n_tokens, progress, **draws):
            write_sample(files[seed], continuations.tokenizer, np.array([*prompt, *tokens]))


def print_lines(
    prompts: Sequence[Prompt],
    model: Reformer,
    tokenizer: Tokenizer,
    eos: bool,
    seeds: Sequence[int],
    n_tokens: int,
    **draws: float,
) -> None:
    """Of each prompt, a line of JSON for each seed."""
    device = next(model.parameters()).device
    with Bar(desc="generate", total=len(prompts) * len(seeds) * n_tokens, unit="token") as progress:
        for prompt in prompts:
            continuations = Continuations(model, tokenizer, prompt.tokens.to(device), eos, len(seeds))
            for seed, tokens in drawn(continuations, seeds, n_tokens, progress, **draws):
                print(continuation_line(prompt, tokenizer, seed, tokens), flush=True)


def sample_files(folder: Path, tokenizer: Tokenizer, seeds: range) -> dict[int, Path]:
    """By seed. Raises ConfigError where there is one already, and DataError where none can be written."""
    ending = "npy" if tokenizer.kind == "integers" else "txt"
    files = {seed: folder / f"seed{seed:04d}.{ending}" for seed in seeds}
    check_writable(folder, f"--output {folder}")
    if there := [seed for seed, file in files.items() if file.exists() or file.is_symlink()]:
        rest = len(seeds) - (there[-1] - seeds[0] + 1)
        go_on = f"--seed {there[-1] + 1}" + (f" --samples {rest} goes on behind it" if rest else "")
        raise ConfigError(f"{files[there[0]]} exists: give another --output; or {go_on}")
    return files


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for what does not go together."""
    is_one_to_print = arguments.output is None and arguments.prompts is None
    if arguments.samples > MOST_SAMPLES:
        raise ConfigError(f"--samples {arguments.samples} is more than {MOST_SAMPLES:,}: give fewer")
    if arguments.samples < 1 or (arguments.samples > 1 and is_one_to_print):
        raise ConfigError(
            f"--samples {arguments.samples}: give at least 1, and --output FOLDER or --prompts for more than one"
        )
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed} must be at least 0")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise ConfigError(f"--samples {arguments.samples} with --temperature 0 would all be the same: leave out one")
    if arguments.prompts is not None and arguments.output is not None:
        raise ConfigError("--prompts writes lines to standard output: leave out --output, and add > FILE")


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    draws = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    device = choose_device(arguments.device)
    model, tokenizer, ends = read_generator(arguments.folder)
    part = (ends.bos, arguments.first, arguments.last)
    if arguments.prompts is not None:
        prompts = read_file(arguments.prompts, tokenizer, *part)
        for prompt in prompts:
            check_draws(model.config, prompt.tokens, arguments.tokens, draws, tokenizer.bos_id, f"{prompt.place}: ")
        print_lines(prompts, model.to(device), tokenizer, ends.eos, seeds, arguments.tokens, **draws)
        return
    tokens = encode(read_prompt(arguments.prompt), tokenizer, *part).to(device)
    check_draws(model.config, tokens, arguments.tokens, draws, tokenizer.bos_id)  # before anything is printed
    continuations = Continuations(model.to(device), tokenizer, tokens, ends.eos, arguments.samples)
    if arguments.output is None:
        steps = continuations.draw(arguments.tokens, seeds=seeds, **draws)
        print_text(tokenizer, tokens, (step[arguments.seed] for step in steps))
    else:
        write_samples(sample_files(arguments.output, tokenizer, seeds), continuations, arguments.tokens, **draws)


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), ConfigError, FloatingPointError)


if __name__ == "__main__":
    sys.exit(main())
