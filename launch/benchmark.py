"""Time one training step against what a user would pick instead, in one run, interleaved.

    python launch/benchmark.py model --seq-len 1024 4096 16384 65536 --json model.json
    python launch/benchmark.py attention --seq-len 4096 16384 65536 --peers ours dense
    python launch/benchmark_plot.py model.json --output model.png

Every measurement is a process of its own, with its own peak memory: it builds the model and takes steps (forward and
backward) for a few seconds, the first of which does not count, or one step where that is long. Rounds go through all
peers in turn. The table has medians with the smallest and largest, the peak memory and what of it the process had
used once it had imported its libraries, multiples of ours, and the growth from the length before as if that
were four times shorter. The JSON file is written after every length, and has every step of every measurement.

Lengths are measured from short to long. What the shorter ones say would take longer than the budget or more than
the allowed share of the machine's memory is left out, and a measurement is stopped at the budget: the table says so.
"""

import argparse
import importlib
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark_peers import PEERS, Peer, Sizes, positive

from trainer.metrics import environment, peak_gib

REPEAT_S, REPEAT_STEPS = 3.0, 10
"""Steps are repeated for so long after the first, or so often."""
COLD_S = 20.0
"""A first step that takes longer is the only one: what happens once (allocation, compilation) is small beside it."""
Result = dict[str, Any]


def share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(PEERS), help="a whole model, or one layer of attention")
    parser.add_argument("--seq-len", type=positive, nargs="+", default=[65_536], metavar="T", help="(default: 65536)")
    parser.add_argument("--peers", nargs="+", default=["all"], metavar="NAME", help="ours, …, or all (the default)")
    parser.add_argument("--rounds", type=positive, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument(
        "--budget-s",
        type=positive,
        default=600,
        help="for one peer at one length: a measurement is stopped there, and is not repeated if the next would go "
        "beyond (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-share",
        type=share,
        default=0.85,
        help="of the machine's memory, what a measurement may be expected to take (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive, default=n_cores(), help="(default: the cores, here %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write sizes, hardware and all measurements")
    for field in fields(Sizes):
        if field.name != "seq_len":
            parser.add_argument(option(field.name), type=positive, default=field.default, help="(default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # the name of the one to measure, in this very process
    return parser.parse_args()


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def sizes_of(arguments: argparse.Namespace, seq_len: int) -> Sizes:
    names = [field.name for field in fields(Sizes) if field.name != "seq_len"]
    return Sizes(seq_len=seq_len, **{name: getattr(arguments, name) for name in names})


# What one process measures.


def measure_here(peer: Peer, sizes: Sizes, threads: int, budget_s: float) -> Result:
    """Build the peer and time its steps, in this process."""
    with suppress(OSError):  # should memory run out, the system is to stop this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    if peer.module:
        importlib.import_module(peer.module)
    imports_gib = peak_gib(torch.device("cpu"))
    torch.manual_seed(0)
    step = peer.build(sizes)
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
    """The same in a new process; a failure is a result too, "final" if it would be the same at longer lengths."""
    options = {**asdict(sizes), "worker": name, "threads": arguments.threads, "budget_s": arguments.budget_s}
    words = [word for key, value in options.items() for word in (option(key), str(value))]
    command = [sys.executable, __file__, arguments.what, *words]
    environ = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.budget_s, env=environ)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {arguments.budget_s:,} s, the budget", "final": True}
    if done.returncode < 0:
        end = signal.Signals(-done.returncode).name
        return {"error": f"ended by {end}" + (", out of memory?" if end == "SIGKILL" else ""), "final": True}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


# What is measured, and what is left out.


def predict(points: Sequence[tuple[int, float]], seq_len: int) -> float:
    """The value at seq_len, from (length, value) at one or more shorter lengths.

    It grows like the length to the power that the last two points show, held between 1 and 2 (4 to 16 times the
    value for 4 times the length): short lengths are dominated by what does not grow. One point grows linearly.
    """
    longer, more = points[-1]
    power = 1.0
    if len(points) > 1:
        shorter, less = points[-2]
        power = math.log(more / less) / math.log(longer / shorter)
    return more * (seq_len / longer) ** min(max(power, 1.0), 2.0)


def left_out(earlier: Sequence[Result], seq_len: int, budget_s: float, budget_gib: float) -> Result | None:
    """Why a peer with these results at shorter lengths is not measured at seq_len; None if it is."""
    if final := next((result for result in earlier if result.get("final")), None):
        return {"left_out": f"{final['error']} at {final['seq_len']:,} tokens"}
    at = summaries(earlier)
    if not at:
        return None
    imports_gib = max(one.imports_gib for one in at.values())
    own_gib = [(length, max(one.peak_gib - imports_gib, 1e-3)) for length, one in at.items()]
    seconds = predict([(length, one.seconds) for length, one in at.items()], seq_len)
    gib = imports_gib + predict(own_gib, seq_len)
    reasons = []
    if seconds > budget_s:
        reasons.append(f"predicted {seconds:,.0f} s: over the budget of {budget_s:,} s")
    if gib > budget_gib:
        reasons.append(f"predicted {gib:,.1f} GiB: over the {budget_gib:.1f} GiB that it may take here")
    if not reasons:
        return None
    return {"left_out": "; ".join(reasons), "predicted_s": seconds, "predicted_gib": gib}


def missing(peer: Peer) -> Result | None:
    """Why a peer cannot be measured at all; None if it can."""
    if peer.module is None or find_spec(peer.module.split(".")[0]):
        return None
    return {"left_out": f"{peer.package} is not installed: pip install -e '.[bench]'"}


def measure_length(
    arguments: argparse.Namespace, names: Sequence[str], seq_len: int, earlier: Sequence[Result], budget_gib: float
) -> list[Result]:
    """All results at one length, peers in turn."""
    results: list[Result] = []

    def keep(name: str, result: Result) -> None:
        results.append({"seq_len": seq_len, "peer": name, **result})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)

    active = []
    for name in names:
        mine = [result for result in earlier if result["peer"] == name]
        out = missing(PEERS[arguments.what][name]) or left_out(mine, seq_len, arguments.budget_s, budget_gib)
        if out:
            keep(name, out)
        else:
            active.append(name)
    spent_s, longest_s = dict.fromkeys(active, 0.0), dict.fromkeys(active, 0.0)
    for _ in range(arguments.rounds):
        for name in list(active):
            if spent_s[name] + longest_s[name] > arguments.budget_s:
                active.remove(name)
                continue
            begun = time.perf_counter()
            result = measure(arguments, name, sizes_of(arguments, seq_len))
            wall_s = time.perf_counter() - begun
            spent_s[name], longest_s[name] = spent_s[name] + wall_s, max(longest_s[name], wall_s)
            keep(name, {**result, "wall_s": wall_s})
            if "error" in result:
                active.remove(name)
    return results


# What is said about it.


@dataclass(frozen=True)
class Summary:
    """One peer's measurements at one length."""

    seconds: float
    fastest: float
    slowest: float
    peak_gib: float
    imports_gib: float


def summaries(results: Sequence[Result]) -> dict[int, Summary]:
    """One peer's measurements by length, from short to long: median time and its range, largest memory."""
    by_length: dict[int, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["seq_len"]):
        if "seconds" in result:
            by_length.setdefault(result["seq_len"], []).append(result)
    found = {}
    for length, some in by_length.items():
        times = [result["seconds"] for result in some]
        peaks = [max(result[key] for result in some) for key in ("peak_gib", "imports_gib")]
        found[length] = Summary(statistics.median(times), min(times), max(times), *peaks)
    return found


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


def reason(result: Result) -> str:
    """Why there is no measurement."""
    return result.get("left_out") or f"error: {result['error']}"


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


def machine() -> Result:
    """What the numbers were measured on, and when."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    packages = {peer.package for peers in PEERS.values() for peer in peers.values() if not missing(peer)}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": environment()["git_commit"],
        "cpu": model,
        "cores": n_cores(),
        "ram_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in sorted(package for package in packages if package)},
        },
    }


def write(file: Path, record: Result) -> None:
    """Replace the file as a whole, so that a run that is killed leaves what it had."""
    partial = file.with_name(file.name + ".partial")
    results = ",\n".join(f"  {json.dumps(result)}" for result in record["results"])  # one a line
    text = json.dumps({**record, "results": "@"}, indent=1).replace('"@"', f"[\n{results}\n ]")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        sys.exit(f"error: cannot write {file}: {error}")


def run(arguments: argparse.Namespace) -> list[Result]:
    """All lengths, from short to long; prints and writes after each."""
    peers = PEERS[arguments.what]
    names = list(peers) if arguments.peers == ["all"] else list(dict.fromkeys(arguments.peers))
    if unknown := set(names) - set(peers):
        sys.exit(f"error: no peer {', '.join(sorted(unknown))}: choose from {', '.join(peers)}, or all")
    sizes = asdict(sizes_of(arguments, 1))
    del sizes["seq_len"]
    command = shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]])
    results: list[Result] = []
    asked = {"command": command, "what": arguments.what, "sizes": sizes, "threads": arguments.threads}
    record = {**asked, **machine(), "results": results}
    print(HEADER, flush=True)
    for seq_len in sorted(set(arguments.seq_len)):
        if arguments.json:  # before the first length too: that it cannot be written should not be learnt in an hour
            write(arguments.json, record)
        results += measure_length(arguments, names, seq_len, results, arguments.memory_share * record["ram_gib"])
        print(table(results, seq_len), flush=True)
    if arguments.json:
        write(arguments.json, record)
    return results


def main() -> int:
    arguments = parse_arguments()
    if arguments.worker:
        peer = PEERS[arguments.what][arguments.worker]
        sizes = sizes_of(arguments, arguments.seq_len[0])
        print(json.dumps(measure_here(peer, sizes, arguments.threads, arguments.budget_s)))
        return 0
    results = run(arguments)
    return int(not any("seconds" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
