"""What a build survives and a store notices, counted: kills at random moments, and flipped bits.

    python launch/pipeline_faults.py kills --times 50 --json benchmarks/pipeline-kills.json
    python launch/pipeline_faults.py flips --times 2000 --json benchmarks/pipeline-flips.json

What exactly is done and asked for: kills.py and flips.py in launch/bench_pipeline. A seed decides moments, victims
and bits. A table goes to stdout; the exit code is 1 if anything failed.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.process import machine, write
from bench_pipeline.flips import Flip, flips
from bench_pipeline.kills import Trial, kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "flips"))
    parser.add_argument("--times", type=int, help="kills (default: 50) or flips (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=40_000_000, help="size of the corpus (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for all that was seen")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    results: Sequence[Trial] | Sequence[Flip]
    if arguments.what == "kills":
        results = trials = kills(arguments.times or 50, arguments.seed, arguments.bytes)
        failed = sum(not trial.passed for trial in trials)
        total = sum(len(trial.kills) for trial in trials)
        print(f"{total} kills in {len(trials)} builds, {failed} of which did not come out as if undisturbed")
    else:
        results = flipped = flips(arguments.times or 2000, arguments.seed)
        failed = sum(result.verify == "nothing" or result.reading == "wrong" for result in flipped)
    if arguments.json:
        record = {"command": shlex.join(["python", "launch/pipeline_faults.py", *sys.argv[1:]]), **machine()}
        seconds = time.perf_counter() - begun
        write(arguments.json, {**record, "seconds": seconds, "results": [asdict(result) for result in results]})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
