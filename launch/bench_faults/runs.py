"""What runs that faults are tried on have in common: a small model, and the curve that they leave behind.

A fault is survived when the run, started again by the same command, ends with the curve of a run that nothing happened
to: every number that is no time or size, by tag and step, once, to the last bit, in metrics.jsonl and in TensorBoard's
events.
"""

import json
import logging
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.corpora import write_corpus
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from bench_faults.jobs import MODES, POLL_S, Job, Run, begun, start, tail, wait
from trainer.run_files import read_metrics

VARIANTS = {
    "ZeRO-2": (),
    "ZeRO-2, dropout": ("model.dropout=0.1",),
    "ZeRO-3": ("deepspeed.zero_optimization.stage=3", "model.dropout=0.1"),
    "ZeRO-2, bf16": ("deepspeed.bf16.enabled=true",),
}
"""What the runs differ in."""
GAP_S = 0.3
TIMELESS = ("train/", "eval/", "lsh/", "reversible/")
"""Tags of what follows from the step alone; those of speed and memory do not."""
EVAL_EVERY = 5
TOML = """
[model]
vocab_size = 258
max_seq_len = 1024
d_model = 32
n_layers = 2
n_heads = 2
n_hashes = 2
lsh_chunk_len = 32
local_chunk_len = 32

[data]
store = "{store}"

[run]
dir = "given on the command line"
deepspeed_config = "deepspeed.json"
steps = {steps}
warmup_steps = 4
eval_every = {eval_every}
eval_rows = 3
save_every = 3
keep_last = 3
sample_tokens = 4
ablation_rows = 1
"""
DEEPSPEED = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True, "fused": True}},
}


def write_config(folder: Path, steps: int) -> Path:
    """A store of short rows and the two files of a run of so many steps in a new folder. Returns the TOML file."""
    folder.mkdir(parents=True)
    write_corpus(folder / "corpus", 60_000)
    paths = ["--input", str(folder / "corpus"), "--output", str(folder / "store"), "--split", "val=0.2"]
    words = [sys.executable, "-m", "data_pipeline", "build", *paths, "--tokenizer", "bytes", "--seq-len", "1024"]
    subprocess.run([*words, "--workers", "1"], check=True, capture_output=True)
    (folder / "deepspeed.json").write_text(json.dumps(DEEPSPEED))
    (folder / "run.toml").write_text(TOML.format(store=folder / "store", steps=steps, eval_every=EVAL_EVERY))
    return folder / "run.toml"


# What it leaves behind.

Point = tuple[str, int, float | None]
"""A tag, a step, and the value there."""


@dataclass(frozen=True)
class Curve:
    """All points of a run, in order."""

    metrics: list[Point]
    events: list[Point]


def curve(run_dir: Path) -> Curve:
    """What metrics.jsonl and TensorBoard's events say of a run. Raises OSError or ValueError if they cannot be read."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every event that it takes back
    lines = read_metrics(run_dir)
    metrics = [(tag, line["step"], value) for line in lines for tag, value in line.items() if timeless(tag)]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    tags = [tag for tag in events.Tags()[SCALARS] if timeless(tag)]
    scalars = [(tag, event.step, event.value) for tag in tags for event in events.Scalars(tag)]
    return Curve(sorted(metrics, key=place), sorted(scalars, key=place))


def timeless(tag: str) -> bool:
    return tag.startswith(TIMELESS)


def place(point: Point) -> tuple[str, int]:
    return point[:2]


def difference(expected: Curve, found: Curve) -> str | None:
    """Where two runs part, in words; None if they are the same to the last bit."""
    for file, before, after in (
        ("metrics.jsonl", expected.metrics, found.metrics),
        ("TensorBoard", expected.events, found.events),
    ):
        was, now = Counter(map(repr, before)), Counter(map(repr, after))  # by repr: NaN is NaN, -0.0 is not 0.0
        missing, extra = list((was - now).elements()), list((now - was).elements())
        if missing or extra:
            return f"{file}: missing {missing[:2]}, unexpected {extra[:2]} ({len(missing)} and {len(extra)} in all)"
    return None


def complete(points: Curve, steps: int) -> str | None:
    """What an undisturbed run's curve lacks: a loss of every step once, in both places."""
    for name, some in (("metrics.jsonl", points.metrics), ("TensorBoard", points.events)):
        for tag in ("train/loss", "train/lr", "train/grad_norm"):
            if [step for own, step, _ in some if own == tag] != list(range(1, steps + 1)):
                return f"{name} has not every step's {tag} once"
    return None


# All runs of a benchmark.


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    run: Run
    curve: Curve
    seconds: float
    """From its start to its end, in this mode."""
    steps: int
    start_up_s: float
    """Of these, what passed before the first step or evaluation began."""
    save_s: float
    """How long a checkpoint that is being written can be seen, the median."""

    @property
    def step_s(self) -> float:
        """Of a step, with its part of evaluations and checkpoints."""
        return (self.seconds - self.start_up_s) / self.steps


def median_save_s(job: Job, run: Run) -> float:
    """Watches a run to its end, and times its checkpoints."""
    seen: dict[str, tuple[float, float]] = {}
    asked = time.monotonic()
    while (now := time.monotonic()) < asked + 0.5 or job.code() is None:
        asked = asked if now < asked + 0.5 else now
        for name in run.partials:
            first, last = seen.get(name, (now, now))
            if now < last + GAP_S:  # later it is there again for a moment, being removed
                seen[name] = (first, now)
        time.sleep(POLL_S)
    return statistics.median([last - first for first, last in seen.values()] or [0.0])


class FailedError(Exception):
    """A run that must succeed did not."""


@dataclass
class Bench:
    """Where runs are made, and what they are compared with."""

    folder: Path
    steps: int
    cluster: Any = None
    """A running SLURM cluster; None if there is none."""
    _undisturbed: dict[tuple[str, str], Undisturbed] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.config = write_config(self.folder / "config", self.steps)

    def new_run(self, variant: str) -> Run:
        self._count += 1
        return Run(self.config, self.folder / f"run-{self._count}", VARIANTS[variant])

    def start(self, mode: str, run: Run) -> Job:
        """Starts a run, or goes on with it, with a log of its own."""
        self._count += 1
        return start(mode, run, self.folder / f"log-{self._count}", self.cluster)

    def undisturbed(self, mode: str, variant: str) -> Undisturbed:
        """The run to compare with; made once. Raises FailedError if it fails or its curve has holes."""
        if (mode, variant) not in self._undisturbed:
            run, since = self.new_run(variant), time.monotonic()
            job = self.start(mode, run)
            while not begun(job) and job.code() is None:
                time.sleep(0.02)
            start_up_s = time.monotonic() - since
            save_s = median_save_s(job, run)
            if code := wait(job, run):
                raise FailedError(f"an undisturbed run ({mode}, {variant}) ends with {code}: {tail(job)}")
            seconds, points = time.monotonic() - since, curve(run.dir)
            if problem := complete(points, self.steps):
                raise FailedError(f"of an undisturbed run ({mode}, {variant}) {problem}")
            for (other, its_variant), theirs in self._undisturbed.items():
                same = (MODES[other], its_variant) == (MODES[mode], variant)
                if same and (problem := difference(theirs.curve, points)):
                    raise FailedError(f"{mode} and {other} differ, undisturbed ({variant}): {problem}")
            self._undisturbed[mode, variant] = Undisturbed(run, points, seconds, self.steps, start_up_s, save_s)
        return self._undisturbed[mode, variant]
