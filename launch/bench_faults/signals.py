"""Runs that are asked to stop: the part `signals` of `python launch/benchmark.py faults`.

USR1, USR2 and TERM, one after the other in one run, through plain Python, `deepspeed`, `mpirun`, `srun` and
launch/slurm/train.sbatch, at a random moment of the steps or, one in four, of the start-up. A signal is honoured when
the command ends with 75 (under sbatch: when SLURM has put the job back into its queue), and the newest checkpoint is of
the last step that was reported, so that nothing is lost. The same command goes on, and in the end the curve must be
that of the undisturbed run.
"""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

from bench_faults.jobs import ASK_S, Job, Run, begun, tail, wait
from bench_faults.kills import Watch, flaw, some_steps
from bench_faults.runs import VARIANTS, Bench, Undisturbed
from trainer.preemption import PREEMPTED, SIGNALS


@dataclass
class Delivery:
    """One signal, and what became of it."""

    name: str
    when: str
    """ "start-up" or "steps"."""
    moment_s: float
    """Since the command was given, or the signal before it."""
    step: int
    """The last step that was reported when the run had stopped."""
    saved: int
    """The step of the newest checkpoint then."""
    code: int | None
    """How the command ended; PREEMPTED if SLURM put the job back into its queue. None: it hung."""
    seconds: float
    """From the signal to the end of the command."""


@dataclass
class Trial:
    """A run that gets a signal, perhaps more than once, and then is left to end."""

    mode: str
    variant: str
    deliveries: list[Delivery] = field(default_factory=list)
    error: str = ""


def deliver(job: Job, run: Run, number: int, length: Undisturbed, rng: random.Random) -> Delivery | None:
    """Sends a signal at a random moment and waits for what comes of it. None if the run had done its last step."""
    watch, queued, starts = Watch(job, run), job.requeued(), begun(job)
    if rng.random() < 0.25:  # a second: Python itself has to be there, and has to have got to the script's first lines
        there = watch.until(run.ranks, ASK_S) and watch.sleep(rng.uniform(1.0, max(1.0, length.start_up_s / 2)))
    else:
        there = watch.until(lambda: begun(job) > starts) and some_steps(watch, length, rng)
    if not there:
        return None
    sent, when = time.monotonic(), "steps" if begun(job) > starts else "start-up"
    job.signal(number)
    code = PREEMPTED if watch.until(lambda: job.requeued() > queued, ASK_S) else wait(job, run)
    if code != PREEMPTED and run.newest == length.steps:  # it was too late for it
        return None
    moment, seconds, last = sent - watch.since, time.monotonic() - sent, int(run.last.get("step", 0))
    return Delivery(signal.Signals(number).name, when, moment, last, run.newest, code, seconds)


def run_trial(bench: Bench, mode: str, variant: str, n_signals: int, rng: random.Random) -> Trial:
    """A run that gets so many different signals, in random order; fewer if it ends before they have all come."""
    length, run, trial = bench.undisturbed(mode, variant), bench.new_run(variant), Trial(mode, variant)
    job, problem = bench.start(mode, run), None
    for number in rng.sample(SIGNALS, n_signals):
        delivery = deliver(job, run, number, length, rng)
        if delivery is None:
            break
        trial.deliveries.append(delivery)
        if problem := dishonoured(delivery):
            break
        if not job.requeued():
            job = bench.start(mode, run)
    problem = problem or flaw(run, length, wait(job, run))
    trial.error = f"{problem}: {tail(job)}" if problem else ""
    return trial


def dishonoured(delivery: Delivery) -> str | None:
    """What a run did wrong when it got a signal."""
    if delivery.code != PREEMPTED:
        return f"{delivery.name} made it end with {delivery.code}, not {PREEMPTED}"
    if delivery.saved != delivery.step:
        return f"{delivery.name} came after step {delivery.step}, but the checkpoint is of step {delivery.saved}"
    return None


def signals(bench: Bench, times: int, seed: int, modes: Sequence[str]) -> Iterator[Trial]:
    """Runs with at least so many signals in all, modes and variants in turn."""
    rng, done = random.Random(seed), 0
    turns = cycle((mode, variant) for variant in VARIANTS for mode in modes)
    while done < times:
        trial = run_trial(bench, *next(turns), min(len(SIGNALS), times - done), rng)
        done += len(trial.deliveries)
        yield trial


HEADER = (
    f"{'mode':<17}{'variant':<17}{'signal':<9}{'when':<9}{'at s':>6}{'step':>6}{'saved':>6}{'code':>5}{'after s':>9}"
    "  curve in the end"
)


def table(trial: Trial) -> str:
    """A line for each signal of a trial; what came of it all is in the last."""
    rows = [
        f"{trial.mode:<17}{trial.variant:<17}{each.name:<9}{each.when:<9}{each.moment_s:>6.2f}{each.step:>6}"
        f"{each.saved:>6}{each.code!s:>5}{each.seconds:>9.2f}"
        for each in trial.deliveries
    ] or [f"{trial.mode:<17}{trial.variant:<17}no signal"]
    rows[-1] += "  " + (f"FAILED: {trial.error}" if trial.error else "identical")
    return "\n".join(rows)
