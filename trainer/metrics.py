"""What a run reports: TensorBoard events, and the same numbers as lines of JSON.

Nothing of a step that was reported is lost when the process is killed, and after a resume, what was reported beyond the
checkpoint is taken back, so every curve is continuous. All scalars of a report are one record of the event file and one
line of the other, handed to the system before `write` returns. A new start takes the lines behind its checkpoint out of
metrics.jsonl, and tells TensorBoard to forget those steps. A run that is stopped between two reports (run.log_every)
writes no line for its last step, so that its curve equals an undisturbed run's; its summary has that step's loss.

RUN/metrics.jsonl: one JSON object a line. `step` is the number of optimizer steps done; the other keys are the tags
of TensorBoard, floats in full precision, null for what is no finite number:

    train/loss, train/bits_per_byte     of that step's global batch: nats per token, bits per byte of its text
    train/bits_per_token                the same loss in bits
    train/perplexity                    exp of it
    train/lr, train/grad_norm           of that step; the norm is that before clipping
    train/param_norm                    of all weights after that step
    train/skipped_steps, train/spikes   of the run so far: steps that were not finite and changed nothing; losses that
                                        jumped (health.py)
    speed/tokens_per_s, speed/step_s    since the line before, without evaluation and checkpoints; tokens to predict
    speed/sequences_per_s               likewise
    speed/data_s, speed/forward_s,      seconds of a step by phase (timing.py), of the rank on which that took the
    speed/backward_s, speed/optimizer_s longest
    speed/exchange_s                    likewise, within forward and backward: what ranks that share sequences exchange
                                        or wait for each other; only where there are such
    speed/data_stall                    share of step_s that the slowest rank spent on its data: waiting for rows that
                                        are read in the background, and making batches of them
    speed/save_s, speed/save_share      seconds of the newest checkpoint; share of the run that all of them took
    speed/mfu                           share of the devices' peak that the model's mathematics needs (flops.py,
                                        peaks.py); only where the peak is known
    speed/slowest_rank                  the rank that was busy for the longest since the line before, and how many
    speed/slowest_over_median           times longer than the median (rank_faults.py)
    memory/allocated_gib                now: device memory on GPUs, resident on CPUs; this and the next two are the
                                        largest of all ranks
    memory/peak_gib                     the most of it so far
    memory/host_gib                     resident on the host now
    data/skipped_rows                   with data.on_damage="skip": damaged rows of the run so far, on all ranks
    eval/loss, eval/bits_per_byte, …    on a line of their own, from step 0 on; all of them are in
                                        held_out_evaluation.py
    lsh/layer01/…                       on the same line, of the first held-out row, each LSH layer; from layer 0 on
      largest_bucket_over_mean          tokens in the largest bucket of any round and head; 1 where all are even
      empty_buckets                     share of the buckets that are empty
      recovered_mass                    share of dense attention that LSH attention reaches, mean of sampled queries
    reversible/reconstruction_error     how far the backward's inputs of the stack are from the forward's: max / rms

TensorBoard alone has texts (sample: a held-out text and how the model continues it; run/…: record.py), the figure
eval/loss_by_position, and every run.histogram_every steps gradients/NAME: a histogram of each parameter's gradient.
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard import summary as summaries

from trainer.run_files import BEFORE, METRICS, RECORD, TENSORBOARD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENT_FILES = "events.out.tfevents.*"
_LINE = re.compile(rb'\{"step": (\d+)(?:, .*)?\}\n')
"""Parsing the JSON of a line takes twelve times as long (measured), and a run of weeks has a million of them."""


class Metrics:
    """The reports of rank 0. All methods raise OSError when the disk does not take what they write."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Continue the reports of a run after `step` steps, those of its checkpoint; 0 begins them anew."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.kept = None if step else keep_former(run_dir)
        """Where the reports of a run are that was here before, if this one begins anew."""
        self.first_step = step + 1 if step else 0
        """The first that may be reported; anything reported from it on is forgotten."""
        self._path = run_dir / METRICS
        _keep_before(self._path, self.first_step)
        self._folder = run_dir / TENSORBOARD
        if not step:
            for file in self._folder.glob(EVENT_FILES):
                os.truncate(file, 0)  # not removed: a TensorBoard that is looking on would stay at it for ever
        self._open(self.first_step)

    def _open(self, purge_step: int | None = None) -> None:
        """Begin an event file; it may say: forget what was reported from `purge_step` on."""
        _put_in_the_past(sorted(self._folder.glob(EVENT_FILES)))
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        self._events: FileWriter = self._writer.file_writer  # type: ignore[assignment]  # set by the constructor
        self._events.flush()
        self._torn = False

    @contextmanager
    def _record(self) -> Iterator[None]:
        """Around what is added to the event file; all of it is with the system afterwards.

        A file that a full disk cut short cannot be read beyond that, so what comes after goes into another.
        """
        if self._torn:
            self._open()
        try:
            yield
            self._events.flush()
        except OSError:
            self._torn = True
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Report values of one step, by tag."""
        scalars = (summaries.scalar(tag, value).value for tag, value in values.items())
        with self._record():
            self._events.add_summary(Summary(value=[value for some in scalars for value in some]), step)
        numbers = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        _append(self._path, json.dumps({"step": step, **numbers}) + "\n")

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Show a text in TensorBoard."""
        with self._record():
            self._writer.add_text(tag, markdown, step)

    def figure(self, step: int, tag: str, figure: "Figure") -> None:
        """Show a matplotlib figure in TensorBoard as a picture."""
        with self._record():
            self._writer.add_figure(tag, figure, step)

    def histogram(self, step: int, tag: str, tensor: torch.Tensor) -> None:
        """Show how the finite elements of a tensor are distributed; any shape, any floating dtype, any device."""
        finite = tensor.detach()[tensor.isfinite()].float()
        if finite.numel():
            with self._record():
                self._writer.add_histogram(tag, finite, step)

    def hparams(self, hparams: Mapping[str, Any]) -> None:
        """Make the run a row of TensorBoard's table HPARAMS; of a run that is continued, it is one already.

        The table shows the newest values of all scalars, so it is right while the run goes on and at its end.
        """
        if self.first_step:
            return
        plain = {name: _plain(value) for name, value in hparams.items() if value is not None}
        # Without the record of an experiment, which cannot know what its runs differ in: TensorBoard finds that out,
        # and shows those columns first.
        _, begin, _ = summaries.hparams(plain, {})
        with self._record():
            self._events.add_summary(begin)

    def sync(self) -> None:
        """Wait until the disk itself has what was written: before a checkpoint says that these steps are done."""
        for path in (self._path, *self._folder.glob(EVENT_FILES)):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def close(self, finished: bool = False) -> None:
        """finished: the run has done all its steps, which the table HPARAMS then shows as a success."""
        if finished:
            with self._record():
                self._events.add_summary(summaries.hparams({}, {})[2])
        self._writer.close()


def keep_former(run_dir: Path) -> Path | None:
    """Move what a run has reported, of which there is no checkpoint, to RUN/before/0001 or the next number.

    Its checkpoints may have been removed to make room, and its curves are all that is left of it. Beside metrics.jsonl
    lie copies of run.json and of TensorBoard's files, as far as there is room. Returns the folder; None where no step
    was reported.
    """
    path = run_dir / METRICS
    if not path.exists():
        return None
    with path.open("rb") as lines:
        if not any(map(_step_of, lines)):
            return None
    taken = (int(each.name) for each in (run_dir / BEFORE).glob("*") if each.name.isdecimal())
    kept = run_dir / BEFORE / f"{1 + max(taken, default=0):04d}"
    (kept / TENSORBOARD).mkdir(parents=True)
    for file in (run_dir / RECORD, *(run_dir / TENSORBOARD).glob(EVENT_FILES)):
        copy = kept / file.relative_to(run_dir)
        try:
            shutil.copy2(file, copy)
        except OSError:  # the disk is full, or there is no such file; all numbers are in metrics.jsonl
            copy.unlink(missing_ok=True)
    path.rename(kept / METRICS)  # which takes no room, and nothing is lost by a kill before it
    return kept


def _put_in_the_past(files: list[Path]) -> None:
    """Rename event files, in order, whose seconds are not before now: TensorBoard reads files in the order of names.

    A restart within the second, or on a host whose clock is behind, would come before what it continues. (A TensorBoard
    that is looking on then has to be started again.)
    """
    now = int(time.time())
    for i, file in enumerate(files):
        *kind, seconds, rest = file.name.split(".", 4)
        latest = now - (len(files) - i)
        if int(seconds) > latest:
            file.rename(file.with_name(".".join([*kind, f"{latest:010d}", rest])))


def _append(path: Path, text: str) -> None:
    """All of it or, on a full disk, nothing, so that the lines that follow are whole."""
    left = text.encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while left:
                left = left[file.write(left) or 0 :]
        except OSError:
            file.truncate(before)
            raise


def _keep_before(path: Path, step: int) -> None:
    """Drop the lines from `step` on; a line that a crash cut short goes with them."""
    if not path.exists():
        return
    shorter = path.with_suffix(".partial")
    with path.open("rb") as lines, shorter.open("wb") as kept:
        kept.writelines(line for line in lines if (step_of := _step_of(line)) is not None and step_of < step)
        kept.flush()
        os.fsync(kept.fileno())  # a power cut must not leave the new name with nothing behind it
    shorter.replace(path)


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None if it is not whole."""
    found = _LINE.fullmatch(line)
    return int(found[1]) if found else None


def _plain(value: Any) -> str | float | bool:
    """A value as the table HPARAMS can show it."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value)
