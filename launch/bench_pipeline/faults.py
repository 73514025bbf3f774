"""`python launch/benchmark.py pipeline-faults`: what a build survives and a store notices, counted.

    python launch/benchmark.py pipeline-faults kills --times 50 --json benchmarks/pipeline-kills.json
    python launch/benchmark.py pipeline-faults flips --times 2000 --json benchmarks/pipeline-flips.json

`kills`: SIGKILL at random moments. `flips`: single bits. What exactly is done and asked for: kills.py and flips.py in
launch/bench_pipeline. A seed decides moments, victims and bits. A table goes to stdout; the exit code is 1 if anything
failed.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.process import machine, write

from bench_pipeline.flips import Flip, flips
from bench_pipeline.kills import Trial, kills
from data_pipeline.output import counted


def add_command(commands: Any) -> None:
    """The command `pipeline-faults` among the others, and its options."""
    parser = commands.add_parser(
        "pipeline-faults",
        help="what a build survives and a store notices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("kills", "flips"))
    parser.add_argument("--times", type=int, help="kills (default: 50) or flips (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=40_000_000, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all that was seen")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> int:
    begun = time.perf_counter()
    results: Sequence[Trial] | Sequence[Flip]
    if arguments.part == "kills":
        results = trials = kills(arguments.times or 50, arguments.seed, arguments.bytes)
        failed = sum(not trial.passed for trial in trials)
        done = f"{counted(sum(len(trial.kills) for trial in trials), 'kill')} in {counted(len(trials), 'build')}"
        print(f"{done}, {failed} of which did not come out as if undisturbed")
    else:
        results = flipped = flips(arguments.times or 2000, arguments.seed)
        failed = sum(result.verify == "nothing" or result.reading == "wrong" for result in flipped)
    if arguments.json:
        record = {"command": shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]]), **machine()}
        seconds = time.perf_counter() - begun
        write(arguments.json, {**record, "seconds": seconds, "results": [asdict(result) for result in results]})
    return int(failed > 0)
