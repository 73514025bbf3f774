"""What of `python launch/benchmark.py faults --part overhead` runs in a process of its own.

`loop` takes steps in turn through the trainer's loop and through nothing but the engine's forward, backward and step:
the same engine, the same batches. `save` writes and reads checkpoints of a model of some size.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench_faults.jobs import ROOT
from trainer import checkpoint, distributed
from trainer.batches import Batch, collate
from trainer.distributed import Launch
from trainer.job import read_job
from trainer.loop import Trainer
from trainer.preemption import Preemption
from trainer.watchdog import Watchdog

DEMO = ROOT / "launch" / "configs" / "demo_cpu.toml"
MODELS = {
    "demo": (),
    "150M": ("model.d_model=1024", "model.d_ff=4096", "model.n_layers=12", "model.n_heads=8"),
}
"""Models whose checkpoints are measured: the demo's, and one of 12 layers."""
SPECIAL = 2
"""Tokens of a vocabulary of integers that are no value: begin and end of a document."""


def write_store(folder: Path, rows: int, seq_len: int, vocab_size: int) -> Path:
    """A store of so many rows of random tokens."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).integers(vocab_size - SPECIAL, size=(rows, seq_len - 1))
    np.savez(folder / "tokens.npz", x=values.astype(np.int32))
    words = [sys.executable, "-m", "data_pipeline", "build", "--input", str(folder / "tokens.npz"), "--field", "x"]
    words += ["--tokenizer", "integers", "--vocab-size", str(vocab_size - SPECIAL), "--seq-len", str(seq_len)]
    words += ["--split", "val=0.2", "--workers", "1", "--output", str(folder / "store")]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "store"


@contextmanager
def trainer(folder: Path, seq_len: int, changes: tuple[str, ...]) -> Iterator[Trainer]:
    """The demo's run, changed, on rows of so many tokens: built and ready for its first step."""
    store_path = write_store(folder / "data", 16, seq_len, 1024)
    fixed = ("run.eval_every=0", "run.save_every=0", "run.steps=1000000", f"run.dir={folder / 'run'}")
    sizes = (f"model.max_seq_len={seq_len}", f"data.store={store_path}")
    launch = Launch("no launcher")
    job, _ = read_job(DEMO, (*fixed, *sizes, *changes), launch)
    plan = job.config.run
    with Preemption() as preemption, Watchdog(plan.dir, launch, plan.watchdog_factor, plan.watchdog_min_s) as watchdog:
        made = Trainer(job, distributed.start(*distributed.meet(launch)), preemption, watchdog)
        made.build()
        with made.loader, made.profiler:
            yield made
        distributed.stop()


def bare_step(engine: Any, batches: list[Batch], step: int) -> None:
    """A step as DeepSpeed's introduction has it: no count of tokens, no report, no look at what came of it."""
    for batch in batches:
        loss = engine(batch.tokens, batch.labels, segment_ids=batch.segment_ids, step=step, sample_ids=batch.sample_ids)
        engine.backward(loss)
        engine.step()


def loop(folder: Path, seq_len: int, pairs: int) -> dict[str, Any]:
    """Seconds of steps through the trainer's loop and of bare ones, in pairs that begin with either."""
    with trainer(folder, seq_len, ()) as made:
        times: dict[str, list[float]] = {"trainer": [], "bare": []}
        samples = [made.job.samples.slice_of(n, 0, 1) for n in range(made.batch_size)]
        batches = [collate([sample], [n], made.token_bytes, made.device) for n, sample in enumerate(samples)]
        step = 0
        for pair in range(pairs + 1):  # the first does not count
            for kind in ("trainer", "bare") if pair % 2 else ("bare", "trainer"):
                begun = time.perf_counter()
                if kind == "trainer":
                    made.asked_to_stop(step)
                    made.train_step(step)
                else:
                    bare_step(made.engine, batches, step)
                times[kind].append(time.perf_counter() - begun)
                step += 1
    counted = {kind: some[1:] for kind, some in times.items()}
    medians = {kind: statistics.median(some) for kind, some in counted.items()}
    ratios = [ours / bare for ours, bare in zip(counted["trainer"], counted["bare"], strict=True)]
    return {
        "trainer_s": medians["trainer"],
        "bare_s": medians["bare"],
        "overhead": medians["trainer"] / medians["bare"] - 1,
        "overhead_of_pairs": statistics.median(ratios) - 1,
        "overhead_s": medians["trainer"] - medians["bare"],
        "step_s": counted,
    }


def save(folder: Path, model: str, rounds: int) -> dict[str, Any]:
    """Seconds to write a checkpoint, to verify every byte of it, and to load it, after one step of 1,024 tokens."""
    with trainer(folder, 1024, MODELS[model]) as made:
        made.train_step(0)
        times: dict[str, list[float]] = {"save": [], "verify": [], "load": []}
        for step in range(1, rounds + 1):
            begun = time.perf_counter()
            saved = checkpoint.save(made.engine, made.plan, step, made.job.identity, {}, made.launch, made.device)
            times["save"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            assert not checkpoint.problems(saved.path)
            times["verify"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            checkpoint.load(made.engine, saved)
            times["load"].append(time.perf_counter() - begun)
        n_bytes = sum(path.stat().st_size for path in saved.path.iterdir())
        n_parameters = sum(parameter.numel() for parameter in made.engine.module.parameters())
    medians = {f"{what}_s": statistics.median(some) for what, some in times.items()}
    speeds = {f"{what}_mb_s": n_bytes / 1e6 / statistics.median(some) for what, some in times.items()}
    return {"n_parameters": n_parameters, "bytes": n_bytes, **medians, **speeds, "seconds": times}


WORKERS = ("loop", "save")


def main(worker: str, size: str, rounds: int) -> dict[str, Any]:
    """What one worker measured."""
    with tempfile.TemporaryDirectory(prefix="longhand-faults-") as name:
        torch.manual_seed(0)
        return save(Path(name), size, rounds) if worker == "save" else loop(Path(name), int(size), rounds)
