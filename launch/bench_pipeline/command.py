"""`python launch/benchmark.py pipeline`: speed, memory, size and reach of the data pipeline, beside its peers.

    python launch/benchmark.py pipeline --corpus novels/ --json benchmarks/pipeline-cpu.json
    python launch/benchmark.py pipeline --parts tokenize read --rounds 5 --corpus novels/

Without --corpus the text is the sources of Python's own standard library. All but `size` takes the first corpus.
Every measurement is a command in processes of its own; where several are compared they are taken in turn, round after
round, and the table has medians with the smallest and largest. What exactly each part measures: the docstrings of
tokenizing.py and parts.py in launch/bench_pipeline.

The JSON file has the machine, the versions, every measurement under `results`, and what is said about them under
`figures`. It is written after every part.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.corpora import write_standard_library
from bench.process import machine, n_cores, write

from bench_pipeline.common import ROOT, Bench, FailedError, Result, texts_of
from bench_pipeline.figures import FIGURES, lines_of
from bench_pipeline.parts import PARTS
from data_pipeline.errors import DataError
from data_pipeline.output import SEVERAL, positive
from trainer.record import installed_version

PACKAGES = ("datatrove", "fsspec", "longhand", "mpi4py", "numpy", "sentencepiece", "tokenizers", "zarr", "zstandard")


def add_command(commands: Any) -> None:
    """The command `pipeline` among the others, and its options."""
    parser = commands.add_parser(
        "pipeline",
        help="speed, memory, size and reach of the data pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", **SEVERAL, choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--corpus", type=Path, **SEVERAL, metavar="PATH", help="folders of .txt files, or single files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write hardware, versions and all measurements")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs", metavar="DIR", help="for files that are removed in the end"
    )
    parser.add_argument(
        "--mds-python",
        type=Path,
        default=ROOT / ".venv" / "mds" / "bin" / "python",
        metavar="FILE",
        help="the Python of an environment with launch/bench_pipeline/mosaicml.txt (default: .venv/mds/bin/python)",
    )
    workers = sorted({1, min(2, n_cores())})
    parser.add_argument("--workers", type=positive, **SEVERAL, default=workers, help="(default: 1 2, if there are two)")
    for name, default, text in (
        ("--rounds", 3, "of `tokenize` and `read`"),
        ("--budget-s", 1800, "for one command"),
        ("--vocab-size", 32_000, "pieces of the tokenizers"),
        ("--seq-len", 65_536, "tokens in a row"),
        ("--documents", 100_000, "tiny ones of `memory`"),
        ("--steps", 12, "of training in `stall`"),
        ("--scale-documents", 1_000_000, "documents of `scale`"),
    ):
        parser.add_argument(name, type=positive, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    for name, amount, text in (
        ("--tokenize-mb", 500.0, "text of `tokenize`: the corpus, repeated"),
        ("--document-mb", 500.0, "the one document of `memory`"),
        ("--scale-tb", 1.0, "text of `scale`"),
    ):
        parser.add_argument(name, type=float, default=amount, metavar="X", help=f"{text} (default: %(default)g)")
    parser.set_defaults(main=main)


def new_record(results: list[Result]) -> Result:
    """The record of a run; its results and figures grow."""
    about = machine()
    about["versions"] |= {package: found for package in PACKAGES if (found := installed_version(package))}
    command = shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]])
    return {"command": command, "what": "pipeline", **about, "figures": {}, "results": results}


def corpora_of(arguments: argparse.Namespace, folder: Path) -> list[Path]:
    """The corpora that were asked for, each with some text. Raises DataError if one has none."""
    if not arguments.corpus:
        corpus = folder / "standard-library"
        write_standard_library(corpus)
        return [corpus]
    for corpus in arguments.corpus:
        if not corpus.exists() or not any(path.stat().st_size for path in texts_of(corpus)):
            raise DataError(f"no text in {corpus}: name a folder with .txt files, or a file")
    return [corpus.absolute() for corpus in arguments.corpus]


def run(arguments: argparse.Namespace, folder: Path) -> Result:
    """All parts; prints and writes after each."""
    results: list[Result] = []
    record = new_record(results)

    def keep(result: Result) -> None:
        results.append(result)
        print(json.dumps(result), file=sys.stderr, flush=True)

    bench = Bench(arguments, folder, corpora_of(arguments, folder), keep)
    for part in arguments.parts:
        if arguments.json:  # before the first part too: that it cannot be written should not be learnt in an hour
            write(arguments.json, record)
        try:
            PARTS[part](bench)
        except (FailedError, DataError) as error:
            keep({"part": part, "error": str(error)})
        if part in FIGURES:
            record["figures"][part] = FIGURES[part](results)
        print("\n".join(lines_of(part, results)), flush=True)
    if arguments.json:
        write(arguments.json, record)
    return record


def main(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if anything failed; what is left out for want of a package is no failure."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-pipeline-", dir=arguments.work) as folder:
        record = run(arguments, Path(folder).absolute())
    return int(any("error" in result for result in record["results"]))
