"""The health of a run that is going on: steps that are not finite, and losses that jump.

It follows from numbers that all ranks share, so all of them come to the same decision without asking each other; and
what is remembered is a few plain numbers that a checkpoint keeps, so a run that was interrupted reports, counts and
stops as one that was not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Self

from trainer import checkpoint
from trainer.config import ConfigError, LoopConfig

WINDOW = 100
"""Finite losses that a new one is compared with, at most."""
MIN_WINDOW = 20
"""And at least: the first losses of a run say nothing about the next."""
MIN_DEVIATION = 1e-3
"""The least that the standard deviation counts for, as a part of the mean: a loss that stood still may move again."""


class Diverged(ConfigError):
    """Too many steps in a row whose loss or gradient norm is not finite."""


@dataclass
class Health:
    """What is remembered of the steps so far. All of it goes through JSON and back unchanged."""

    recent_losses: list[float] = field(default_factory=list)
    """The last finite losses in nats, oldest first, WINDOW at most; spikes among them."""
    skipped_steps: int = 0
    """Steps that changed nothing because their loss or gradient norm was not finite."""
    nonfinite_in_row: int = 0
    """Those of them that followed each other up to now."""
    spikes: int = 0
    """Losses far above those before them."""

    def observe(self, step: int, loss: float, norm: float, skipped: bool, plan: LoopConfig) -> list[str]:
        """Take note of a step and return what there is to say about it, in lines.

        step: its number, from 1; loss: of the global batch, in nats; norm: of the gradient; skipped: whether it changed
        nothing. Raises Diverged after plan.max_nonfinite in a row that are not finite.
        """
        if skipped or not (math.isfinite(loss) and math.isfinite(norm)):
            return self._nonfinite(step, loss, norm, plan)
        self.nonfinite_in_row = 0
        lines = self._spike(step, loss, plan.spike_deviations)
        self.recent_losses = [*self.recent_losses, loss][-WINDOW:]
        return lines

    def _nonfinite(self, step: int, loss: float, norm: float, plan: LoopConfig) -> list[str]:
        self.skipped_steps += 1
        self.nonfinite_in_row += 1
        what = f"step {step} has a loss of {loss:.4g} and a gradient norm of {norm:.4g}"
        if self.nonfinite_in_row >= plan.max_nonfinite:
            raise Diverged(
                f"{what}, {_in_row(self.nonfinite_in_row)}: training diverged. "
                f"{_ways_out(step - self.nonfinite_in_row, plan)}"
            )
        if not _worth_saying(self.skipped_steps):
            return []
        mean = f"; the last finite losses have a mean of {fmean(self.recent_losses):.4f}" if self.recent_losses else ""
        return [
            f"{what}: it changes nothing. {_in_row(self.nonfinite_in_row)}, {plan.max_nonfinite} stop the run; "
            f"{self.skipped_steps} skipped in all{mean}"
        ]

    def _spike(self, step: int, loss: float, deviations: float) -> list[str]:
        recent = self.recent_losses
        if not deviations or len(recent) < MIN_WINDOW:
            return []
        mean = fmean(recent)
        # The distance by math.dist does not overflow, whatever the losses.
        deviation = math.dist(recent, [mean] * len(recent)) / math.sqrt(len(recent))
        deviation = max(deviation, MIN_DEVIATION * abs(mean))
        if loss <= mean + deviations * deviation:
            return []
        self.spikes += 1
        if not _worth_saying(self.spikes):
            return []
        above = f"{(loss - mean) / deviation:.1f} standard deviations above" if deviation else "above"
        return [
            f"step {step} has a loss of {loss:.4f}, a spike: {above} {mean:.4f}, the mean of the last {len(recent)}; "
            f"{self.spikes} in all"
        ]

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What dataclasses.asdict() made of it, before or after JSON."""
        return cls(**{**state, "recent_losses": list(state["recent_losses"])})


def _worth_saying(count: int) -> bool:
    """1 to 10, 20, 30 … 100, 200 …: a fault that comes back for days does not fill the log."""
    return count % 10 ** (len(str(count)) - 1) == 0


def _in_row(count: int) -> str:
    return "the first in a row" if count == 1 else f"{count} in a row"


def _ways_out(last_finite: int, plan: LoopConfig) -> str:
    """last_finite: the last step whose loss was finite, which tells that the weights of the step before were sound."""
    saved = checkpoint.published(plan.dir)
    good = [each.path for each in saved if each.step < last_finite]
    doubtful = ", ".join(each.path.name for each in saved[len(good) :])
    doubts = f". In doubt, and to be removed before the same command goes on: {doubtful}" if doubtful else ""
    return (
        "Lower deepspeed.optimizer.params.lr, warm up for longer (run.warmup_steps) or clip the gradient "
        "(deepspeed.gradient_clipping). The newest checkpoint that is known to be good, since the loss of the step "
        f"after it was finite: {good[-1] if good else 'none'}{doubts}"
    )
