"""The story of a run: build, resume, step, log, evaluate, save.

What is special: nothing that decides the next step lives in the loop. A step's samples, hash rotations, dropout and
learning rate follow from its number, so a run that stopped and continued equals one that did not.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import deepspeed
import torch

from data_pipeline.dataset import RowDataset, Samples
from data_pipeline.loader import Loader
from data_pipeline.store import Store
from trainer import checkpoint, distributed
from trainer.batches import Batch, collate
from trainer.check import StoreFacts
from trainer.checkpoint import Checkpoint
from trainer.config import ConfigError, RunConfig
from trainer.diagnostics import diagnosed
from trainer.distributed import Launch, all_max, all_sum, together
from trainer.engine import backward, build_engine, forward, optimizer_step
from trainer.evaluate import Score, evaluate
from trainer.metrics import Metrics, environment, eval_line, peak_gib, train_line


@dataclass(frozen=True)
class Job:
    """A run whose parts have been checked against each other."""

    config: RunConfig
    deepspeed: Mapping[str, Any]
    store: Store
    """data.store, which evaluations read."""
    samples: Samples
    """What to train on, and in which order."""
    launch: Launch
    identity: Mapping[str, Any]
    """What its checkpoints say about it: see checkpoint.identity."""
    resume: bool
    """Whether a checkpoint is to be continued, if there is one."""
    start: Checkpoint | None
    """That checkpoint; None for the beginning."""


def train(job: Job) -> None:
    """Run a job to its end."""
    if job.start and job.start.step >= job.config.run.steps:
        if job.launch.rank == 0:
            print(f"nothing to do: {job.start.path} is at step {job.start.step}, run.steps={job.config.run.steps}")
        return
    device = distributed.start(job.launch)
    # Without a handler for errors: a rank that fails must not wait for others, which may be waiting for it.
    Trainer(job, device).run()
    distributed.stop()


class Trainer:
    """A run in progress on one rank."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.launch, self.plan = job.launch, job.config.run
        self.leads = job.launch.rank == 0
        self.say(distributed.describe(job.launch, device))
        if self.leads:
            _show_model_messages()
        data = job.config.data
        self.eval_rows = RowDataset(job.store, data.eval_split) if self.plan.eval_every else None
        self.token_bytes = torch.from_numpy(job.store.token_bytes.astype("int64"))
        self.engine = build_engine(job.config, job.deepspeed)
        self.first_step = job.start.step if job.start else 0
        batch_size = self.engine.train_batch_size()
        self.loader = Loader(
            job.samples,
            batch_size,
            self.engine.train_micro_batch_size_per_gpu(),
            job.launch.rank,
            job.launch.world_size,
            n_consumed=self.first_step * batch_size,
            on_damage=data.on_damage,
        )
        self.spent = Spent()
        if job.start:
            checkpoint.load(self.engine, job.start)
        if self.leads:
            checkpoint.remove_leftovers(self.plan.dir)
            self.metrics = Metrics(self.plan.dir, self.first_step)
            write_record(job, device, sum(parameter_sizes(self.engine)))

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.leads:
            print(line, flush=True)

    def run(self) -> None:
        """Every step to the last, and what comes between them."""
        with self.loader:  # reads ahead from here on
            self.begin()
            for step in range(self.first_step, self.plan.steps):
                self.train_step(step)
        if self.leads:
            self.metrics.close()

    def begin(self) -> None:
        """Say from where, and how good the weights are that nothing has been learnt by."""
        if self.job.start:
            self.say(f"continuing from {self.job.start.path}, after step {self.first_step}")
            return
        nothing = "no checkpoint to continue from: " if self.job.resume else ""
        self.say(f"{nothing}starting anew in {self.plan.dir}")
        if note := checkpoint.nvme_note(self.job.deepspeed):
            self.say(note)
        self.evaluate(done=0)

    def train_step(self, step: int) -> None:
        """A step, and what is due after it."""
        plan, done = self.plan, step + 1
        begun = time.perf_counter()
        lr = self.engine.get_lr()[0]
        score, norm = self.step(step)
        self.spent.add(score.n_tokens, time.perf_counter() - begun)
        together(partial(self.refuse_divergence, done, score, norm), self.launch, self.device)
        if due(plan.log_every, done, plan.steps):
            self.log(done, score, lr, norm)
            self.spent = Spent()
        if due(plan.eval_every, done, plan.steps):
            self.evaluate(done)
        if due(plan.save_every, done, plan.steps) or done == plan.steps:
            self.save(done)

    def step(self, step: int) -> tuple[Score, float]:
        """One update of the weights; the score of its batch before it, and the gradient's norm."""
        batches = together(self.read, self.launch, self.device)
        # The mean is over the tokens of all ranks, so these are counted before the first backward pass.
        counts = [sum(batch.n_tokens for batch in batches), sum(batch.n_bytes for batch in batches)]
        n_tokens, n_bytes = all_sum(counts, self.device)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        norm = None
        for batch in batches:
            loss = forward(self.engine, batch, step)
            nll += loss.detach().double() * batch.n_tokens
            backward(self.engine, loss, batch.n_tokens, n_tokens)
            norm = optimizer_step(self.engine)
        assert norm is not None, "DeepSpeed and shares() disagree on the number of micro-batches"
        return Score(all_sum([nll], self.device)[0], n_tokens, n_bytes), norm

    def read(self) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        begun = time.perf_counter()
        batches = [collate(samples, ids, self.token_bytes, self.device) for ids, samples in next(self.loader)]
        self.spent.on_data_s += time.perf_counter() - begun
        return batches

    def refuse_divergence(self, done: int, score: Score, norm: float) -> None:
        """Stop before weights that are no numbers take the place of good checkpoints."""
        if math.isfinite(score.nll) and math.isfinite(norm):
            return
        saved = checkpoint.published(self.plan.dir)
        raise ConfigError(
            f"step {done} has a loss of {score.loss} and a gradient norm of {norm}: training diverged. Lower "
            "deepspeed.optimizer.params.lr, warm up for longer (run.warmup_steps) or clip the gradient "
            f"(deepspeed.gradient_clipping). The newest checkpoint: {saved[-1].path if saved else 'none yet'}"
        )

    def log(self, done: int, score: Score, lr: float, norm: float) -> None:
        """Report a step."""
        spent = self.spent
        values = {
            "train/loss": score.loss,
            "train/bits_per_byte": score.bits_per_byte,
            "train/lr": lr,
            "train/grad_norm": norm,
            "speed/tokens_per_s": spent.n_tokens / spent.seconds,
            "speed/step_s": spent.seconds / spent.steps,
            "speed/data_stall": all_max(spent.on_data_s, self.device) / spent.seconds,
            "memory/peak_gib": all_max(peak_gib(self.device), self.device),
        }
        if self.job.config.data.on_damage == "skip":
            values["data/skipped_rows"] = all_sum([self.loader.n_skipped], self.device)[0]
        if self.leads:
            self.metrics.write(done, values)
        self.say(train_line(done, self.plan.steps, values))

    def evaluate(self, done: int) -> None:
        """Report the held-out loss after `done` steps."""
        if self.eval_rows is None:
            return
        n_rows = min(self.plan.eval_rows, len(self.eval_rows))
        watch: AbstractContextManager[dict[str, float]] = nullcontext({})
        if self.plan.diagnostics:
            watch = diagnosed(self.engine, self.eval_rows, self.launch, self.device)
        with watch as diagnostics:
            score = evaluate(
                self.engine,
                self.eval_rows,
                n_rows,
                self.token_bytes,
                self.launch,
                self.device,
                self.plan.eval_n_hashes,
            )
        values = {"eval/loss": score.loss, "eval/bits_per_byte": score.bits_per_byte, **diagnostics}
        if self.leads:
            self.metrics.write(done, values)
        self.say(eval_line(done, self.plan.steps, values, n_rows))

    def save(self, done: int) -> None:
        """Publish a checkpoint of the state after `done` steps."""
        path = checkpoint.save(
            self.engine, self.plan.dir, done, self.job.identity, self.plan.keep_last, self.launch, self.device
        )
        self.say(f"saved {path}")


def _show_model_messages() -> None:
    """Print what the model logs: which path its attention takes, and why."""
    logger = logging.getLogger("reformer")
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.setLevel(logging.INFO)


@dataclass
class Spent:
    """Time and tokens since the last report."""

    steps: int = 0
    n_tokens: float = 0.0
    seconds: float = 0.0
    on_data_s: float = 0.0
    """Those of the seconds in which this rank waited for its rows and made batches of them."""

    def add(self, n_tokens: float, seconds: float) -> None:
        self.steps += 1
        self.n_tokens += n_tokens
        self.seconds += seconds


def due(every: int, done: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now; never if `every` is 0."""
    return every > 0 and (done % every == 0 or done == steps)


def parameter_sizes(engine: deepspeed.DeepSpeedEngine) -> list[int]:
    """Elements of each parameter; under ZeRO-3 the tensors themselves are empty between uses."""
    return [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters()]


def write_record(job: Job, device: torch.device, n_parameters: int) -> None:
    """RUN/run.json; its fields are described in metrics.py."""
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from_step": job.start.step if job.start else None,
        "config": job.config.model_dump(mode="json"),
        "deepspeed": job.deepspeed,
        "store": {"fingerprint": job.store.manifest.fingerprint, **asdict(StoreFacts.of(job.store))},
        "samples": dict(job.samples.identity),
        "launch": {
            "launcher": job.launch.launcher,
            "world_size": job.launch.world_size,
            "local_world_size": job.launch.local_world_size,
            "device": distributed.device_name(device),
        },
        "n_parameters": n_parameters,
        **environment(),
    }
    (job.config.run.dir / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
