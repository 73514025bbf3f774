"""Builds that are killed at random moments: the part `kills` of `python launch/benchmark.py pipeline-faults`.

In one process, in two, and under `mpirun -n 2`, a build gets SIGKILL at a moment that is drawn from the length of an
undisturbed one: one process of the job, any of them, or all. Then the same command runs again, and may be killed again.
In the end the store must be that of an undisturbed build, to the byte. What was done before a kill must not be done
again: records of tasks are watched all the time, and only tasks that were under way when the kill came, at most one per
worker, may be lost.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import psutil
from bench.corpora import write_corpus
from bench.process import AS_ROOT

from data_pipeline.store import list_files

WORKERS = {"serial": 1, "processes": 2, "mpirun": 2}
RECORDS = {"tokens": ".npz", "shards": ".json"}
"""Folders of a build's work directory that hold records of tasks, and the suffix of these."""
STAGES = ("start", "tokens", "plan", "shards", "finish")
POLL_S = 0.01
PATIENCE_S = 180.0
"""After this long a job of which one process was killed must have ended, well or not."""


@dataclass(frozen=True)
class Target:
    """What is built, and what must come of it."""

    corpus: Path
    options: tuple[str, ...]
    expected: Path
    """The store of an undisturbed build in one process."""
    seconds: dict[str, float]
    """Mode -> how long an undisturbed build takes."""


@dataclass
class Kill:
    """One SIGKILL, and how far the build was."""

    moment_s: float
    victim: str
    """The name of one process, or "all"."""
    stage: str
    tasks: int
    shards: int
    """Tasks and shards that had a record."""
    lost: int
    """Tasks and shards that were under way."""
    then: str
    """What became of the job: it "was killed", "stopped" with an error, or "finished" without the one process."""


@dataclass
class Trial:
    """A build that is killed, perhaps more than once, and then left to finish."""

    mode: str
    kills: list[Kill] = field(default_factory=list)
    redone: int = 0
    """Tasks and shards that were done again although they had a record."""
    refused: int = 0
    """How often the same command was refused because processes of the killed job were still there."""
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and not self.redone and all(kill.lost <= WORKERS[self.mode] for kill in self.kills)


class Watch:
    """The records in a work directory: how many there are, and how many were written again."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.redone = 0
        self._inodes: dict[tuple[str, str], int] = {}

    def look(self) -> None:
        """To be called often: a record that is replaced must have been seen before."""
        for folder, suffix in RECORDS.items():
            for name, inode in self._entries(folder).items():
                if name.endswith(suffix):
                    self.redone += self._inodes.get((folder, name), inode) != inode
                    self._inodes[folder, name] = inode

    def count(self, folder: str) -> int:
        """Records seen in a folder."""
        return sum(where == folder for where, _ in self._inodes)

    def under_way(self) -> int:
        """Tasks with a claim and without a record."""
        claims = [(folder, name) for folder in RECORDS for name in self._entries(folder) if name.endswith(".claim")]
        return sum((folder, name.replace(".claim", RECORDS[folder])) not in self._inodes for folder, name in claims)

    def stage(self) -> str:
        """The latest stage that has begun."""
        return next((stage for stage in reversed(STAGES) if (self.work / stage).exists()), "-")

    def _entries(self, folder: str) -> dict[str, int]:
        with suppress(FileNotFoundError), os.scandir(self.work / folder) as entries:
            return {entry.name: entry.inode() for entry in entries}
        return {}


def build_command(mode: str, target: Target, output: Path) -> list[str]:
    """The command that builds `output` in this mode."""
    paths = ["--input", str(target.corpus), "--output", str(output)]
    build = [sys.executable, "-m", "data_pipeline", "build", *paths, *target.options]
    if mode == "mpirun":
        return [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n", "2", *build]
    return [*build, "--workers", str(WORKERS[mode])]


def start(words: Sequence[str], log: Path) -> psutil.Popen:
    """Starts a command whose output goes to a file."""
    with log.open("wb") as file:
        return psutil.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **AS_ROOT})


def wait(process: psutil.Popen, watch: Watch, seconds: float) -> int | None:
    """The exit code of a process if it ends within so many seconds; watches records meanwhile."""
    deadline = time.monotonic() + seconds
    while (code := process.poll()) is None and time.monotonic() < deadline:
        watch.look()
        time.sleep(POLL_S)
    return code


def prepare(folder: Path, n_bytes: int) -> Target:
    """Makes a corpus of so many bytes and its tokenizer, and builds it undisturbed in each mode."""
    write_corpus(folder / "corpus", n_bytes)
    tokenizer = str(folder / "new.model")
    paths = ["--input", str(folder / "corpus"), "--output", tokenizer]
    words = [sys.executable, "-m", "data_pipeline", "tokenizer", *paths, "--vocab-size", "2000"]
    subprocess.run([*words, "--max-bytes", "1000000"], check=True, capture_output=True)
    options = ("--tokenizer", tokenizer, "--seq-len", "4096", "--rows-per-shard", "64", "--split", "val=0.2")
    target = Target(folder / "corpus", options, folder / "undisturbed" / "serial", {})
    for mode in WORKERS:
        output = folder / "undisturbed" / mode
        process, begun = start(build_command(mode, target, output), folder / "log"), time.perf_counter()
        if process.wait():
            raise SystemExit(f"error: cannot build at all ({mode}): {(folder / 'log').read_text()}")
        target.seconds[mode] = time.perf_counter() - begun
        if difference := first_difference(target.expected, output):
            raise SystemExit(f"error: {mode} and serial differ in {difference}, undisturbed")
    return target


def kill_at_random(process: psutil.Popen, watch: Watch, rng: random.Random, mode: str, horizon_s: float) -> Kill | None:
    """Kills a process of the job or all of it, and waits for the rest. None if the job had ended before."""
    moment = rng.uniform(0, horizon_s)
    everyone = rng.random() < 0.5
    if wait(process, watch, moment) is not None:
        return None
    job = [process, *process.children(recursive=True)]
    victims = job if everyone else [rng.choice(job)]
    victim = "all" if everyone else name_of(victims[0], process, mode)
    for member in victims:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    watch.look()
    done = (watch.count("tokens"), watch.count("shards"))
    kill = Kill(moment, victim, watch.stage(), *done, watch.under_way(), "")
    code = wait(process, watch, PATIENCE_S)
    if code is None:
        for member in job:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    # What a killed mpirun leaves there keeps the next one of the same number from starting.
    shutil.rmtree(Path(tempfile.gettempdir()) / f"ompi.{process.pid}", ignore_errors=True)
    kill.then = {None: "hung", 0: "finished", -9: "was killed"}.get(code, "stopped")
    return kill


def name_of(process: psutil.Process, job: psutil.Process, mode: str) -> str:
    """What a process is in its job: the "mpirun" or "build" that was started, or what that started."""
    if process == job:
        return "mpirun" if mode == "mpirun" else "build"
    with suppress(psutil.NoSuchProcess):
        words = " ".join(process.cmdline())
        for sign, name in {"resource_tracker": "tracker", "spawn_main": "worker", "data_pipeline": "rank"}.items():
            if sign in words:
                return name
    return "other"


def run_trial(mode: str, target: Target, folder: Path, rng: random.Random) -> Trial:
    """One to three kills, as far as the build lasts, and a run to the end."""
    output, log = folder / "store", folder / "log"
    words = build_command(mode, target, output)
    trial, watch = Trial(mode), Watch(folder / ".store.partial")
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not output.exists():
            kill = kill_at_random(start(words, log), watch, rng, mode, target.seconds[mode])
            trial.kills += [kill] if kill else []
    while (code := wait(process := start(words, log), watch, PATIENCE_S)) and trial.refused < 10:
        if "by another process" not in log.read_text():
            break
        trial.refused += 1
        time.sleep(1)
    if code is None:
        process.kill()
    trial.redone = watch.redone
    difference = first_difference(target.expected, output)
    if code != 0:
        trial.error = f"exit code {code}: {log.read_text()[-500:]}"
    elif difference or watch.work.exists():
        trial.error = f"differs in {difference}" if difference else "left its work directory behind"
    return trial


def first_difference(expected: Path, found: Path) -> str | None:
    """A file of one store that the other has not, or has with another content."""
    names = sorted({*list_files(expected), *list_files(found)})
    for name in names:
        paths = (expected / name, found / name)
        if not all(path.is_file() for path in paths) or paths[0].read_bytes() != paths[1].read_bytes():
            return name
    return None


KILLS_HEADER = (
    f"{'mode':<10}{'at s':>7}  {'killed':<9}{'stage':<8}{'tasks':>6}{'shards':>7}{'lost':>5}"
    f"  {'the job then':<13}{'redone':>7}{'refused':>8}  result"
)


def kills_table(trial: Trial) -> str:
    """A line for each kill of a trial; what came of it all is in the last."""
    rows = [
        f"{trial.mode:<10}{kill.moment_s:>7.2f}  {kill.victim:<9}{kill.stage:<8}{kill.tasks:>6}{kill.shards:>7}"
        f"{kill.lost:>5}  {kill.then:<13}"
        for kill in trial.kills
    ]
    if rows:
        result = "identical" if trial.passed else f"FAILED {trial.error}"
        rows[-1] += f"{trial.redone:>7}{trial.refused:>8}  {result}"
    return "\n".join(rows)


def kills(times: int, seed: int, n_bytes: int) -> list[Trial]:
    """Trials with at least so many kills in all, modes in turn; a table on stdout as it comes."""
    rng, modes = random.Random(seed), cycle(WORKERS)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="longhand-kills-") as name:
        target = prepare(Path(name), n_bytes)
        print("undisturbed:", ", ".join(f"{mode} {s:.1f} s" for mode, s in target.seconds.items()), flush=True)
        print(KILLS_HEADER, flush=True)
        while sum(len(trial.kills) for trial in trials) < times:
            folder = Path(name) / f"trial-{len(trials)}"
            folder.mkdir()
            trials.append(run_trial(next(modes), target, folder, rng))
            if trials[-1].kills:
                print(kills_table(trials[-1]), flush=True)
            shutil.rmtree(folder)
    return trials
