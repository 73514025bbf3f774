"""Time one training step against what a user would pick instead, in one run, interleaved.

    python launch/benchmark.py model --seq-len 65536 --peers all --json benchmarks/model-64k.json
    python launch/benchmark.py attention --seq-len 4096 16384 65536

Every measurement is a process of its own, with its own peak memory: it builds the model and takes one step (forward
and backward), or, where steps are short, several after a first one that does not count. Rounds go through all peers
in turn; one that took longer than the budget is not asked again. Printed: medians with the smallest and largest, and
multiples of the first peer's (ours).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from benchmark_peers import PEERS, Sizes

from trainer.metrics import peak_gib

REPEAT_S = 3.0
"""A measurement takes more than one step, and leaves out the first, where that fits into so many seconds."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(PEERS), help="a whole model, or one layer of attention")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[65_536], metavar="T", help="(default: 65536)")
    parser.add_argument("--peers", nargs="+", default=["all"], metavar="NAME", help="ours, …, or all (the default)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=600, help="for one measurement (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write sizes, hardware and all measurements")
    for field in fields(Sizes):
        if field.name != "seq_len":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the name of the one to measure, in this very process
    return parser.parse_args()


def measure_here(what: str, peer: str, sizes: Sizes) -> dict[str, float]:
    """Build one peer and time one step."""
    torch.manual_seed(0)
    step = PEERS[what][peer](sizes)
    tokens = torch.randint(0, sizes.vocab_size, (1, sizes.seq_len))
    times: list[float] = []
    while not times or sum(times) < REPEAT_S:
        begun = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(times[1:] or times), "peak_gib": peak_gib(torch.device("cpu"))}


def sizes_of(arguments: argparse.Namespace, seq_len: int) -> Sizes:
    names = [field.name for field in fields(Sizes) if field.name != "seq_len"]
    return Sizes(seq_len=seq_len, **{name: getattr(arguments, name) for name in names})


def measure(arguments: argparse.Namespace, peer: str, sizes: Sizes) -> dict[str, Any]:
    """The same in a new process; a failure or a time-out is a result too."""
    size_options = [
        word for name, value in asdict(sizes).items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, __file__, arguments.what, "--worker", peer, *size_options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * arguments.budget_s)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {2 * arguments.budget_s:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements, length by length, peers in turn."""
    names = list(PEERS[arguments.what]) if arguments.peers == ["all"] else arguments.peers
    if unknown := set(names) - set(PEERS[arguments.what]):
        sys.exit(f"error: no peer {', '.join(sorted(unknown))}: choose from {', '.join(PEERS[arguments.what])}")
    out_of_budget: set[str] = set()
    results = []
    for seq_len in arguments.seq_len:
        sizes = sizes_of(arguments, seq_len)
        for _ in range(arguments.rounds):
            for peer in names:
                if peer in out_of_budget:
                    continue
                result = {"seq_len": seq_len, "peer": peer, **measure(arguments, peer, sizes)}
                results.append(result)
                print(json.dumps(result), file=sys.stderr, flush=True)
                if "error" in result or result["seconds"] > arguments.budget_s:
                    out_of_budget.add(peer)
        print(table(seq_len, [result for result in results if result["seq_len"] == seq_len]), flush=True)
    return results


def table(seq_len: int, results: list[dict[str, Any]]) -> str:
    """Median (smallest to largest) seconds, peak memory, and both as multiples of ours."""
    rows, base = [], None
    for peer in dict.fromkeys(result["peer"] for result in results):
        mine = [result for result in results if result["peer"] == peer]
        times = [result["seconds"] for result in mine if "seconds" in result]
        if not times:
            rows.append(f"{seq_len:>9}  {peer:<12}  {mine[0]['error']}")
            continue
        middle, peak = statistics.median(times), max(result["peak_gib"] for result in mine if "peak_gib" in result)
        base = base or (middle, peak)
        rows.append(
            f"{seq_len:>9}  {peer:<12}{middle:>9.2f} s ({min(times):.2f} to {max(times):.2f}){peak:>8.2f} GiB"
            f"{middle / base[0]:>8.2f} x time{peak / base[1]:>8.2f} x memory"
        )
    return "\n".join(rows)


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        sizes = sizes_of(arguments, arguments.seq_len[0])
        print(json.dumps(measure_here(arguments.what, arguments.worker, sizes)))
        return
    results = run(arguments)
    if arguments.json:
        record = {"command": ["python", "launch/benchmark.py", *sys.argv[1:]], **hardware(), "results": results}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
