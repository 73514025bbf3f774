"""The command line: `python -m data_pipeline tokenizer | build | verify | inspect | overlap | decode`.

Parses, calls one function, prints what it returns. Exit codes: 0 done, 1 `verify` found problems, 2 an error, which
is one line on stderr. Progress and notices go to stderr, results to stdout.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from data_pipeline.build import build
from data_pipeline.config import (
    DUPLICATES,
    NORMALIZATIONS,
    PACKINGS,
    POLICIES,
    BuildSettings,
    TextSettings,
    parse_policies,
    parse_split,
    text_settings,
)
from data_pipeline.decode import decode_all, decode_document, decode_row, decode_split
from data_pipeline.errors import DataError
from data_pipeline.output import SEVERAL, as_path, counted, exit_code
from data_pipeline.overlap import MIN_TOKENS, TRAIN, find_overlap
from data_pipeline.overlap_report import overlap_summary, overlap_text
from data_pipeline.report import inspect, summary
from data_pipeline.staging import check_json, write_figures
from data_pipeline.store import Store
from data_pipeline.team import default_workers
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.training import TrainingSettings, train_tokenizer
from data_pipeline.verify import verify


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return exit_code(partial(_run, argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = make_parser().parse_args(argv)
    return cast(int, arguments.run(arguments))


def make_parser() -> argparse.ArgumentParser:
    """All commands and options. Defaults are those of the settings classes. Parsing may raise DataError."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline", description="Turn a corpus into a sharded Zarr store of long token sequences."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_tokenizer(commands.add_parser("tokenizer", help="train a SentencePiece tokenizer on a sample of a corpus"))
    _add_build(commands.add_parser("build", help="tokenize a corpus and pack it into a store"))
    _add_verify(commands.add_parser("verify", help="check a store against its manifest; exit code 1 on problems"))
    _add_inspect(commands.add_parser("inspect", help="show what a store holds"))
    _add_overlap(commands.add_parser("overlap", help="how much of held-out documents stands in training documents"))
    _add_decode(commands.add_parser("decode", help="get the exact text back"))
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    default = TrainingSettings
    _add_input(parser)
    _add_text(parser)
    parser.add_argument("--output", type=_output, required=True, metavar="FILE.model")
    parser.add_argument("--vocab-size", type=int, default=default.vocab_size, help="pieces (default: %(default)s)")
    parser.add_argument(
        "--model-type", choices=("unigram", "bpe"), default=default.model_type, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=default.max_bytes, help="size of the sample (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="draws the sample (default: %(default)s)")
    parser.set_defaults(run=_run_tokenizer)


def _run_tokenizer(arguments: argparse.Namespace) -> int:
    settings = TrainingSettings(
        inputs=tuple(arguments.input),
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        max_bytes=arguments.max_bytes,
        seed=arguments.seed,
        text=_text_of(arguments),
        policies=parse_policies(",".join(arguments.on_bad)),
    )
    trained = train_tokenizer(settings)
    tokenizer = load_tokenizer(str(settings.output))
    state = f"{settings.output}:" if trained else f"{settings.output} is already there:"
    print(state, f"{settings.model_type}, {tokenizer.vocab_size:,} pieces")
    return 0


def _add_build(parser: argparse.ArgumentParser) -> None:
    _add_input(parser, required=False)
    parser.add_argument(
        "--tokenizer",
        type=_tokenizer,
        required=True,
        metavar="FILE.model|bytes|integers",
        help="integers: of .npy and .npz (all arrays of one, or the one that --field names). An array of more than one "
        "dimension is a document for each item of its first, flattened: save a single piece flat, or with a leading "
        "dimension of 1",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="with --tokenizer integers: values are below N; BOS and EOS make it N + 2 tokens in all",
    )
    parser.add_argument("--output", type=_output, required=True, metavar="STORE")
    parser.add_argument("--append", action="store_true", help="add the documents to an existing store")
    _add_packing(parser)
    held_out = "shares of documents to hold out"
    parser.add_argument("--split", action="append", default=[], metavar="val=0.01,test=0.01", help=held_out)
    for split in ("val", "test"):
        parser.add_argument(
            f"--{split}-input",
            **SEVERAL,
            default=[],
            metavar="PATH",
            help=f"documents of the split {split}, not in --input; without --input they are all there is",
        )
    _add_text(parser)
    _add_duplicates(parser)
    parser.add_argument("--rows-per-shard", type=int, help="(default: as many as make 16M tokens, at most 256)")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the summary there as well")
    parser.add_argument(
        "--workers",
        type=int,
        help="processes (per rank under mpirun or srun; default: the cores that it may use, or 1 for a rank that "
        "shares a node without --cpus-per-task)",
    )
    parser.set_defaults(run=_run_build)


def _add_packing(parser: argparse.ArgumentParser) -> None:
    default = BuildSettings
    parser.add_argument("--seq-len", type=int, default=default.seq_len, help="tokens in a row (default: %(default)s)")
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=default.packing,
        help="bestfit: rows of their own for long documents, leftovers share rows; stream: end to end; book: windows "
        "of one document each (default: %(default)s)",
    )
    parser.add_argument(
        "--stride", type=int, metavar="TOKENS", help="with book: from one window to the next (default: --seq-len)"
    )
    parser.add_argument("--no-bos", dest="bos", action="store_false", help="no BOS before a document")
    parser.add_argument("--no-eos", dest="eos", action="store_false", help="no EOS after a document")


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    default = BuildSettings
    parser.add_argument(
        "--duplicates",
        choices=DUPLICATES,
        default=default.duplicates,
        help="keep: only count exact duplicates; drop: keep one of them, that of --test-input or --val-input if there "
        "is one; near: drop near-duplicates too (default: %(default)s)",
    )
    parser.add_argument(
        "--near-threshold",
        type=float,
        default=default.near_threshold,
        metavar="J",
        help="Jaccard similarity of word 5-grams that makes near-duplicates (default: %(default)s)",
    )


def _run_build(arguments: argparse.Namespace) -> int:
    settings = BuildSettings(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        seq_len=arguments.seq_len,
        packing=arguments.packing,
        stride=arguments.stride,
        bos=arguments.bos,
        eos=arguments.eos,
        split=parse_split(",".join(arguments.split)),
        val_inputs=tuple(arguments.val_input),
        test_inputs=tuple(arguments.test_input),
        text=_text_of(arguments),
        policies=parse_policies(",".join(arguments.on_bad)),
        duplicates=arguments.duplicates,
        near_threshold=arguments.near_threshold,
        append=arguments.append,
        rows_per_shard=arguments.rows_per_shard,
        workers=default_workers(os.environ) if arguments.workers is None else arguments.workers,
    )
    check_json(arguments.json)
    result = build(settings)
    if result.team.rank != 0:
        return 0
    if result.already_built:
        print(f"{settings.output} is already built from this input with these settings")
    _write_json(summary(result.store), arguments.json)  # before what is printed, whose reader may leave
    print(inspect(result.store))
    for note in result.notes:
        print(f"note: {note}")
    return 0


def _write_json(figures: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_figures(path, json.dumps(figures, indent=2) + "\n")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=_store, metavar="STORE")
    parser.add_argument("--quick", action="store_true", help="only the manifest, and presence and sizes of files")
    parser.add_argument(
        "--source",
        **SEVERAL,
        default=[],
        metavar="PATH",
        help="all inputs, including --val-input, --test-input and --append, to compare with the store",
    )
    parser.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
    problems = verify(arguments.store, arguments.quick, arguments.source)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{arguments.store}: {counted(len(problems), 'problem')}" if problems else f"{arguments.store}: sound")
    return 1 if problems else 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=_store, metavar="STORE")
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the figures there as well")
    parser.set_defaults(run=_run_inspect)


def _run_inspect(arguments: argparse.Namespace) -> int:
    check_json(arguments.json)
    store = Store.open(arguments.store)
    _write_json(summary(store), arguments.json)
    print(inspect(store))
    return 0


def _add_overlap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=_store, metavar="STORE")
    parser.add_argument("--held-out", **SEVERAL, metavar="SPLIT", help="splits of STORE (default: all but train)")
    parser.add_argument(
        "--train",
        **SEVERAL,
        type=_store,
        metavar="STORE",
        help="stores with the same tokenizer whose split train is searched (default: STORE itself)",
    )
    parser.add_argument(
        "--min-tokens",
        type=int,
        default=MIN_TOKENS,
        metavar="N",
        help="shorter runs that a held-out and a training document share do not count (default: %(default)s)",
    )
    parser.add_argument(
        "--worst", type=int, default=10, metavar="N", help="documents of each split that are listed (default: 10)"
    )
    parser.add_argument("--json", type=_output, metavar="FILE", help="write the figures there as well")
    parser.set_defaults(run=_run_overlap)


def _run_overlap(arguments: argparse.Namespace) -> int:
    check_json(arguments.json)
    store = Store.open(arguments.store)
    held_out = arguments.held_out or [split for split in store.manifest.splits if split != TRAIN]
    train = [Store.open(path) for path in arguments.train] if arguments.train else [store]
    overlaps = find_overlap(store, held_out, train, arguments.min_tokens, arguments.worst)
    figures = overlap_summary(store, held_out, train, arguments.min_tokens, overlaps)
    _write_json(figures, arguments.json)
    print(overlap_text(figures))
    return 0


def _add_decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=_store, metavar="STORE")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", metavar="NAME", help="write one document to stdout")
    what.add_argument("--row", type=int, metavar="N", help="write one row to stdout")
    what.add_argument(
        "--split",
        metavar="NAME",
        help='write each document of a split to stdout, a line of JSON: "name", and "text" or the "values" of integers',
    )
    what.add_argument(
        "--all",
        action="store_true",
        help="write every document to its name below --output. With the tokenizer integers the values come end to end, "
        "as little-endian unsigned integers of the fewest of 1, 2 and 4 bytes that --vocab-size needs",
    )
    parser.add_argument("--output", type=_output, metavar="DIR", help="for --all: a new or empty directory")
    parser.set_defaults(run=_run_decode)


def _run_decode(arguments: argparse.Namespace) -> int:
    if arguments.all != (arguments.output is not None):
        raise DataError("--all and --output DIR go together: --document, --row and --split write to stdout")
    store = Store.open(arguments.store)
    if arguments.all:
        print(f"{arguments.output}: {decode_all(store, arguments.output)} documents")
    elif arguments.document is not None:
        sys.stdout.buffer.writelines(decode_document(store, arguments.document))
    elif arguments.split is not None:
        sys.stdout.buffer.writelines(decode_split(store, arguments.split))
    else:
        sys.stdout.buffer.write(decode_row(store, arguments.row))
    return 0


def _add_input(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--input",
        **SEVERAL,
        required=required,
        default=[],
        metavar="PATH",
        help="files, folders, globs, fsspec URLs of these, or @FILE with one on each line: .txt, .jsonl, .parquet and "
        "FASTA (.fa, .fas, .fasta, .fna, .faa, .ffn, .frn), plain or .gz, .bgz, .zst, .xz; .npy and .npz for the "
        "tokenizer integers",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    default = TextSettings()
    parser.add_argument("--encoding", default=default.encoding, help="of text files (default: %(default)s)")
    parser.add_argument(
        "--normalize",
        **SEVERAL,
        choices=NORMALIZATIONS,
        default=[],
        help="bom: drop a byte order mark; newlines: CRLF and CR become LF; nfc: Unicode's normalization form C "
        "(default: every byte stays)",
    )
    parser.add_argument(
        "--field", default=default.field, help="field of JSON lines, column of Parquet (default: %(default)s)"
    )
    parser.add_argument(
        "--max-record-bytes",
        type=int,
        default=default.max_record_bytes,
        help="larger JSON lines and Parquet values are oversized (default: %(default)s)",
    )
    parser.add_argument(
        "--on-bad",
        action="append",
        default=[],
        metavar="PROBLEM=POLICY,...",
        help=f"what to do about bad documents, the default first: {'; '.join(map(_choices, POLICIES))}",
    )


def _output(text: str) -> Path:
    """Where to write. A URL would become a local folder named `s3:`."""
    return _local(
        text, "output goes to a folder of this machine: choose a local or mounted one, then copy what is there"
    )


def _store(text: str) -> Path:
    return _local(text, "a store is read from a folder of this machine: copy it to one, or mount it")


def _tokenizer(text: str) -> str:
    return str(_local(text, "a tokenizer is read from a file of this machine: copy it to one"))


def _local(text: str, expected: str) -> Path:
    if "://" in text:
        raise DataError(f"{text} is a URL, and {expected}")
    return as_path(text)


def _choices(problem: str) -> str:
    return f"{problem}={'|'.join(POLICIES[problem])}"


def _text_of(arguments: argparse.Namespace) -> TextSettings:
    return text_settings(arguments.encoding, tuple(arguments.normalize), arguments.field, arguments.max_record_bytes)
