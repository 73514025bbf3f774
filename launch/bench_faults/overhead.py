"""What surviving costs: the part `overhead` of `python launch/benchmark.py faults`. Run it alone on the machine.

`resume`: seconds from the command to the end of the first step less that step, of a run that is begun and of one that
is continued, in turn. `loop`: the trainer's steps (data, counting, logging, watchdog, agreeing on signals) against the
engine's forward, backward and step alone, in turn in one process, at several lengths of the demo's model. `save`: a
checkpoint's seconds and MB/s (10^6 bytes), written, verified and loaded in one process from and to memory that the
system keeps of the disk. `share`: speed/save_share of the demo's run on two ranks.
"""

import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from bench.process import in_a_process

from bench_faults.jobs import Run, tail, wait
from bench_faults.runs import Bench, FailedError
from bench_faults.worker import DEMO, MODELS, write_store

Result = dict[str, Any]
LENGTHS = (65_536, 16_384, 4_096, 1_024)
AIM = 0.03
"""What the trainer's loop may add to a step."""
SHARE_STEPS, SHARE_EVERY = 21, 10


def first_step(mode: str, run: Run, bench: Bench) -> tuple[float, float]:
    """Starts a run. Returns the seconds until its first step began, and those of the whole command."""
    before, begun = run.last.get("step", 0), time.monotonic()
    job = bench.start(mode, run)
    while (line := run.last).get("step", 0) <= before or "speed/step_s" not in line:
        if job.code() is not None and run.last == line:
            raise FailedError(f"{mode} ended without a step: {tail(job)}")
        time.sleep(0.01)
    seconds = time.monotonic() - begun - line["speed/step_s"]
    if code := wait(job, run):
        raise FailedError(f"{mode} ends with {code}: {tail(job)}")
    return seconds, time.monotonic() - begun


def resume(bench: Bench, rounds: int) -> Iterator[Result]:
    """Start-up of a run that is begun and of one that is continued, medians."""
    for mode in ("process", "deepspeed"):
        base = replace(bench.new_run("ZeRO-2"), changes=("run.eval_every=0", "run.steps=3"))
        first_step(mode, base, bench)
        seconds: dict[str, list[float]] = {"anew": [], "resumed": []}
        for number in range(rounds):
            anew = bench.new_run("ZeRO-2")
            seconds["anew"].append(first_step(mode, replace(anew, changes=base.changes), bench)[0])
            again = replace(
                base, dir=bench.folder / f"again-{mode}-{number}", changes=("run.eval_every=0", "run.steps=4")
            )
            shutil.copytree(base.dir, again.dir)
            seconds["resumed"].append(first_step(mode, again, bench)[0])
        anew_s, resumed_s = (statistics.median(some) for some in seconds.values())
        yield {
            "what": "resume",
            "mode": mode,
            "anew_s": anew_s,
            "resumed_s": resumed_s,
            "resume_overhead_s": resumed_s - anew_s,
            "seconds": seconds,
        }


def in_worker(worker: str, size: str | int, rounds: int, threads: int, budget_s: int) -> Result:
    options = {"worker": worker, "size": size, "rounds": rounds, "threads": threads}
    return {"what": worker, "size": size, **in_a_process("faults", options, budget_s)}


def share(bench: Bench) -> Result:
    """The demo's run on two ranks, with a checkpoint after every SHARE_EVERY steps."""
    store = write_store(bench.folder / "demo", 16, 65_536, 1024)
    settings = (f"run.steps={SHARE_STEPS}", f"run.save_every={SHARE_EVERY}", "run.eval_every=0", f"data.store={store}")
    run = Run(DEMO, bench.folder / "demo-run", settings)
    job = bench.start("deepspeed", run)
    if code := wait(job, run, seconds=3600):
        raise FailedError(f"the demo's run ends with {code}: {tail(job)}")
    names = ("speed/save_share", "speed/step_s")
    return {
        "what": "share",
        "steps": SHARE_STEPS,
        "save_every": SHARE_EVERY,
        **{name: run.last[name] for name in names},
    }


def overhead(bench: Bench, rounds: int, pairs: int, threads: int, budget_s: int) -> Iterator[Result]:
    """Everything, one result at a time."""
    yield from resume(bench, rounds)
    for seq_len in LENGTHS:
        yield in_worker("loop", seq_len, pairs, threads, budget_s)
    for model in MODELS:
        yield in_worker("save", model, rounds, threads, budget_s)
    yield share(bench)


def line(result: Result) -> str:
    """What is said of a result."""
    what = result["what"]
    if "error" in result:
        return f"{what} {result['size']}: error: {result['error']}"
    if what == "resume":
        return (
            f"resume, {result['mode']}: the first step begins {result['anew_s']:.2f} s after the command in a new run, "
            f"{result['resumed_s']:.2f} s in one that is continued: {result['resume_overhead_s']:+.2f} s"
        )
    if what == "loop":
        return (
            f"loop, {result['size']:,} tokens a row: {result['trainer_s']:.4f} s a step, {result['bare_s']:.4f} s "
            f"bare: {result['overhead']:+.2%}, {result['overhead_of_pairs']:+.2%} as the median of pairs "
            f"(aim: under {AIM:.0%})"
        )
    if what == "save":
        sizes = f"{result['n_parameters']:,} parameters, {result['bytes']:,} bytes"
        parts = (
            f"{part} {result[f'{part}_s']:.2f} s ({result[f'{part}_mb_s']:,.0f} MB/s)"
            for part in ("save", "verify", "load")
        )
        return f"save, {result['size']} ({sizes}): {', '.join(parts)}"
    return (
        f"share: {result['speed/save_share']:.2%} of the demo's run on two ranks, a checkpoint every "
        f"{result['save_every']} steps of {result['speed/step_s']:.1f} s"
    )
