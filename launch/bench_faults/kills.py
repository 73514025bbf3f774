"""Runs that are killed at random moments: the part `kills` of `python launch/benchmark.py faults`.

SIGKILL, to one rank or to all processes of a run: in one process, in two under `deepspeed`, and on a SLURM cluster of
two nodes, where "all" is `scancel --signal=KILL`. A third of the kills comes at a moment that is drawn from all that
the run would still have taken, start-up first, a third at a moment of the next few steps, with their evaluations and
checkpoints, and a third waits for a checkpoint that is being written. Then the same command is given again, and may be
killed again. In the end the curve must be that of the undisturbed run; and every start must go on from the newest
checkpoint that was there, none of which may be damaged.
"""

import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle

import psutil

from bench_faults.jobs import ASK_S, PATIENCE_S, POLL_S, Job, Run, begun, tail, wait
from bench_faults.runs import EVAL_EVERY, VARIANTS, Bench, Undisturbed, curve, difference
from trainer import checkpoint

KILL_MODES = ("process", "deepspeed", "sbatch")
AIMS = ("any moment", "steps", "a save")
MOST_KILLS = 8
"""Of one run."""
REACH = 6
"""A kill that is aimed at steps comes within so many of the newest checkpoint, so that there is a run left to kill."""


@dataclass
class Kill:
    """One SIGKILL, and how far the run was."""

    aim: str
    moment_s: float
    """Since the command was given."""
    victim: str
    """ "one rank" or "all"."""
    stage: str
    """ "start-up", "step", "evaluation" or "save"."""
    step: int
    """The last step that was reported."""
    saved: int
    """The step of the newest checkpoint, from which the next start must go on; 0: from the beginning."""
    code: int | None
    """How the command ended; None: it had to be killed as a whole, since it hung."""


@dataclass
class Trial:
    """A run that is killed, perhaps more than once, and then left to end."""

    mode: str
    variant: str
    kills: list[Kill] = field(default_factory=list)
    error: str = ""


class Watch:
    """A run that is about to be killed, and what it is doing."""

    def __init__(self, job: Job, run: Run) -> None:
        self.job, self.run = job, run
        self.since = time.monotonic()
        self._asked = 0.0

    def until(self, condition: Callable[[], object], every_s: float = POLL_S) -> bool:
        """Waits for a condition. False if the run has ended before, or should have."""
        while not condition():
            now = time.monotonic()
            if now > self.since + PATIENCE_S:
                return False
            if now > self._asked + ASK_S:
                self._asked = now
                if self.job.code() is not None:
                    return False
            time.sleep(every_s)
        return True

    def sleep(self, seconds: float) -> bool:
        """Lets so much time pass. False if the run has ended before."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)

    def stage(self) -> str:
        """What the run is doing, by what it has left."""
        if not begun(self.job):
            return "start-up"
        if self.run.partials:
            return "save"
        last = self.run.last
        return "evaluation" if not last or ("eval/loss" not in last and last["step"] % EVAL_EVERY == 0) else "step"


def some_steps(watch: Watch, length: Undisturbed, rng: random.Random) -> bool:
    """Waits for a moment of the next few steps of a run that has begun. False if the run has ended before.

    The steps are counted, not timed: on a busy machine a run may be faster than the undisturbed one was.
    """
    target = rng.randrange(watch.run.newest, min(watch.run.newest + REACH, length.steps))
    return watch.until(lambda: watch.run.last.get("step", 0) >= target) and watch.sleep(rng.uniform(0, length.step_s))


def reach(watch: Watch, aim: str, length: Undisturbed, rng: random.Random) -> list[psutil.Process] | None:
    """Waits for the moment of a kill. Returns the ranks that there are then; None if the run has ended before."""
    if aim == "any moment":
        left_s = length.step_s * (length.steps - watch.run.newest)
        there = watch.sleep(rng.uniform(0, length.start_up_s + left_s)) and watch.until(watch.job.started, ASK_S)
        return watch.run.ranks() if there else None
    if not watch.until(lambda: begun(watch.job)):
        return None
    if aim == "steps":
        return watch.run.ranks() if some_steps(watch, length, rng) else None
    ranks = watch.run.ranks()  # to look for them later would take longer than a checkpoint
    for _ in range(rng.choice((1, 2))):  # else a run that is hit at its next checkpoint again and again never goes on
        if not (watch.until(lambda: not watch.run.partials) and watch.until(lambda: watch.run.partials)):
            return None
    time.sleep(rng.uniform(0, length.save_s))
    return ranks


def strike(job: Job, run: Run, aim: str, length: Undisturbed, rng: random.Random) -> Kill | None:
    """Kills a run or one rank of it, and waits for the rest. None if the run had ended before."""
    watch = Watch(job, run)
    ranks = reach(watch, aim, length, rng)
    if ranks is None:
        return None
    alone = len(ranks) > 1 and rng.random() < 0.5
    moment = time.monotonic() - watch.since
    for victim in [rng.choice(ranks)] if alone else ranks:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    if not alone:
        job.kill()
    kill = Kill(aim, moment, "one rank" if alone else "all", watch.stage(), 0, 0, None)
    kill.code = wait(job, run)
    kill.step, kill.saved = int(run.last.get("step", 0)), run.newest
    return kill


def run_trial(bench: Bench, mode: str, variant: str, n_kills: int, rng: random.Random) -> Trial:
    """A run with so many kills, fewer if it ends before they have all come."""
    length, run, trial = bench.undisturbed(mode, variant), bench.new_run(variant), Trial(mode, variant)
    aims = [AIMS[n % len(AIMS)] for n in range(n_kills)]
    rng.shuffle(aims)
    for aim in [*aims, None]:
        before = run.newest
        job = bench.start(mode, run)
        kill = strike(job, run, aim, length, rng) if aim else None
        if kill is None:
            code = wait(job, run)
        else:
            trial.kills.append(kill)
            code = kill.code
        problem = wrong_start(job, before) or ("hung" if code is None else None)
        if problem or kill is None or code == 0:
            problem = problem or flaw(run, length, code)
            break
    trial.error = f"{problem}: {tail(job)}" if problem else ""
    return trial


def wrong_start(job: Job, newest: int) -> str | None:
    """Whether a run went on from elsewhere than its newest checkpoint (0: than the beginning)."""
    text = job.log.read_text(errors="replace")
    if "starting anew in " in text:
        return f"started anew beside a checkpoint of step {newest}" if newest else None
    found = re.search(r"continuing from \S*step_(\d+)", text)
    return f"continued from step {int(found[1])}, not {newest}" if found and int(found[1]) != newest else None


def flaw(run: Run, length: Undisturbed, code: int | None) -> str | None:
    """What is wrong with a run that was left to end with this exit code; None if it is as if undisturbed."""
    if code != 0:
        return f"exit code {code}"
    try:
        found = difference(length.curve, curve(run.dir))
    except (OSError, ValueError) as error:
        return f"its curve cannot be read: {error!r}"
    mine, others = kept(run), kept(length.run)
    return found or (f"it keeps {mine}, not {others}" if mine != others else None)


def kept(run: Run) -> tuple[int, int, list[str]]:
    """How many checkpoints a run has kept, the step of the newest, and what is there of others."""
    return len(checkpoint.published(run.dir)), run.newest, run.partials


def kills(bench: Bench, times: int, seed: int, modes: Sequence[str]) -> Iterator[Trial]:
    """Runs with at least so many kills in all, modes and variants in turn."""
    rng, done = random.Random(seed), 0
    turns = cycle((mode, variant) for variant in VARIANTS for mode in modes)
    while done < times:
        trial = run_trial(bench, *next(turns), min(MOST_KILLS, times - done), rng)
        done += len(trial.kills)
        yield trial


HEADER = (
    f"{'mode':<10}{'variant':<17}{'aim':<11}{'at s':>6}  {'killed':<9}{'stage':<11}{'step':>5}{'saved':>6}{'code':>5}"
    "  curve in the end"
)


def table(trial: Trial) -> str:
    """A line for each kill of a trial; what came of it all is in the last."""
    rows = [
        f"{trial.mode:<10}{trial.variant:<17}{kill.aim:<11}{kill.moment_s:>6.2f}  {kill.victim:<9}{kill.stage:<11}"
        f"{kill.step:>5}{kill.saved:>6}{kill.code!s:>5}"
        for kill in trial.kills
    ] or [f"{trial.mode:<10}{trial.variant:<17}not killed"]
    rows[-1] += "  " + (f"FAILED: {trial.error}" if trial.error else "identical")
    return "\n".join(rows)
