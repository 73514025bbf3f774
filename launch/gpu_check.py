"""Check the fused kernels on a GPU, and time them and a whole model against what a user would pick instead.

    python launch/gpu_check.py
    python launch/gpu_check.py --seq-len 4096 65536 --skip-tests --json other.json
    python launch/gpu_check.py --device cpu --seq-len 256 512 --n-layers 2 --d-model 64 --n-heads 2 --skip-tests

First the tests of the kernels run on the GPU, and those of the trainer where its packages are installed; then one
layer's attention and the training step (forward and backward) of a 12-layer model are timed from short to long, bf16,
each after a first call that does not count, ours and FlashAttention's; then the longest sequence that the GPU trains is
looked for (the last example is a dry run, without that); then the other peers are timed. What is expected, from the
shorter lengths, to take longer than its budget is left out, and the table says so; of what takes long, the first call
is all there is. The share of the roofline is that of attention without hashing and sorting; MFU is that of our model,
by trainer/flops.py; both only where the device's peaks are known (bench_gpu/roofline.py).

Needs torch, Triton, numpy and pydantic, pytest for the tests, transformers for that peer; and this repository installed
or on PYTHONPATH, as `make gpu-check` has it.
"""

import argparse
import functools
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

try:
    from bench.peers import Sizes, Step, config_of
    from bench_gpu.budget import Budget, expected_call_s, longest
    from bench_gpu.peers import ATTENTION, LONGEST, MODEL, OUR_MODEL, attention_step, disagreement, model_training_step
    from bench_gpu.roofline import backward_work, forward_work, peaks_of

    from data_pipeline.output import positive
    from trainer.flops import training_flops
    from trainer.peaks import mfu
except ModuleNotFoundError as error:
    print(
        f"error: {error.name} is not installed here, and is needed: {__doc__.strip().splitlines()[-2]}", file=sys.stderr
    )
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ("tests/reformer/test_triton.py", "tests/reformer/test_triton_hashing.py")
TRAINER_TESTS = ("tests/distributed/test_on_gpu.py", "tests/trainer/test_timing.py")
TRAINER_NEEDS = ("deepspeed", "zarr", "sentencepiece", "tensorboard", "tqdm")
TEST_PROCESSES = 16
"""Most of the tests' time is the compilation of kernels, one core each."""
TESTS_S = 200.0
"""After so long the tests are stopped, so that the rest has its time."""
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""How far the fused path may be from the chunked one, relative to the largest number."""
REPEAT_S, REPEATS, MOST_CALLS = 0.2, 3, 20
"""The median of three runs of as many calls as fit into so many seconds."""
ONCE_S = 10.0
"""What is expected to take longer is called once."""
LONGEST_SHARE = 0.25
"""Of the whole budget, what is kept for the search for the longest sequence."""
FIRST = ("ours", "ours-attention", "ours-hash-sort", "flash")
"""Who is timed before that search: what the aims are about."""

Result = dict[str, Any]


def measure(build: Callable[[], Step], device: torch.device, once: bool = False) -> Result:
    """Seconds of a call (once: of the very first) and peak memory."""
    gc.collect()  # what stood before in circles of references would count into this one's peak
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = build()
    seconds = [_timed(step, 1, device)]  # compiles
    if not once:
        seconds = [_timed(step, 1, device)]
    if not once and (calls := min(MOST_CALLS, int(REPEAT_S / seconds[0]))):
        seconds = [_timed(step, calls, device) for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    first_call = {"first_call": True} if once else {}
    return {"seconds": statistics.median(seconds), "all_seconds": seconds, "peak_gib": peak, **first_call}


def attempt(function: Callable[[], Result]) -> Result:
    """Its result; what goes wrong is a result too, whatever it is: the others are still to be measured."""
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]}


def _timed(step: Step, calls: int, device: torch.device) -> float:
    _synchronize(device)
    begun = time.perf_counter()
    for _ in range(calls):
        step()
    _synchronize(device)
    return (time.perf_counter() - begun) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_tests() -> Result:
    """The tests of the kernels, and of the trainer where it can run, in several processes with a share each."""
    if not find_spec("pytest"):
        return {"error": "pytest is not installed"}
    missing = [package for package in TRAINER_NEEDS if not find_spec(package)]
    files = KERNEL_TESTS if missing else (*KERNEL_TESTS, *TRAINER_TESTS)
    left_out = {"left_out": f"tests of the trainer, which needs {', '.join(missing)}"} if missing else {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    begun = time.monotonic()
    listed = _output([*command, "--collect-only", *files], TESTS_S)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        return {"error": "no test could be collected", "output": (listed.stdout + listed.stderr)[-2000:]}
    shares = [names[first::TEST_PROCESSES] for first in range(min(TEST_PROCESSES, len(names)))]
    with ThreadPoolExecutor(len(shares)) as pool:
        left_s = TESTS_S - (time.monotonic() - begun)
        done = list(pool.map(lambda share: _output([*command, *share], left_s), shares))
    done.insert(0, listed)  # a file that cannot be imported has no test that could fail
    failed = [line for process in done for line in process.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    broken = any(process.returncode for process in done)
    output = "".join(process.stdout[-1500:] for process in done if process.returncode)
    error = {"error": "tests failed", "output": output} if broken else {}
    return {"tests": len(names), "failed": failed, **left_out, **error}


def _output(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout_s)
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout.decode(errors="replace") if isinstance(stopped.stdout, bytes) else ""
        return subprocess.CompletedProcess(command, 124, f"{said}\nERROR stopped after {timeout_s:.0f} s", "")


@dataclass(frozen=True)
class Setting:
    """What is the same for all measurements."""

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    peaks: tuple[float, float] | None
    peers: Sequence[str]


def items(sizes: Sizes, setting: Setting) -> list[tuple[Result, Callable[[], Step]]]:
    """What is measured at one length: its name, and what builds it."""
    where = (sizes, setting.device, setting.dtype)
    found: list[tuple[Result, Callable[[], Step]]] = []
    for name in (*ATTENTION, "huggingface"):
        for what, backward in (("attention forward", False), ("attention fwd+bwd", True)):
            if (name == "huggingface" and not backward) or (name == "ours-hash-sort" and backward):
                continue  # the one is built as a whole step, the other has no gradient
            label = {"what": what, "peer": name, "seq_len": sizes.seq_len}
            found.append((label, functools.partial(attention_step, name, *where, backward)))
    for name in MODEL:
        label = {"what": "model fwd+bwd", "peer": name, "seq_len": sizes.seq_len}
        found.append((label, functools.partial(model_training_step, name, *where)))
    return [(label, build) for label, build in found if label["peer"] in setting.peers]


def run_items(sizes: Sizes, setting: Setting, earlier: Sequence[Result], reserve_s: float = 0.0) -> list[Result]:
    """All measurements at one length, those left out included; so much time is to be left after them."""
    results = []
    budget = setting.budget
    for label, build in items(sizes, setting):
        same = [x for x in earlier if (x["what"], x["peer"]) == (label["what"], label["peer"])]
        points = [(x["seq_len"], x["seconds"]) for x in same if "seconds" in x]
        stopped = next((x for x in same if "error" in x), None)
        if label["peer"] == "huggingface" and not find_spec("transformers"):
            result: Result = {"error": "transformers is not installed"}
        elif stopped:
            result = {"error": stopped["error"]}
        else:
            expected_s = expected_call_s(points, sizes.seq_len)
            once = expected_s > ONCE_S
            if objection := budget.objection(expected_s if once else 2 * expected_s, reserve_s):
                result = {"left_out": objection}
            else:
                result = attempt(functools.partial(measure, build, setting.device, once))
        if label["peer"] == "ours-attention" and "seconds" in result:
            result |= achieved(
                sizes, setting.dtype, label["what"] == "attention fwd+bwd", result["seconds"], setting.peaks
            )
        if label["what"] == "model fwd+bwd" and "seconds" in result:
            result |= training_speed(sizes, label["peer"], result["seconds"], setting.peaks)
        results.append({**label, **result})
        print(row(results[-1]), flush=True)
    return results


def time_all(
    shapes: Sequence[Sizes], setting: Setting, record: Result, file: Path | None, reserve_s: float = 0.0
) -> None:
    """Adds the measurements at all lengths to the record, one length after the other."""
    for sizes in shapes:
        record["results"] += run_items(sizes, setting, record["results"], reserve_s)
        write(file, record)


def achieved(
    sizes: Sizes, dtype: torch.dtype, backward: bool, seconds: float, peaks: tuple[float, float] | None
) -> Result:
    """Bandwidth, and the share of the roofline where the device's peaks are known."""
    shape = (sizes.seq_len, sizes.n_heads, sizes.d_model // sizes.n_heads, sizes.n_hashes, sizes.chunk_len)
    work = forward_work(*shape, dtype.itemsize)
    if backward:
        work += backward_work(*shape, dtype.itemsize)
    share = {"roofline_share": work.roofline_s(peaks) / seconds} if peaks else {}
    return {"gb_per_s": work.moved / seconds / 1e9, **share}


def training_speed(sizes: Sizes, peer: str, seconds: float, peaks: tuple[float, float] | None) -> Result:
    """Tokens per second and, of our model where the device's peak is known, model FLOPs utilisation."""
    share = (
        {"mfu": mfu(training_flops(config_of(sizes), sizes.seq_len), seconds, 1, peaks[1])}
        if peaks and peer in OUR_MODEL
        else {}
    )
    return {"tokens_per_s": sizes.seq_len / seconds, **share}


def row(result: Result) -> str:
    """One line of the table."""
    start = f"{result['seq_len']:>9,}  {result['what']:<18}{result['peer']:<17}"
    if "seconds" not in result:
        return start + str(result.get("error") or result["left_out"])
    line = f"{start}{1e3 * result['seconds']:>11.3f} ms"
    line += f"{result['peak_gib']:>9.2f} GiB" if result.get("peak_gib") is not None else ""
    line += f"{result['gb_per_s']:>9.0f} GB/s" if "gb_per_s" in result else ""
    line += f"{result['roofline_share']:>7.0%} of the roofline" if "roofline_share" in result else ""
    line += f"{result['tokens_per_s']:>11,.0f} tokens/s" if "tokens_per_s" in result else ""
    line += f"{result['mfu']:>7.1%} MFU" if "mfu" in result else ""
    return line + ("  (first call)" if result.get("first_call") else "")


def judged(errors: Result, dtype: torch.dtype) -> Result:
    """The disagreement of the two paths, and whether it is more than the dtype explains (NaN is)."""
    numbers = [x for x in errors.values() if isinstance(x, float)]
    agrees = bool(numbers) and all(math.isfinite(x) and x <= TOLERANCE[dtype] for x in numbers)
    shown = {name: x if not isinstance(x, float) or math.isfinite(x) else str(x) for name, x in errors.items()}
    return {**shown, "tolerance": TOLERANCE[dtype], "agrees": agrees}


def find_longest(sizes: Sizes, known: Sequence[tuple[int, float]], setting: Setting) -> Result:
    """The longest sequence that our model trains on this device, its tokens per second and MFU.

    With `keep_ends` off, which is for this. From the lengths and seconds that are known, upwards until memory or the
    time that is left forbids it.
    """
    points, tried = list(known), []

    def trains(seq_len: int) -> bool:
        label = {"what": "longest", "peer": "ours", "seq_len": seq_len}
        if objection := setting.budget.no_time(expected_call_s(points, seq_len)):
            found: Result = {"left_out": objection}
        else:
            shape = replace(sizes, seq_len=seq_len)
            build = functools.partial(model_training_step, LONGEST, shape, setting.device, setting.dtype)
            found = attempt(functools.partial(measure, build, setting.device, once=True))
            if "seconds" in found:
                found |= training_speed(shape, "ours", found["seconds"], setting.peaks)
        tried.append({**label, **found})
        print(row(tried[-1]), flush=True)
        points.extend([(seq_len, found["seconds"])] if "seconds" in found else [])
        return "seconds" in found

    length = longest(trains, max(known)[0])
    limit = "time" if any("left_out" in found for found in tried) else "memory"
    speed = training_speed(replace(sizes, seq_len=length), "ours", dict(points)[length], setting.peaks)
    return {"seq_len": length, **speed, "limited_by": limit, "tried": tried}


def hardware(device: torch.device, peaks: tuple[float, float] | None) -> Result:
    """What the numbers were measured on, and the peaks that the shares are of."""
    if device.type != "cuda":
        return {"device": f"{platform.machine()} CPU", "cores": len(os.sched_getaffinity(0))}
    properties = torch.cuda.get_device_properties(device)
    known = {"peak_bytes_per_s": peaks[0], "peak_bf16_per_s": peaks[1]} if peaks else {}
    return {"device": properties.name, "memory_gib": properties.total_memory / 2**30, **known}


def versions() -> Result:
    """Of what the numbers depend on; None: not installed."""
    found: Result = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {**found, "git_commit": commit.stdout.strip() or None}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, in fp32")
    parser.add_argument("--seq-len", type=positive, nargs="+", default=[2**12, 2**14, 2**16, 2**18, 2**20], metavar="T")
    parser.add_argument("--budget-s", type=positive, default=510, help="for everything (default: %(default)s)")
    parser.add_argument("--item-budget-s", type=positive, default=30, help="for a measurement (default: %(default)s)")
    names = [name for name in dict.fromkeys((*ATTENTION, *MODEL, "huggingface")) if name != LONGEST]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--skip-tests", action="store_true", help="of the kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: benchmarks/gpu-<device>.json; cpu: none)")
    shape = Sizes(d_model=1024, n_layers=12, n_heads=8, chunk_tokens=2**15)
    for name in ("d_model", "n_layers", "n_heads", "n_hashes", "chunk_len", "chunk_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=getattr(shape, name))
    arguments = parser.parse_args()
    arguments.seq_len = sorted(set(arguments.seq_len))
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: there is no CUDA device here (torch.cuda.is_available() is False); run this on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or try the flow with --device cpu --seq-len 256 512 --n-layers 2 "
            "--d-model 64 --n-heads 2 --skip-tests",
            file=sys.stderr,
        )
        return 2
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peaks = peaks_of(name)
    budget = Budget(arguments.budget_s, arguments.item_budget_s)
    setting = Setting(device, dtype, budget, peaks, arguments.peers)
    sizes = Sizes(**{key: getattr(arguments, key) for key in asdict(Sizes()) if key in arguments} | {"seq_len": 0})
    try:
        config_of(replace(sizes, seq_len=max(arguments.seq_len)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    file = arguments.json or (ROOT / "benchmarks" / f"gpu-{slug(name)}.json" if device.type == "cuda" else None)
    record: Result = {
        "command": ["python", "launch/gpu_check.py", *sys.argv[1:]],
        **hardware(device, peaks),
        "versions": versions(),
        "sizes": {key: x for key, x in asdict(sizes).items() if key != "seq_len"},
    }
    try:
        write(file, record)
    except OSError as error:
        print(f"error: {file} cannot be written: {error}; give another --json FILE", file=sys.stderr)
        return 2
    record["tests"] = {"skipped": True} if arguments.skip_tests else run_tests()
    print("tests:", record["tests"].get("output") or json.dumps(record["tests"]), flush=True)
    small = replace(sizes, seq_len=min(arguments.seq_len))
    record["fused_against_chunked"] = judged(attempt(lambda: disagreement(small, device, dtype)), dtype)
    print("fused against chunked:", json.dumps(record["fused_against_chunked"]), flush=True)
    shapes = [replace(sizes, seq_len=seq_len) for seq_len in arguments.seq_len]
    first = replace(setting, peers=[name for name in arguments.peers if name in FIRST])
    others = replace(setting, peers=[name for name in arguments.peers if name not in FIRST])
    record["results"] = []
    time_all(shapes, first, record, file, LONGEST_SHARE * budget.total_s)
    ours = [x for x in record["results"] if x["peer"] == "ours" and "seconds" in x]
    known = [(x["seq_len"], x["seconds"]) for x in ours if x["what"] == "model fwd+bwd"]
    if known and device.type == "cuda":  # on a CPU it would fill the machine's memory
        record["longest"] = find_longest(sizes, known, setting)
        print("longest:", json.dumps({key: x for key, x in record["longest"].items() if key != "tried"}))
        write(file, record)
    time_all(shapes, others, record, file)
    is_broken = "error" in record["tests"] or not record["fused_against_chunked"]["agrees"]
    return int(is_broken or ("ours" in arguments.peers and not known))


def slug(name: str) -> str:
    return "-".join(name.lower().split())


def write(file: Path | None, record: Result) -> None:
    """What is measured so far, so that nothing of it is lost if the rest is not."""
    if file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written: {file}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
