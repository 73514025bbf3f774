"""Measure one training step against what a user would pick instead, in one run, interleaved.

    python launch/benchmark.py model --seq-len 1024 4096 16384 65536 --json model.json
    python launch/benchmark.py attention --seq-len 4096 16384 65536 --peers ours dense
    python launch/benchmark.py memory --json memory.json --plot memory.png
    python launch/benchmark_plot.py model.json --output model.png

`model` and `attention` are about time: every measurement is a process of its own, with its own peak memory; it builds
the model and takes steps (forward and backward) for a few seconds, the first of which does not count, or one step
where that is long. Rounds go through all peers in turn. The table has medians with the smallest and largest, the peak
memory and what of it the process had used once it had imported its libraries, multiples of ours, and the growth from
the length before as if that were four times shorter. The JSON file is written after every length, and has every step of
every measurement. `memory`, `pipeline`, `pipeline-faults` and `faults` say themselves what they are, with --help.

Lengths are measured from short to long. What the shorter ones say would take longer than the budget or more than
the allowed share of the machine's memory is left out, and a measurement is stopped at the budget: the table says so.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch
from bench.peers import PEERS, Peer, Sizes, Step, step_on
from bench.process import (
    Limits,
    Result,
    Summary,
    add_options,
    begin,
    chosen,
    in_a_process,
    left_out,
    measure_peers,
    missing,
    new_record,
    reason,
    sizes_of,
    summaries,
    write,
)
from bench_faults import command as faults
from bench_memory import command as memory
from bench_pipeline import command as pipeline
from bench_pipeline import faults as pipeline_faults

from data_pipeline.output import SEVERAL, exit_code, positive
from trainer.memory import peak_gib

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEAT_S, REPEAT_STEPS = 3.0, 10
"""Steps are repeated for so long after the first, or so often."""
COLD_S = 20.0
"""A first step that takes longer is the only one: what happens once (allocation, compilation) is small beside it."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, meaning in (("attention", "time of one layer of attention"), ("model", "time of a whole model")):
        command = commands.add_parser(what, help=meaning, description=meaning)
        command.add_argument(
            "--seq-len", type=positive, **SEVERAL, default=[65_536], metavar="T", help="(default: 65536)"
        )
        command.add_argument(
            "--dtype",
            choices=DTYPES,
            default="float32",
            help="of weights and activations; Longhand's residual streams stay in float32, Hugging Face's model runs "
            "by autocast (default: %(default)s)",
        )
        add_options(command, rounds="measurements of each")
        command.set_defaults(main=time_steps)
    for other in (memory, pipeline, pipeline_faults, faults):
        other.add_command(commands)
    return parser.parse_args()


# What one process measures.


def measure_here(peer: Peer[Step], sizes: Sizes, dtype: torch.dtype, threads: int, budget_s: float) -> Result:
    """Build the peer and time its steps, in this process."""
    imports_gib = begin(peer, threads)
    step = step_on(peer, sizes, torch.device("cpu"), dtype)
    step_s: list[float] = []
    while not enough(step_s, budget_s):
        begun = time.perf_counter()
        step()
        step_s.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(step_s[1:] or step_s),
        "peak_gib": peak_gib(torch.device("cpu")),
        "imports_gib": imports_gib,
        "threads": torch.get_num_threads(),
        "step_s": step_s,
    }


def enough(step_s: Sequence[float], budget_s: float) -> bool:
    """Whether these steps will do, so that a long first step is the only one and others do not count their first."""
    if not step_s:
        return False
    first, *counted = step_s
    return first > min(COLD_S, budget_s / 3) or sum(counted) >= REPEAT_S or len(counted) >= REPEAT_STEPS


def measure(arguments: argparse.Namespace, name: str, sizes: Sizes) -> Result:
    """The same in a new process."""
    asked = {name: getattr(arguments, name) for name in ("dtype", "threads", "budget_s")}
    return in_a_process(arguments.what, {**asdict(sizes), **asked, "worker": name}, arguments.budget_s)


def measure_length(
    arguments: argparse.Namespace, names: Sequence[str], seq_len: int, earlier: Sequence[Result], budget_gib: float
) -> list[Result]:
    """All results at one length, peers in turn."""
    limits = Limits(arguments.budget_s, budget_gib)

    def skip(name: str) -> Result | None:
        mine = [result for result in earlier if result["peer"] == name]
        return missing(PEERS[arguments.what][name]) or left_out(mine, seq_len, limits)

    return measure_peers(
        names,
        skip,
        lambda name: measure(arguments, name, sizes_of(arguments, seq_len)),
        arguments.rounds,
        arguments.budget_s,
        {"seq_len": seq_len},
    )


# What is said about it.


def growth(shorter: tuple[int, float], longer: tuple[int, float]) -> float:
    """The factor between two (length, value) for four times the length."""
    return (longer[1] / shorter[1]) ** (math.log(4) / math.log(longer[0] / shorter[0]))


HEADER = (
    f"{'tokens':>9}  {'peer':<12}{'seconds (min..max)':>26}{'peak GiB (imports)':>20}"
    f"{'x time':>9}{'x memory':>10}{'per 4x length':>15}"
)


def table(results: Sequence[Result], seq_len: int) -> str:
    """The rows of one length; the growth needs the results of shorter ones too."""
    ours = summaries([result for result in results if result["peer"] == "ours"]).get(seq_len)
    rows = []
    for peer in dict.fromkeys(result["peer"] for result in results):
        mine = [result for result in results if result["peer"] == peer]
        here = next((result for result in mine if result["seq_len"] == seq_len), None)
        if here:
            rows.append(f"{seq_len:>9,}  {peer:<12}" + (cells(summaries(mine), seq_len, ours) or f"    {reason(here)}"))
    return "\n".join(rows)


def cells(at: dict[int, Summary], seq_len: int, ours: Summary | None) -> str | None:
    """What follows the name of a peer with these measurements in the row of one length; None without any there."""
    if (here := at.get(seq_len)) is None:
        return None
    seconds = f"{here.seconds:.2f} ({here.fastest:.2f}..{here.slowest:.2f})"
    memory = f"{here.peak_gib:.2f} ({here.imports_gib:.2f})"
    multiples = (f"{here.seconds / ours.seconds:.2f}", f"{here.peak_gib / ours.peak_gib:.2f}") if ours else ("-", "-")
    shorter = [length for length in at if length < seq_len]
    grown = f"{growth((shorter[-1], at[shorter[-1]].seconds), (seq_len, here.seconds)):.2f}" if shorter else "-"
    return f"{seconds:>26}{memory:>20}{multiples[0]:>9}{multiples[1]:>10}{grown:>15}"


def run(arguments: argparse.Namespace) -> list[Result]:
    """All lengths, from short to long; prints and writes after each."""
    names = chosen(arguments.peers, list(PEERS[arguments.what]))
    results: list[Result] = []
    record = new_record(arguments.what, arguments, results)
    print(HEADER, flush=True)
    for seq_len in sorted(set(arguments.seq_len)):
        if arguments.json:  # before the first length too: that it cannot be written should not be learnt in an hour
            write(arguments.json, record)
        results += measure_length(arguments, names, seq_len, results, arguments.memory_share * record["ram_gib"])
        print(table(results, seq_len), flush=True)
    if arguments.json:
        write(arguments.json, record)
    return results


def time_steps(arguments: argparse.Namespace) -> int:
    """The exit code of `model` and `attention`: 1 if nothing could be measured."""
    if arguments.worker:
        peer = PEERS[arguments.what][arguments.worker]
        sizes = sizes_of(arguments, arguments.seq_len[0])
        dtype = DTYPES[arguments.dtype]
        print(json.dumps(measure_here(peer, sizes, dtype, arguments.threads, arguments.budget_s)))
        return 0
    results = run(arguments)
    return int(not any("seconds" in result for result in results))


def main() -> int:
    arguments = parse_arguments()
    return exit_code(partial(arguments.main, arguments))


if __name__ == "__main__":
    sys.exit(main())
