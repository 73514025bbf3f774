"""What the benchmarks share: a measurement in a process of its own, what is left out, the record of a run.

Every measurement is one process, `launch/benchmark.py WHAT … --worker PEER`, so that its peak memory is its own; it
prints one line of JSON. A failure is a result too: `error` says why, `final` that it would be the same at whatever
takes more. What is expected, from points that take less, to go beyond the limits is `left_out`, with the reason and
what was predicted.
"""

import argparse
import importlib
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.peers import PEERS, Peer, Sizes
from bench.prediction import predict, predict_depth
from data_pipeline.errors import DataError
from data_pipeline.output import SEVERAL, positive
from trainer.memory import peak_gib
from trainer.record import environment

PROGRAM = Path(__file__).parents[1] / "benchmark.py"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""For the environment: Open MPI refuses the root user, who is the only one in many containers."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """What varies from point to point: a key of the results, what it counts, and how values go on along it."""

    key: str
    unit: str
    predict: Callable[[Sequence[tuple[int, float]], int], float]


LENGTH, DEPTH = Axis("seq_len", "tokens", predict), Axis("n_layers", "layers", predict_depth)


@dataclass(frozen=True)
class Limits:
    """What one peer may take at one point."""

    seconds: int
    gib: float


# The command line.


def share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and up to 1")


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, rounds: str) -> None:
    """The options that all benchmarks have; `rounds` says what is repeated."""
    parser.add_argument("--peers", **SEVERAL, default=["all"], metavar="NAME", help="ours, …, or all (the default)")
    parser.add_argument("--rounds", type=positive, default=3, help=f"{rounds} (default: %(default)s)")
    parser.add_argument(
        "--budget-s",
        type=positive,
        default=600,
        help="for one peer at one point: a measurement is stopped there, and is not repeated if the next would go "
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


def sizes_of(arguments: argparse.Namespace, seq_len: int) -> Sizes:
    names = [field.name for field in fields(Sizes) if field.name != "seq_len"]
    return Sizes(seq_len=seq_len, **{name: getattr(arguments, name) for name in names})


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The peers that were asked for. Raises DataError if there is no such peer."""
    if unknown := set(names) - {*known, "all"}:
        raise DataError(f"no peer {', '.join(sorted(unknown))}: choose from {', '.join(known)}, or all")
    return list(known if "all" in names else dict.fromkeys(names))


# One measurement.


def begin(peer: Peer[Any], threads: int) -> float:
    """Prepare this process to measure the peer; returns what it has used once the libraries are there, in GiB."""
    with suppress(OSError):  # should memory run out, the system is to stop this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads)
    if peer.module:
        importlib.import_module(peer.module)
    imports_gib = peak_gib(torch.device("cpu"))
    torch.manual_seed(0)
    return imports_gib


def in_a_process(what: str, options: Mapping[str, Any], budget_s: int, environ: Mapping[str, str] = {}) -> Result:
    """What `launch/benchmark.py WHAT` prints with these options, --worker and --threads among them."""
    words = [word for key, value in options.items() for word in (option(key), str(value))]
    environ = {**os.environ, **environ, "OMP_NUM_THREADS": str(options["threads"])}
    command = [sys.executable, str(PROGRAM), what, *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=budget_s, env=environ)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {budget_s:,} s, the budget", "final": True}
    if done.returncode < 0:
        end = signal.Signals(-done.returncode).name
        return {"error": f"ended by {end}" + (", out of memory?" if end == "SIGKILL" else ""), "final": True}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


# What is measured, and what is left out.


@dataclass(frozen=True)
class Summary:
    """One peer's measurements at one point."""

    seconds: float
    fastest: float
    slowest: float
    peak_gib: float
    imports_gib: float


def summaries(results: Sequence[Result], axis: Axis = LENGTH) -> dict[int, Summary]:
    """One peer's measurements along the axis, in its order: median time and its range, largest memory."""
    by_place: dict[int, list[Result]] = {}
    for result in sorted(results, key=lambda result: result[axis.key]):
        if "seconds" in result:
            by_place.setdefault(result[axis.key], []).append(result)
    found = {}
    for place, some in by_place.items():
        times = [result["seconds"] for result in some]
        peaks = [max(result[key] for result in some) for key in ("peak_gib", "imports_gib")]
        found[place] = Summary(statistics.median(times), min(times), max(times), *peaks)
    return found


def left_out(
    earlier: Sequence[Result], place: int, limits: Limits, axis: Axis = LENGTH, steps: int = 1
) -> Result | None:
    """Why a peer with these results is not measured at a place further along the axis; None if it is.

    A measurement there takes so many steps.
    """
    if final := next((result for result in earlier if result.get("final")), None):
        return {"left_out": f"{final['error']} at {final[axis.key]:,} {axis.unit}"}
    at = summaries(earlier, axis)
    if not at:
        return None
    imports_gib = max(one.imports_gib for one in at.values())
    own_gib = [(place, max(one.peak_gib - imports_gib, 1e-3)) for place, one in at.items()]
    seconds = steps * axis.predict([(place, one.seconds) for place, one in at.items()], place)
    gib = imports_gib + axis.predict(own_gib, place)
    reasons = []
    if seconds > limits.seconds:
        reasons.append(f"predicted {seconds:,.0f} s: over the budget of {limits.seconds:,} s")
    if gib > limits.gib:
        reasons.append(f"predicted {gib:,.1f} GiB: over the {limits.gib:.1f} GiB that it may take here")
    if not reasons:
        return None
    return {"left_out": "; ".join(reasons), "predicted_s": seconds, "predicted_gib": gib}


def missing(peer: Peer[Any]) -> Result | None:
    """Why a peer cannot be measured at all; None if it can."""
    if peer.module is None or find_spec(peer.module.split(".")[0]):
        return None
    return {"left_out": f"{peer.package} is not installed: pip install -e '.[bench]'"}


def measure_peers(
    names: Sequence[str],
    skip: Callable[[str], Result | None],
    measure: Callable[[str], Result],
    rounds: int,
    budget_s: int,
    point: Mapping[str, Any],
) -> list[Result]:
    """All peers at one point, in turn: why they are skipped, or what they take, so many times within the budget.

    One that fails is not measured again. Every result has what names the point, and goes to the standard error
    stream too.
    """
    results: list[Result] = []

    def keep(name: str, result: Result) -> None:
        results.append({**point, "peer": name, **result})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)

    active = []
    for name in names:
        if skipped := skip(name):
            keep(name, skipped)
        else:
            active.append(name)
    spent_s, longest_s = dict.fromkeys(active, 0.0), dict.fromkeys(active, 0.0)
    for _ in range(rounds):
        for name in list(active):
            if spent_s[name] + longest_s[name] > budget_s:
                active.remove(name)
                continue
            begun = time.perf_counter()
            result = measure(name)
            wall_s = time.perf_counter() - begun
            spent_s[name], longest_s[name] = spent_s[name] + wall_s, max(longest_s[name], wall_s)
            keep(name, {**result, "wall_s": wall_s})
            if "error" in result:
                active.remove(name)
    return results


def reason(result: Result) -> str:
    """Why there is no measurement."""
    return result.get("left_out") or f"error: {result['error']}"


# The record of a run.


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


def new_record(what: str, arguments: argparse.Namespace, results: list[Result]) -> Result:
    """The record of a run that was asked for by these arguments; its results grow."""
    sizes = asdict(sizes_of(arguments, 1))
    del sizes["seq_len"]
    command = shlex.join(["python", "launch/benchmark.py", *sys.argv[1:]])
    asked = {"command": command, "what": what, "sizes": sizes, "dtype": arguments.dtype, "threads": arguments.threads}
    return {**asked, **machine(), "results": results}


def write(file: Path, record: Result) -> None:
    """Replace the file as a whole, so that a run that is killed leaves what it had. Raises DataError."""
    partial = file.with_name(file.name + ".partial")
    results = ",\n".join(f"  {json.dumps(result)}" for result in record["results"])  # one a line
    text = json.dumps({**record, "results": "@"}, indent=1).replace('"@"', f"[\n{results}\n ]")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise DataError(f"cannot write {file}: {error}") from None
