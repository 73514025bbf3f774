"""`python launch/benchmark.py faults`: what the trainer survives, counted, and what that costs.

    python launch/benchmark.py faults --part kills damage signals --json benchmarks/faults-cpu.json
    python launch/benchmark.py faults --part overhead --json benchmarks/faults-overhead-cpu.json

`kills`: SIGKILL at random moments. `damage`: files of checkpoints. `signals`: USR1, USR2 and TERM. In all three the
curve of the run that was disturbed, every number by tag and step in metrics.jsonl and in TensorBoard, must be in the
end that of a run that was not, bit for bit. `overhead` is about time, and wants the machine for itself. What exactly is
done: kills.py, damage.py, signals.py and overhead.py in launch/bench_faults.

SLURM is a cluster of two nodes that is started on this machine, where it can be; what needs it is left out otherwise. A
seed decides moments, victims and bits. The JSON file has everything that was seen, and is written as it comes. The exit
code is 1 if anything was not survived.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.process import machine, n_cores, write

from bench_faults import damage, kills, overhead, signals, worker
from bench_faults.jobs import MODES, SBATCH, cluster_tools
from bench_faults.runs import Bench, FailedError
from data_pipeline.output import SEVERAL, positive

Result = dict[str, Any]
ON_CLUSTER = {"srun", *SBATCH}


def add_command(commands: Any) -> None:
    """The command `faults` among the others, and its options."""
    parser = commands.add_parser(
        "faults",
        help="what the trainer survives, and what that costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", **SEVERAL, choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write hardware, versions and all that was seen")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--modes", **SEVERAL, choices=MODES, default=list(MODES), help="how runs of `kills` and `signals` are started"
    )
    for name, default, text in (
        ("--kills", 60, "SIGKILLs in all, at least"),
        ("--damages", 128, "damaged checkpoints"),
        ("--signals", 36, "signals in all, at least"),
        ("--steps", 16, "of the small runs that are disturbed"),
        ("--rounds", 3, "of `overhead`: starts and checkpoints of each"),
        ("--pairs", 15, "of `overhead`: steps with the loop and without, at each length"),
        ("--threads", n_cores(), "of `overhead`"),
        ("--budget-s", 1800, "of `overhead`: for one process"),
    ):
        parser.add_argument(name, type=positive, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--worker", choices=worker.WORKERS, help=argparse.SUPPRESS)  # measure in this process
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.set_defaults(main=main)


# The parts: each prints as it goes and yields results for the JSON file.


def run_kills(bench: Bench, arguments: argparse.Namespace, modes: list[str]) -> Iterator[Result]:
    modes = [mode for mode in modes if mode in kills.KILL_MODES]
    print(kills.HEADER, flush=True)
    trials = []
    for trial in kills.kills(bench, arguments.kills, arguments.seed, modes) if modes else ():
        trials.append(trial)
        print(kills.table(trial), flush=True)
        yield {"part": "kills", "survived": not trial.error, **asdict(trial)}
    done = [(trial.mode, kill) for trial in trials for kill in trial.kills]
    by_mode, by_stage = Counter(mode for mode, _ in done), Counter(kill.stage for _, kill in done)
    failed = sum(bool(trial.error) for trial in trials)
    print(f"kills: {len(done)} in {len(trials)} runs ({counted(by_mode)}; {counted(by_stage)}), {failed} runs failed")


def run_damage(bench: Bench, arguments: argparse.Namespace, modes: list[str]) -> Iterator[Result]:
    found = []
    for each in damage.damages(bench, arguments.damages, arguments.seed):
        found.append(each)
        yield {"part": "damage", "survived": each.passed, **asdict(each)}
    print(damage.table(found))
    recovered, ended = sum(each.passed for each in found), sum(each.ended == "identical" for each in found)
    print(f"damage: {len(found)} damaged, {recovered} reported and recovered from, {ended} runs to the end identical")


def run_signals(bench: Bench, arguments: argparse.Namespace, modes: list[str]) -> Iterator[Result]:
    print(signals.HEADER, flush=True)
    trials = []
    for trial in signals.signals(bench, arguments.signals, arguments.seed, modes) if modes else ():
        trials.append(trial)
        print(signals.table(trial), flush=True)
        yield {"part": "signals", "survived": not trial.error, **asdict(trial)}
    done = [(trial.mode, delivery) for trial in trials for delivery in trial.deliveries]
    by_mode, by_name = Counter(mode for mode, _ in done), Counter(delivery.name for _, delivery in done)
    failed = sum(bool(trial.error) for trial in trials)
    print(f"signals: {len(done)} in {len(trials)} runs ({counted(by_mode)}; {counted(by_name)}), {failed} runs failed")


def run_overhead(bench: Bench, arguments: argparse.Namespace, modes: list[str]) -> Iterator[Result]:
    for result in overhead.overhead(bench, arguments.rounds, arguments.pairs, arguments.threads, arguments.budget_s):
        print(overhead.line(result), flush=True)
        yield {"part": "overhead", "survived": "error" not in result, **result}


PARTS: dict[str, Callable[[Bench, argparse.Namespace, list[str]], Iterator[Result]]] = {
    "kills": run_kills,
    "damage": run_damage,
    "signals": run_signals,
    "overhead": run_overhead,
}


def counted(numbers: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.most_common())


def cluster_for(arguments: argparse.Namespace, stack: ExitStack) -> Any:
    """A running SLURM cluster, if one is asked for and can be had; it ends with the stack."""
    if not ON_CLUSTER & set(arguments.modes) or not {"kills", "signals"} & set(arguments.part):
        return None
    tools = cluster_tools()
    if reason := tools.reason_for_none():
        print(f"SLURM is left out: {reason}", flush=True)
        return None
    return stack.enter_context(tools.running_cluster())


def run(arguments: argparse.Namespace, folder: Path) -> list[Result]:
    """All parts; writes after every result."""
    results: list[Result] = []
    command = shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]])
    record = {"command": command, "what": "faults", **machine(), "results": results}
    with ExitStack() as stack:
        cluster = cluster_for(arguments, stack)
        bench = Bench(folder, arguments.steps, cluster)
        modes = [mode for mode in arguments.modes if mode not in ON_CLUSTER or cluster]
        for part in arguments.part:
            try:
                for result in PARTS[part](bench, arguments, modes):
                    results.append(result)
                    if arguments.json:
                        write(arguments.json, record)
            except FailedError as error:
                results.append({"part": part, "survived": False, "error": str(error)})
                print(f"{part}: FAILED: {error}", flush=True)
    if arguments.json:
        write(arguments.json, record)
    return results


def main(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if anything was not survived; what is left out for want of a cluster is no failure."""
    if arguments.worker:
        print(json.dumps(worker.main(arguments.worker, arguments.size, arguments.rounds)))
        return 0
    with tempfile.TemporaryDirectory(prefix="longhand-faults-") as name:
        results = run(arguments, Path(name))
    return int(not results or not all(result["survived"] for result in results))
