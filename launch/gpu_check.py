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
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

NEEDS = """gpu_check.py needs torch, Triton, numpy, pydantic and safetensors, pytest for the tests, transformers for
that peer; and this repository installed or on PYTHONPATH, as `make gpu-check` has it."""

try:
    from bench.peers import Sizes, config_of
    from bench_gpu.budget import Budget
    from bench_gpu.peers import ATTENTION, LONGEST, MODEL, disagreement
    from bench_gpu.roofline import peaks_of
    from bench_gpu.testing import run_tests
    from bench_gpu.timing import DeviceLost, Setting, attempt, find_longest, run_items

    from data_pipeline.errors import DataError
    from data_pipeline.output import SEVERAL, exit_code, positive
    from reformer import ConfigError
except ModuleNotFoundError as error:
    print(f"error: {error.name} is not installed here: {NEEDS}", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""How far the fused path may be from the chunked one, relative to the largest number."""
PACKED_TOKENS, PACKED_DOCUMENTS = 2**18, 37
"""They are compared once more where so many documents share a long row, as rows do that are trained on."""
LONGEST_SHARE = 0.25
"""Of the whole budget, what is kept for the search for the longest sequence."""
FIRST = ("ours", "ours-attention", "ours-hash-sort", "flash")
"""Who is timed before that search: what the aims are about."""

Result = dict[str, Any]


def time_all(
    shapes: Sequence[Sizes], setting: Setting, record: Result, file: Path | None, reserve_s: float = 0.0
) -> None:
    """Adds the measurements at all lengths to the record, one length after the other."""
    for sizes in shapes:
        for result in run_items(sizes, setting, record["results"], reserve_s):
            record["results"].append(result)
            write(file, record)


def judged(errors: Result, dtype: torch.dtype) -> Result:
    """The disagreement of the two paths, and whether it is more than the dtype explains (NaN is)."""
    numbers = [x for x in errors.values() if isinstance(x, float)]
    agrees = bool(numbers) and all(math.isfinite(x) and x <= TOLERANCE[dtype] for x in numbers)
    shown = {name: x if not isinstance(x, float) or math.isfinite(x) else str(x) for name, x in errors.items()}
    return {**shown, "tolerance": TOLERANCE[dtype], "agrees": agrees}


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
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=NEEDS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, in fp32")
    parser.add_argument("--seq-len", type=positive, **SEVERAL, default=[2**12, 2**14, 2**16, 2**18, 2**20], metavar="T")
    parser.add_argument("--budget-s", type=positive, default=480, help="for everything (default: %(default)s)")
    parser.add_argument("--item-budget-s", type=positive, default=30, help="for a measurement (default: %(default)s)")
    names = [name for name in dict.fromkeys((*ATTENTION, *MODEL, "huggingface")) if name != LONGEST]
    parser.add_argument("--peers", **SEVERAL, choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--skip-tests", action="store_true", help="of the kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="(default: benchmarks/gpu-<device>.json; cpu: none)")
    shape = Sizes(d_model=1024, n_layers=12, n_heads=8, chunk_tokens=2**15)
    for name in ("d_model", "n_layers", "n_heads", "n_hashes", "chunk_len", "chunk_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=getattr(shape, name))
    arguments = parser.parse_args()
    arguments.seq_len = sorted(set(arguments.seq_len))
    return arguments


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Raises DataError where there is no such device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise DataError(
            "there is no CUDA device here (torch.cuda.is_available() is False); run this on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or try the flow with --device cpu --seq-len 256 512 --n-layers 2 "
            "--d-model 64 --n-heads 2 --skip-tests"
        )
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    memory_gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    budget = Budget(arguments.budget_s, arguments.item_budget_s, memory_gib)
    return Setting(device, dtype, budget, peaks_of(name_of(device)), arguments.peers)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def file_for(device: torch.device) -> Path | None:
    """Where the record goes if no other file is named."""
    name = "-".join(name_of(device).lower().split())
    return ROOT / "benchmarks" / f"gpu-{name}.json" if device.type == "cuda" else None


def check(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if a test fails, the two paths disagree, our model could not be timed, or the GPU was lost."""
    setting = setting_of(arguments)
    device = setting.device
    sizes = Sizes(**{key: getattr(arguments, key) for key in asdict(Sizes()) if key in arguments} | {"seq_len": 0})
    config_of(replace(sizes, seq_len=max(arguments.seq_len)))  # which refuses sizes that do not go together
    file = arguments.json or file_for(device)
    record: Result = {
        "command": ["python", "launch/gpu_check.py", *sys.argv[1:]],
        **hardware(device, setting.peaks),
        "versions": versions(),
        "sizes": {key: x for key, x in asdict(sizes).items() if key != "seq_len"},
    }
    write(file, record)
    try:
        is_sound = measure_all(arguments, setting, sizes, record, file)
    except DeviceLost as lost:
        record["lost"] = str(lost)
        write(file, record)
        print(f"error: the GPU answers no more after {lost}; what came before it is kept", file=sys.stderr)
        is_sound = False
    if file:
        print(f"written: {file}", flush=True)
    return int(not is_sound)


def measure_all(
    arguments: argparse.Namespace, setting: Setting, sizes: Sizes, record: Result, file: Path | None
) -> bool:
    """Whether what ran was as it should be. What is found is put into the record, and written, one after the other."""
    device, dtype, budget = setting.device, setting.dtype, setting.budget
    record["tests"] = {"skipped": True} if arguments.skip_tests else run_tests()
    print("tests:", record["tests"].get("output") or json.dumps(record["tests"]), flush=True)
    write(file, record)
    compared = {}
    for name, seq_len, n_documents in (
        ("fused_against_chunked", min(arguments.seq_len), 1),
        ("fused_against_chunked_packed", min(max(arguments.seq_len), PACKED_TOKENS), PACKED_DOCUMENTS),
    ):
        compare = partial(disagreement, replace(sizes, seq_len=seq_len), n_documents, device, dtype)
        record[name] = compared[name] = judged(attempt(compare, device), dtype)
        print(f"{name}:", json.dumps(record[name]), flush=True)
        write(file, record)
    shapes = [replace(sizes, seq_len=seq_len) for seq_len in arguments.seq_len]
    first = replace(setting, peers=[name for name in arguments.peers if name in FIRST])
    others = replace(setting, peers=[name for name in arguments.peers if name not in FIRST])
    record["results"] = []
    time_all(shapes, first, record, file, LONGEST_SHARE * budget.total_s)
    ours = [x for x in record["results"] if x["peer"] == "ours" and "seconds" in x]
    known = [x for x in ours if x["what"] == "model fwd+bwd"]
    if known and device.type == "cuda":  # on a CPU it would fill the machine's memory

        def keep(tried: Sequence[Result]) -> None:
            record["longest"] = {"tried": tried}
            write(file, record)

        record["longest"] = find_longest(sizes, known, setting, keep)
        print("longest:", json.dumps({key: x for key, x in record["longest"].items() if key != "tried"}))
        write(file, record)
    time_all(shapes, others, record, file)
    is_broken = "error" in record["tests"] or not all(errors["agrees"] for errors in compared.values())
    return not is_broken and bool(known or "ours" not in arguments.peers)


def write(file: Path | None, record: Result) -> None:
    """What is measured so far, so that nothing of it is lost if the rest is not. Raises DataError.

    The file is replaced as a whole: should this be killed, or the disk be full, what was there stays.
    """
    if file:
        unfinished = file.with_name(f"{file.name}.partial")
        try:
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error}; give another --json FILE") from None


def main() -> int:
    return exit_code(lambda: check(parse_arguments()), ConfigError)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which stops the tests, like Ctrl-C
    sys.exit(main())
