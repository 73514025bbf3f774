"""What a run says while it is going on: lines on standard output, and the curves of metrics.py. Rank 0 says it for all.

All ranks have a Reporter and call it alike. Where the disk does not take what is reported, all of them stop, or go on
without, as run.on_full_disk says.
"""

from collections.abc import Callable, Mapping
from typing import Self

import torch

from trainer.checkpoint import way_on
from trainer.config import ConfigError, LoopConfig
from trainer.distributed import Launch, together
from trainer.metrics import Metrics
from trainer.terminal import Terminal, show, show_model_messages


class Reporter:
    """Prints at once; writes once it is open. A context manager, so that an error finds the terminal's bar gone."""

    def __init__(self, plan: LoopConfig, launch: Launch, device: torch.device) -> None:
        self.plan, self.launch, self.device = plan, launch, device
        self.leads = launch.rank == 0
        self._terminal: Terminal | None = None
        self._metrics: Metrics | None = None
        if self.leads:
            show_model_messages()

    def open(self, first_step: int, record: Callable[[Metrics], None]) -> None:
        """Begin the files and the bar of a start after `first_step` steps, with what `record` writes.

        Raises ConfigError, on one rank while the others end, where that cannot be written.
        """

        def begin() -> None:
            if not self.leads:
                return
            try:
                self._metrics = Metrics(self.plan.dir, first_step)
                if self._metrics.kept:
                    self.say(f"note: there was a run without a checkpoint; its curves are in {self._metrics.kept}")
                record(self._metrics)
            except OSError as error:
                raise self._unwritten(error) from None
            self._terminal = Terminal(self.plan.steps, first_step)

        together(begin, self.launch, self.device)

    def say(self, line: str) -> None:
        """Print a line, once for all ranks."""
        if self.leads and self._terminal:
            self._terminal.line(line)
        elif self.leads:
            show(line)

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Move the bar to `done` steps, and print the step's line if there are values (those of metrics.py)."""
        if self._terminal:
            self._terminal.step(done, values)

    def write(self, what: Callable[[Metrics], None]) -> None:
        """Have rank 0 write to the files."""

        def attempt() -> None:
            try:
                if self._metrics:
                    what(self._metrics)
            except OSError as error:
                unwritten = self._unwritten(error)
                if self.plan.on_full_disk == "stop":
                    raise unwritten from None
                self.say(f"{unwritten}. Going on without (run.on_full_disk='continue')")

        together(attempt, self.launch, self.device)

    def _unwritten(self, error: OSError) -> ConfigError:
        why = error.strerror or error
        return ConfigError(f"cannot write the reports in {self.plan.dir}: {why}: make room; {way_on(self.plan.dir)}")

    def close(self, summary: str) -> None:
        """Take the bar away, and print a summary."""
        if self._terminal:
            self._terminal.close(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._terminal.close()
