"""What rank 0 prints: a dense line for each step that is logged, a bar below them, and a summary at the end.

The bar is only there when standard output is a terminal. In a file, a pipe or SLURM's log there are the same lines and
nothing else, so that they can be searched, and followed with `tail -f`. A line that cannot be written, since the disk
with the log is full or the reader of a pipe is gone, is lost, and costs the run nothing.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Self

from tqdm import tqdm

from data_pipeline.output import counted

BAR = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left"


class Terminal:
    """Standard output of a run. A context manager, so that an error finds the bar gone."""

    def __init__(self, steps: int, done: int) -> None:
        """steps: of the whole run; done: of them, those before this start."""
        self._steps = steps
        self._bar: tqdm | None = None
        if sys.stdout.isatty():
            self._bar = _Bar(
                total=steps, initial=done, file=sys.stdout, dynamic_ncols=True, leave=False, bar_format=BAR
            )

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        if self._bar is None:
            show(text)
        else:
            with _ignoring_lost_output():
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()

    def step(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """After `done` steps: move the bar, and print the step's line if there are values (those of metrics.py)."""
        if self._bar is not None:
            with _ignoring_lost_output():
                self._bar.update(done - self._bar.n)
        if values is not None:
            self.line(train_line(done, self._steps, values))

    def close(self, summary: str | None = None) -> None:
        """Take the bar away, and print a summary if there is one. May be called again."""
        if self._bar is not None:
            with _ignoring_lost_output():
                self._bar.close()
            self._bar = None
        if summary is not None:
            show(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def show(text: str, error: bool = False) -> None:
    """Print a line, on standard error if it says what went wrong."""
    with _ignoring_lost_output(error):
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


@contextmanager
def _ignoring_lost_output(error: bool = False) -> Iterator[None]:
    """Discard what standard output, or error, cannot take (a full disk, a closed pipe).

    Python would try it again with the next line, and at its exit, whose code is 120 then, whatever the run's is.
    """
    try:
        yield
    except OSError:
        stream = sys.stderr if error else sys.stdout
        own = stream.fileno()
        kept = os.dup(own)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), own)
        stream.flush()
        os.dup2(kept, own)
        os.close(kept)


class _Bar(tqdm):
    monitor_interval = 0
    """No thread that looks after bars which are rarely updated: ours are updated after every step."""


def train_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """One dense line on a step."""
    left = duration((steps - step) * values["speed/step_s"])
    utilisation = f"{values['speed/mfu']:.1%} MFU  " if "speed/mfu" in values else ""
    skipped = f"{values['train/skipped_steps']:.0f} skipped  " if values.get("train/skipped_steps") else ""
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {values['train/loss']:.4f}  "
        f"bits/byte {values['train/bits_per_byte']:.4f}  lr {values['train/lr']:.2e}  "
        f"grad {values['train/grad_norm']:.3g}  {skipped}{values['speed/tokens_per_s']:,.0f} tokens/s  "
        f"{utilisation}{values['memory/peak_gib']:.2f} GiB  {left} left"
    )


def eval_lines(step: int, steps: int, values: Mapping[str, float], held_out: Mapping[str, Sized]) -> list[str]:
    """A line on an evaluation, of the rows of data.store (""), and one on those of each of the mixture's stores."""
    gain = f"without LSH {values['eval/lsh_gain']:+.4f}  " if "eval/lsh_gain" in values else ""
    scored = {"eval": f"{gain}on {len(held_out[''])} held-out rows"}
    scored |= {f"eval/source/{name}": f"on {len(of)} held-out rows of {name}" for name, of in held_out.items() if name}
    return [
        f"eval {step:>{len(str(steps))}}/{steps}  loss {values[f'{of}/loss']:.4f}  "
        f"bits/byte {values[f'{of}/bits_per_byte']:.4f}  {on}"
        for of, on in scored.items()
    ]


@dataclass(frozen=True)
class Reported:
    """How well something was predicted, and when: what is newest at the end of a run need not be of its last step."""

    step: int
    """Optimizer steps done."""
    loss: float
    """Nats per token."""
    bits_per_byte: float

    def __str__(self) -> str:
        return f"{self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte"


@dataclass(frozen=True)
class Summary:
    """What there is to say when a run ends, or stops on the way."""

    run_dir: Path
    steps: int
    """Of the whole run."""
    first_step: int
    """Steps that had been done before this start."""
    done: int
    """Steps that are done now."""
    n_tokens: float
    """Tokens to predict in the steps of this start."""
    seconds: float
    """Since the first of these steps, with evaluations and checkpoints."""
    save_s: float
    """Those of the seconds that checkpoints took."""
    skipped_steps: int
    """Of the whole run, and so the spikes of the loss."""
    spikes: int
    scores: Mapping[str, Reported]
    """The newest of this start: of the "last batch", whether or not its step has a line, and of what is "held out"."""

    def text(self) -> str:
        state = "finished" if self.done >= self.steps else "stopped"
        before = f" ({self.first_step} of them before this start)" if self.first_step else ""
        speed = self.n_tokens / self.seconds if self.seconds else 0.0
        scores = "   ".join(
            f"{name}, step {self.scores[name].step}: {self.scores[name]}"
            for name in ("last batch", "held out")
            if name in self.scores
        )
        lines = [
            f"{state}: {self.done} of {self.steps} steps{before}, {self.n_tokens:,.0f} tokens in "
            f"{duration(self.seconds)}, {speed:,.0f} tokens/s with evaluations and checkpoints",
            *([scores] if scores else []),
            f"checkpoints took {self.save_s / self.seconds if self.seconds else 0.0:.1%} of the time; "
            f"{counted(self.skipped_steps, 'step')} skipped, {counted(self.spikes, 'spike')} of the loss",
            f"the run lies in {self.run_dir}; how it went: python launch/report.py {quote(str(self.run_dir))}",
            f"see its curves: {see_curves(self.run_dir)}",
        ]
        return "\n".join(lines)


def see_curves(run_dir: Path) -> str:
    """The command that shows a run's curves."""
    return f"{Path(sys.executable).parent / 'tensorboard'} --logdir {quote(str(run_dir / 'tensorboard'))}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"


def show_model_messages() -> None:
    """Print what the model logs: which path its attention takes, and why."""
    logger = logging.getLogger("reformer")
    logger.handlers = [logging.StreamHandler(sys.stdout)]
    logger.setLevel(logging.INFO)
