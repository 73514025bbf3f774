"""The command line: `python -m data_pipeline tokenizer | build | verify | inspect | decode`.

Parses, calls one function, prints what it returns. Exit codes: 0 done, 1 `verify` found problems, 2 an error, which
is one line on stderr. Progress and notices go to stderr, results to stdout.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.config import PACKINGS, BuildSettings, available_cpus, parse_split
from data_pipeline.decode import decode_all, decode_document, decode_row
from data_pipeline.errors import DataError
from data_pipeline.report import inspect, summarize
from data_pipeline.store import Store
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.training import TrainingSettings, train_tokenizer
from data_pipeline.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = make_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough, as with `decode … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # disk full, no permission: the system's words name the file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return code


def make_parser() -> argparse.ArgumentParser:
    """All commands and options. Defaults are those of the settings classes."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="Turn a corpus into a sharded Zarr store of long token sequences."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenizer(commands.add_parser("tokenizer", help="train a SentencePiece tokenizer on a sample of a corpus"))
    _add_build(commands.add_parser("build", help="tokenize a corpus and pack it into a store"))
    _add_verify(commands.add_parser("verify", help="check a store against its manifest; exit code 1 on problems"))
    _add_inspect(commands.add_parser("inspect", help="show what a store holds"))
    _add_decode(commands.add_parser("decode", help="get the exact text back"))
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    default = TrainingSettings
    _add_input(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.model")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, help="pieces (default: %(default)s)")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default=default.model_type, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=default.max_bytes, help="size of the sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="draws the sample (default: %(default)s)")
    _add_workers(parser)
    parser.set_defaults(run=_run_tokenizer)


def _run_tokenizer(arguments: argparse.Namespace) -> int:
    settings = TrainingSettings(
        inputs=tuple(arguments.input),
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        max_bytes=arguments.max_bytes,
        seed=arguments.seed,
        workers=arguments.workers,
    )
    trained = train_tokenizer(settings)
    tokenizer = load_tokenizer(str(settings.output))
    state = f"{settings.output}:" if trained else f"{settings.output} is already there:"
    print(state, f"{settings.model_type}, {tokenizer.vocab_size:,} pieces")
    return 0


def _add_build(parser: argparse.ArgumentParser) -> None:
    default = BuildSettings
    _add_input(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FILE.model|bytes")
    parser.add_argument("--output", type=Path, required=True, metavar="STORE")
    parser.add_argument("--seq-len", type=int, default=default.seq_len, help="tokens in a row (default: %(default)s)")
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=default.packing,
        help="bestfit: rows of their own for long documents, leftovers share rows; stream: end to end "
        "(default: %(default)s)",
    )
    parser.add_argument("--split", default="", metavar="val=0.01,test=0.01", help="shares of documents to hold out")
    parser.add_argument(
        "--val-input", type=Path, nargs="+", default=[], metavar="PATH", help="documents of the split val"
    )
    parser.add_argument("--rows-per-shard", type=int, default=default.rows_per_shard, help="(default: %(default)s)")
    _add_workers(parser)
    parser.set_defaults(run=_run_build)


def _run_build(arguments: argparse.Namespace) -> int:
    settings = BuildSettings(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        seq_len=arguments.seq_len,
        packing=arguments.packing,
        split=parse_split(arguments.split) if arguments.split else {},
        val_inputs=tuple(arguments.val_input),
        rows_per_shard=arguments.rows_per_shard,
        workers=arguments.workers,
    )
    result = build(settings)
    if result.already_built:
        print(f"{settings.output} is already built from this input with these settings")
    print(summarize(result.store))
    for note in result.notes:
        print(f"note: {note}")
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--quick", action="store_true", help="only the manifest, and presence and sizes of files")
    parser.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
    problems = verify(arguments.store, arguments.quick)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{arguments.store}: {len(problems)} problems" if problems else f"{arguments.store}: sound")
    return 1 if problems else 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace) -> int:
    print(inspect(Store.open(arguments.store)))
    return 0


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", metavar="NAME", help="write one document to stdout")
    what.add_argument("--row", type=int, metavar="N", help="write one row to stdout")
    what.add_argument("--all", action="store_true", help="write every document to its name below --output")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for --all: a new or empty directory")
    parser.set_defaults(run=_run_decode)


def _run_decode(arguments: argparse.Namespace) -> int:
    if arguments.all != (arguments.output is not None):
        raise DataError("--all and --output DIR go together: --document and --row write to stdout")
    store = Store.open(arguments.store)
    if arguments.all:
        print(f"{arguments.output}: {decode_all(store, arguments.output)} documents")
    elif arguments.document is not None:
        sys.stdout.buffer.writelines(decode_document(store, arguments.document))
    else:
        sys.stdout.buffer.write(decode_row(store, arguments.row))
    return 0


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders with .txt files"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes (default: %(default)s)")
