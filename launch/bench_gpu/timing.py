"""Timing what `launch/gpu_check.py` compares, within its budget, and the longest sequence that the device trains.

What goes wrong with one of them, or would take too long, is a result too: the others are still to be measured.
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from bench.peers import Sizes, Step, config_of

from bench_gpu.budget import Budget, expected_call_s, longest
from bench_gpu.peers import ATTENTION, LONGEST, MODEL, OUR_MODEL, attention_step, model_training_step
from bench_gpu.roofline import backward_work, forward_work
from trainer.flops import training_flops
from trainer.peaks import mfu

REPEAT_S, REPEATS, MOST_CALLS = 0.2, 3, 20
"""The median of three runs of as many calls as fit into so many seconds."""
ONCE_S = 10.0
"""What is expected to take longer is called once."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is the same for all measurements."""

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    peaks: tuple[float, float] | None
    peers: Sequence[str]


class DeviceLost(Exception):
    """The device answers this process no more, as after an access to memory that is not the process's."""


def measure(build: Callable[[], Step], device: torch.device, once: bool = False) -> Result:
    """Seconds of a call (once: of the very first), of the first, which compiles, and peak memory."""
    gc.collect()  # what stood before in circles of references would count into this one's peak
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step = build()
    first_s = _timed(step, 1, device)
    seconds = [first_s if once else _timed(step, 1, device)]
    if not once and (calls := min(MOST_CALLS, int(REPEAT_S / seconds[0]))):
        seconds = [_timed(step, calls, device) for _ in range(REPEATS)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    first_call = {"first_call": True} if once else {}
    found = {"seconds": statistics.median(seconds), "all_seconds": seconds, "first_s": first_s, "peak_gib": peak}
    return {**found, **first_call}


def attempt(function: Callable[[], Result], device: torch.device) -> Result:
    """Its result; what goes wrong is a result too, whatever it is: the others are still to be measured.

    Raises DeviceLost where they cannot be.
    """
    try:
        return function()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        lines = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    try:
        _synchronize(device)
    except Exception:
        raise DeviceLost(what) from None
    return {"error": what}


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


def run_items(sizes: Sizes, setting: Setting, earlier: Sequence[Result], reserve_s: float = 0.0) -> Iterator[Result]:
    """All measurements at one length, those left out included; so much time is to be left after them."""
    budget = setting.budget
    for label, build in items(sizes, setting):
        same = [x for x in earlier if (x["what"], x["peer"]) == (label["what"], label["peer"])]
        measured = [x for x in same if "seconds" in x]
        stopped = next((x for x in same if "error" in x), None)
        if label["peer"] == "huggingface" and not find_spec("transformers"):
            result: Result = {"error": "transformers is not installed"}
        elif stopped:
            result = {"error": stopped["error"]}
        else:
            expected_s = expected_call_s([(x["seq_len"], x["seconds"]) for x in measured], sizes.seq_len)
            once = expected_s > ONCE_S
            compile_s = max(0.0, measured[-1]["first_s"] - measured[-1]["seconds"]) if measured else 0.0
            objection = budget.no_memory(peaks_gib(measured), sizes.seq_len)
            objection = objection or budget.objection((1 if once else 2) * expected_s + compile_s, reserve_s)
            if objection:
                result = {"left_out": objection}
            else:
                result = attempt(functools.partial(measure, build, setting.device, once), setting.device)
        if label["peer"] == "ours-attention" and "seconds" in result:
            result |= achieved(
                sizes, setting.dtype, label["what"] == "attention fwd+bwd", result["seconds"], setting.peaks
            )
        if label["what"] == "model fwd+bwd" and "seconds" in result:
            result |= training_speed(sizes, label["peer"], result["seconds"], setting.peaks)
        print(row({**label, **result}), flush=True)
        yield {**label, **result}


def peaks_gib(results: Sequence[Result]) -> list[tuple[int, float]]:
    """Peak memory by length, where it was measured."""
    return [(x["seq_len"], x["peak_gib"]) for x in results if x.get("peak_gib")]


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


def find_longest(
    sizes: Sizes, known: Sequence[Result], setting: Setting, keep: Callable[[Sequence[Result]], None]
) -> Result:
    """The longest sequence that our model trains on this device, its tokens per second and MFU.

    With `keep_ends` off, which is for this. From the steps that are known, upwards until memory or the time that is
    left forbids it. `keep` is given what was tried, each time.
    """
    budget, tried = setting.budget, []
    seconds = {x["seq_len"]: x["seconds"] for x in known}
    gib: dict[int, float] = {}  # of the model that is looked for alone: those that are known take more
    no_time = False

    def trains(seq_len: int) -> bool:
        nonlocal no_time
        label = {"what": "longest", "peer": "ours", "seq_len": seq_len}
        if objection := budget.no_memory(list(gib.items()), seq_len):
            found: Result = {"left_out": objection}
        elif objection := budget.no_time(expected_call_s(list(seconds.items()), seq_len)):
            found, no_time = {"left_out": objection}, True
        else:
            shape = replace(sizes, seq_len=seq_len)
            build = functools.partial(model_training_step, LONGEST, shape, setting.device, setting.dtype)
            found = attempt(functools.partial(measure, build, setting.device, once=True), setting.device)
            if "seconds" in found:
                found |= training_speed(shape, "ours", found["seconds"], setting.peaks)
                seconds[seq_len] = found["seconds"]
                gib.update(peaks_gib([{**label, **found}]))
        tried.append({**label, **found})
        print(row(tried[-1]), flush=True)
        keep(tried)
        return "seconds" in found

    length = longest(trains, max(seconds))
    speed = training_speed(replace(sizes, seq_len=length), "ours", seconds[length], setting.peaks)
    return {"seq_len": length, **speed, "limited_by": "time" if no_time else "memory", "tried": tried}
