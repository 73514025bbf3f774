"""The story of a run: build, resume, step, log, evaluate, save.

Nothing that decides the next step lives in the loop. A step's samples, hash rotations, dropout and learning rate follow
from its number, so a run that stopped and continued equals one that did not.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial

import torch

from data_pipeline.loader import Loader
from trainer import checkpoint, distributed, memory
from trainer.agreement import refuse_different
from trainer.batches import Batch, collate, held_out_rows
from trainer.checkpoint import SaveError
from trainer.config import ConfigError
from trainer.deepspeed_settings import peak_lr
from trainer.distributed import all_gather, all_max, all_sum, raise_together, together
from trainer.engine import StepResult, backward, build_engine, forward, optimizer_step, set_learning_rate
from trainer.flops import training_flops
from trainer.gradients import gradients
from trainer.held_out_evaluation import Evaluator
from trainer.initial import agreed_weights
from trainer.job import Job
from trainer.metrics import Metrics
from trainer.peaks import mfu, peak_flops
from trainer.preemption import PREEMPTED, Preemption, stopping
from trainer.profiling import Profiler
from trainer.rank_faults import lost_ranks
from trainer.record import count_stop, write_record
from trainer.reporter import Reporter
from trainer.reports import Progress, Spent, Step, long_step_line, own_figures, step_values, summary
from trainer.resume import changes, differing
from trainer.run_tokenizer import keep_tokenizer
from trainer.schedule import due, lr_factor
from trainer.scoring import Score
from trainer.sequence_parallel import Place, timed
from trainer.state import local_square_sum, n_parameters, set_weights
from trainer.terminal import Reported, eval_lines
from trainer.timing import Stopwatch
from trainer.watchdog import Watchdog

MOST_STOPS = 4
"""Starts since a checkpoint that were asked to stop before their first step, from which on that is an error."""


def train(job: Job) -> int:
    """Run a job to its end, or to where it is asked to stop; the exit code."""
    plan = job.config.run
    with Preemption() as preemption:
        # Rank 0 comes when it has the folder to itself; until then the files there may be those of another run.
        launch, store = distributed.meet(job.launch)
        with Watchdog(plan.dir, launch, plan.watchdog_factor, plan.watchdog_min_s) as watchdog:
            device = distributed.start(launch, store)
            try:
                # A rank that fails must not wait for others, which may be waiting for it: what fails ends at once.
                code = Trainer(job, device, preemption, watchdog).run()
            except RuntimeError as error:
                if lost := lost_ranks(plan.dir, launch.world_size):
                    error.add_note(lost)
                raise
            if code == PREEMPTED:
                watchdog.outcome = "preempted"
            distributed.stop()
    return code


class Trainer:
    """A run in progress on one rank."""

    def __init__(self, job: Job, device: torch.device, preemption: Preemption, watchdog: Watchdog) -> None:
        self.job, self.device, self.preemption, self.watchdog = job, device, preemption, watchdog
        self.launch, self.plan = job.launch, job.config.run
        self.reporter = Reporter(self.plan, job.launch, device)
        self.reporter.say(distributed.describe(job.launch, device))
        refuse_different(self.plan.dir, job.identity, self.launch, device)
        self.start = checkpoint.sound_start(self.plan.dir, self.launch, device, self.reporter.say)
        self.first_step = self.start.step if self.start else 0
        saved = checkpoint.read_state(self.start.path) if self.start else {}
        self.progress = Progress.from_state(saved["progress"]) if saved else Progress()
        self.identity_before = saved.get("run", job.identity)
        self.scores: dict[str, Reported] = {}  # the newest, for the summary
        self.saved_step = self.first_step
        self.initial_sha256: str | None = None

    def run(self) -> int:
        """Every step to the last, and what comes between them."""
        if self.first_step >= self.plan.steps:
            self.reporter.say(
                f"nothing to do: {self.plan.dir} is at step {self.first_step}, run.steps={self.plan.steps}"
            )
            self.say_changes()
            return 0
        self.build()
        begun, done, code = time.perf_counter(), self.first_step, 0
        with self.reporter, self.loader, self.profiler:  # the loader reads ahead from here on
            self.begin()
            while done < self.plan.steps:
                if self.asked_to_stop(done):
                    code = PREEMPTED
                    break
                self.train_step(done)
                done += 1
                self.progress.train_s += time.perf_counter() - begun
                begun = time.perf_counter()
            self.progress.train_s += time.perf_counter() - begun  # of a checkpoint that a signal asked for
        self.end(done)
        return code

    def build(self) -> None:
        """The engine, brought to where the run was, and whoever serves it."""
        config, launch, device = self.job.config, self.launch, self.device
        self.engine = build_engine(config, self.job.deepspeed)
        if self.start:
            checkpoint.load(self.engine, self.start)
        elif self.plan.init_from:
            folder, seed = self.plan.init_from, self.plan.seed
            parameters, self.initial_sha256 = agreed_weights(folder, config.model, seed, launch, device)
            set_weights(self.engine, parameters)
            del parameters
        self.place = place = Place.of(launch.rank, launch.world_size, self.plan.sequence_parallel).joined()
        if place.n_parts > 1:
            self.reporter.say(f"{place.n_parts} ranks share each sequence")
        self.batch_size = self.engine.train_batch_size() // place.n_parts  # DeepSpeed counts each part as a sequence
        self.loader = Loader(
            self.job.samples,
            self.batch_size,
            self.engine.train_micro_batch_size_per_gpu(),
            place.replica,
            place.n_replicas,
            part=place.part,
            n_parts=place.n_parts,
            n_consumed=self.first_step * self.batch_size,
            on_damage=config.data.on_damage,
        )
        self.held_out = held_out_rows(self.job.stores, config)
        rows = {name: own.identity for name, own in self.held_out.items()}
        self.progress = self.progress.of(rows, self.plan.eval_n_hashes, self.first_step + 1)
        self.token_bytes = torch.from_numpy(self.job.store.token_bytes.astype("int64"))
        self.evaluator = Evaluator(self.engine, config, launch, place, device, self.token_bytes)
        self.before = replace(self.progress)
        self.stopwatch, self.spent, self.has_reported = Stopwatch(device), Spent(), False
        self.peak = peak_flops(distributed.device_name(device), self.job.precision)
        self.step_flops = training_flops(config.model, self.job.store.seq_len) * self.batch_size
        self.profiler = Profiler(self.plan.dir, self.plan.profile_steps, launch.rank)
        self.hosts = distributed.hosts()
        if launch.rank == 0:
            checkpoint.remove_leftovers(self.plan.dir)
        self.n_parameters = n_parameters(self.engine)
        self.reporter.open(self.first_step, self.record)

    def record(self, metrics: Metrics) -> None:
        """Put into the folder of the run what it is, on rank 0."""
        write_record(
            self.job,
            self.device,
            metrics,
            n_parameters=self.n_parameters,
            evaluated=self.progress.scored,
            changed=differing(self.identity_before, self.job.identity),
            initial_sha256=self.initial_sha256,
        )
        keep_tokenizer(self.plan.dir, self.job.store, self.reporter.say)

    def begin(self) -> None:
        """Say where the run starts from; of a new run, evaluate the weights as they are."""
        if self.start:
            self.reporter.say(f"continuing from {self.start.path}, after step {self.first_step}")
            self.say_changes()
            return
        weights = f"the weights of {self.plan.init_from}" if self.plan.init_from else "untrained weights"
        first = "; first these are evaluated" if self.held_out else ""
        self.reporter.say(f"starting anew in {self.plan.dir} with {weights}{first}")
        self.evaluate(done=0)

    def say_changes(self) -> None:
        """What is not as it was when the checkpoint was written."""
        for name, what in changes(self.identity_before, self.job.identity).items():
            self.reporter.say(f"note: {name} {what}")

    @contextmanager
    def phase(self, step: int, name: str) -> Iterator[None]:
        """Time a phase of a step, and tell the watchdog, which counts steps from 1, that it began."""
        self.watchdog.mark(step + 1, name)
        with self.stopwatch.phase(name):
            yield
        self.watchdog.mark(step + 1, "between")

    def train_step(self, step: int) -> None:
        """A step, and what is due after it; `step` counts those before it."""
        plan, done = self.plan, step + 1
        lr = peak_lr(self.job.deepspeed) * lr_factor(step, plan)
        set_learning_rate(self.engine, lr)
        with self.profiler.step(done):
            begun = time.perf_counter()
            score, result = self.step(step)
            seconds = time.perf_counter() - begun
        if done == self.profiler.last_step:
            self.watchdog.mark(done, "profile")
            self.reporter.write(lambda metrics: self.profiler.write())
        self.spent.add(self.batch_size, score.n_tokens, seconds)
        self.progress.n_tokens += score.n_tokens
        self.scores["last batch"] = Reported(done, score.loss, score.bits_per_byte)
        self.watch_health(done, score, result)
        self.reporter.step(done)
        if due(plan.log_every, done, plan.steps):
            self.log(done, score, lr, result.norm)
        if due(plan.eval_every, done, plan.steps):
            self.evaluate(done)
        if done == plan.steps or due(plan.save_every, done, plan.steps):
            self.save(done, needed=done == plan.steps)

    def step(self, step: int) -> tuple[Score, StepResult]:
        """One update of the weights; the score of its batch before it, and what became of it."""
        batches = together(partial(self.read, step), self.launch, self.device)
        # The mean is over the tokens of all ranks, so these are counted before the first backward pass.
        counts = [sum(batch.n_tokens for batch in batches), sum(batch.n_bytes for batch in batches)]
        n_tokens, n_bytes = all_sum(counts, self.device)
        nll = torch.zeros((), dtype=torch.float64, device=self.device)
        result = None
        begun = time.perf_counter()
        for batch in batches:
            with self.phase(step, "forward"):
                loss = forward(self.engine, batch, step)
            nll += loss.detach().double() * batch.n_tokens
            with self.phase(step, "backward"):
                backward(self.engine, loss, batch.n_tokens, n_tokens)
            is_first = step == self.first_step and batch is batches[0]
            if is_first and (line := long_step_line(time.perf_counter() - begun, len(batches))):
                self.reporter.say(line)
            if batch is batches[-1] and due(self.plan.histogram_every, step + 1):
                self.watchdog.mark(step + 1, "histograms")
                self.draw_gradients(step + 1)
            with self.phase(step, "optimizer"):
                result = optimizer_step(self.engine)
        assert result is not None, "DeepSpeed and shares() disagree on the number of micro-batches"
        return Score(all_sum([nll], self.device)[0], n_tokens, n_bytes), result

    def read(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the next step."""
        with self.phase(step, "data"):
            part = timed(self.place.sequence, self.stopwatch)
            return [collate(samples, ids, self.token_bytes, self.device, part) for ids, samples in next(self.loader)]

    def watch_health(self, done: int, score: Score, result: StepResult) -> None:
        """Report a step that changed nothing or a loss that jumped, and stop before good checkpoints are replaced."""
        if not score.n_tokens:  # every row was damaged and left out, or all padding: there is no loss to speak of
            return
        try:
            lines = self.progress.health.observe(done, score.loss, result.norm, result.skipped, self.plan)
        except ConfigError as error:
            raise_together(error, self.launch, self.device)
        for line in lines:
            self.reporter.say(line)

    def draw_gradients(self, done: int) -> None:
        """Histograms of the step's gradients before clipping; all ranks take part."""
        for name, gradient in gradients(self.engine):
            self.reporter.write(partial(Metrics.histogram, step=done, tag=f"gradients/{name}", tensor=gradient))

    def param_norm(self) -> float:
        """Of all weights."""
        return math.sqrt(all_sum([local_square_sum(self.engine)], self.device)[0])

    def log(self, done: int, score: Score, lr: float, norm: float) -> None:
        """Report a step, and the speed since the last report."""
        self.watchdog.mark(done, "log")
        own = own_figures(self.stopwatch.read(), memory.memory_gib(self.device), self.loader.n_skipped)
        everyone = [dict(zip(own, row, strict=True)) for row in all_gather(list(own.values()), self.device)]
        step = Step(score, lr, norm, self.param_norm())
        values, slowest = step_values(step, self.spent, self.progress, everyone, self.hosts)
        if (share := mfu(self.step_flops, values["speed/step_s"], self.launch.world_size, self.peak)) is not None:
            values["speed/mfu"] = share
        if self.job.config.data.on_damage == "skip":
            skipped = self.place.rows_of([each["data/skipped_rows"] for each in everyone])
            values["data/skipped_rows"] = self.before.skipped_rows + skipped
        self.reporter.write(partial(Metrics.write, step=done, values=values))
        self.reporter.step(done, values)
        if slowest.line and self.has_reported:  # a first step loads libraries, when each rank comes to it
            self.reporter.say(slowest.line)
        self.has_reported = True
        self.spent = Spent()

    def evaluate(self, done: int) -> None:
        """Report how well held-out rows are predicted after `done` steps."""
        if not self.held_out:
            return
        self.watchdog.mark(done, "evaluate")
        self.refuse_replaced_stores()
        found = self.evaluator.held_out(self.held_out)
        self.scores["held out"] = Reported(done, found.values["eval/loss"], found.values["eval/bits_per_byte"])

        def write(metrics: Metrics) -> None:
            from trainer.figures import figure_by_position  # half a second, which only rank 0 needs

            metrics.write(done, found.values)
            metrics.figure(done, "eval/loss_by_position", figure_by_position(found.by_position))
            if found.sample:
                metrics.text(done, "sample", found.sample)

        self.reporter.write(write)
        for line in eval_lines(done, self.plan.steps, found.values, self.held_out):
            self.reporter.say(line)

    def save(self, done: int, needed: bool) -> None:
        """Publish a checkpoint of the state after `done` steps: where losses are not finite, only if it is needed."""
        self.watchdog.mark(done, "save")
        self.refuse_replaced_stores()
        doubtful = self.progress.health.nonfinite_in_row > 0
        if doubtful and not needed:
            return
        if not math.isfinite(self.param_norm()):
            ruined = f"after step {done} not all weights are finite: no checkpoint is written, earlier ones are kept"
            if done == self.plan.steps:
                error = ConfigError(f"{ruined}. Lower the learning rate, or see when norms began to grow")
                raise_together(error, self.launch, self.device)
            self.reporter.say(ruined)
            return
        begun = time.perf_counter()
        skipped = self.place.rows_of([own for (own,) in all_gather([self.loader.n_skipped], self.device)])
        self.progress.skipped_rows = self.before.skipped_rows + skipped
        self.reporter.write(Metrics.sync)
        progress = self.progress.saved(done, self.scores.get("held out"))
        state = (self.engine, self.plan, done, self.job.identity, asdict(progress))
        try:
            # Weights that may be why losses are not finite must not take the place of those that are sound.
            saved = checkpoint.save(*state, self.launch, self.device, removes=not doubtful)
        except SaveError as error:
            if self.plan.on_full_disk == "stop" or done == self.plan.steps:
                given_up = ConfigError(f"{error}. The checkpoints before it are untouched")
                raise_together(given_up, self.launch, self.device)
            self.reporter.say(f"{error}; going on without it (run.on_full_disk='continue')")
            return
        self.progress = progress
        self.progress.last_save_s = time.perf_counter() - begun
        self.progress.save_s += self.progress.last_save_s
        self.saved_step = done
        self.reporter.say(f"saved {saved.path} in {self.progress.last_save_s:.1f} s")

    def refuse_replaced_stores(self) -> None:
        """Stop where the rows of late may be another store's, before anything is said or saved that comes of them."""

        def look() -> None:
            for store in self.job.stores.values() if self.launch.rank == 0 else ():
                store.refuse_replaced()

        together(look, self.launch, self.device)

    def asked_to_stop(self, done: int) -> bool:
        """Whether any rank was, in which case the state is saved; all ranks come to the same answer."""
        number = int(all_max(self.preemption.signal, self.device))
        if number:
            self.preemption.signal = number
            self.reporter.say(stopping(number, done, self.first_step))
            if done > self.saved_step:
                self.save(done, needed=True)
            if done == self.first_step:
                together(self.refuse_to_starve, self.launch, self.device)
            self.reporter.say(checkpoint.way_on(self.plan.dir))
        return bool(number)

    def refuse_to_starve(self) -> None:
        """Raise ConfigError, on rank 0, where start after start made no step: a job would be requeued for ever."""
        if self.launch.rank == 0 and (n_stops := count_stop(self.plan.dir)) >= MOST_STOPS:
            raise ConfigError(
                f"{n_stops} starts in {self.plan.dir} since its last checkpoint were asked to stop before their first "
                "step: give the job more time (in SLURM, a --time far above --signal)"
            )

    def end(self, done: int) -> None:
        """Close the reports, with a summary."""
        self.reporter.write(partial(Metrics.close, finished=done == self.plan.steps))
        of_start = summary(self.plan, self.first_step, done, self.before, self.progress, self.scores)
        self.reporter.close(of_start.text())
