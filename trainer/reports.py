"""What a run has counted, and what of it is reported at a step: the numbers behind the lines and curves.

What is counted over the whole run is a plain value, kept in its checkpoints, so that a run which was stopped a dozen
times counts as one that was not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from trainer.config import LoopConfig
from trainer.health import Health
from trainer.rank_faults import Slowest, slow_ranks
from trainer.scoring import Score
from trainer.terminal import Reported, Summary

STEP_PHASES = ("data", "forward", "backward", "optimizer")
"""Phases of a step whose seconds are reported."""


@dataclass
class Progress:
    """What a run has counted since it was begun, however often it was stopped."""

    health: Health = field(default_factory=Health)
    train_s: float = 0.0
    """Seconds of its steps, with evaluations and checkpoints."""
    save_s: float = 0.0
    """Those of them that checkpoints took."""
    last_save_s: float = 0.0
    """Those of the newest."""
    n_tokens: float = 0.0
    """Tokens that were to be predicted."""
    skipped_rows: int = 0
    """Damaged rows that trained nothing, on all ranks."""
    best_step: int = 0
    """Of the checkpoint with the lowest eval/loss; 0 where no step was both evaluated and saved."""
    best_loss: float | None = None
    scored: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What evaluations are of, by the name of the mixture's store, "" for data.store: {"rows": which rows, "n_hashes":
    by how many rounds of LSH attention, None for those of the model, "since": the first step of which that is true}."""

    def of(self, rows: Mapping[str, str], n_hashes: int | None, step: int) -> Self:
        """The same where evaluations from `step` on are of these rows, by so many rounds.

        A best step of others is forgotten, since scores cannot be compared.
        """
        scored = dict(self.scored)
        for name, own in rows.items():
            before, now = scored.get(name), {"rows": own, "n_hashes": n_hashes}
            if before is None or {**now, "since": before["since"]} != before:
                scored[name] = {**now, "since": 0 if before is None else step}
        if scored.get("") == self.scored.get(""):
            return replace(self, scored=scored)
        return replace(self, scored=scored, best_step=0, best_loss=None)

    def saved(self, step: int, evaluated: Reported | None) -> Self:
        """What it is when the state after `step` steps has been saved; `evaluated` is the newest evaluation."""
        if evaluated is None or evaluated.step != step or not math.isfinite(evaluated.loss):
            return self
        is_best = self.best_loss is None or evaluated.loss < self.best_loss
        return replace(self, best_step=step, best_loss=evaluated.loss) if is_best else self

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """What dataclasses.asdict() made of it, before or after JSON."""
        return cls(**{**state, "health": Health.from_state(state["health"])})


@dataclass
class Spent:
    """Time and tokens since the last report."""

    steps: int = 0
    n_samples: int = 0
    n_tokens: float = 0.0
    seconds: float = 0.0
    """Without evaluations and checkpoints."""

    def add(self, n_samples: int, n_tokens: float, seconds: float) -> None:
        self.steps += 1
        self.n_samples += n_samples
        self.n_tokens += n_tokens
        self.seconds += seconds


@dataclass(frozen=True)
class Step:
    """A step that is reported."""

    score: Score
    lr: float
    grad_norm: float
    param_norm: float


def own_figures(seconds: Mapping[str, float], memory_gib: Mapping[str, float], skipped_rows: int) -> dict[str, float]:
    """What each rank tells the others: seconds by phase of a step (timing.py), memory, damaged rows, all by tag; and as
    "busy_s" the seconds of its data and forward passes, without those in which it waited for whom it shares sequences
    with."""
    phases = {f"speed/{phase}_s": seconds.get(phase, 0.0) for phase in STEP_PHASES}
    exchanges = {phase: seconds.get(f"{phase}/exchange", 0.0) for phase in ("forward", "backward")}
    busy_s = phases["speed/data_s"] + phases["speed/forward_s"] - exchanges["forward"]
    shared = {"speed/exchange_s": sum(exchanges.values()), "busy_s": busy_s}
    return {**phases, **shared, **memory_gib, "data/skipped_rows": skipped_rows}


def step_values(
    step: Step, spent: Spent, progress: Progress, figures: Sequence[Mapping[str, float]], hosts: Sequence[str]
) -> tuple[dict[str, float], Slowest]:
    """The values of a step by the tags of metrics.py, and the slowest rank. figures: `own_figures` by rank."""
    most = {tag: max(own[tag] for own in figures) for tag in figures[0]}
    slowest = slow_ranks([own["busy_s"] for own in figures], hosts)
    values = {
        "train/loss": step.score.loss,
        "train/bits_per_byte": step.score.bits_per_byte,
        "train/bits_per_token": step.score.bits_per_token,
        "train/perplexity": step.score.perplexity,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
        "train/param_norm": step.param_norm,
        "train/skipped_steps": progress.health.skipped_steps,
        "train/spikes": progress.health.spikes,
        "speed/tokens_per_s": spent.n_tokens / spent.seconds,
        "speed/sequences_per_s": spent.n_samples / spent.seconds,
        "speed/step_s": spent.seconds / spent.steps,
        **{f"speed/{phase}_s": most[f"speed/{phase}_s"] / spent.steps for phase in STEP_PHASES},
        **({"speed/exchange_s": most["speed/exchange_s"] / spent.steps} if most["speed/exchange_s"] else {}),
        "speed/data_stall": most["speed/data_s"] / spent.seconds,
        "speed/slowest_rank": slowest.rank,
        "speed/slowest_over_median": slowest.over_median,
        "speed/save_s": progress.last_save_s,
        "speed/save_share": progress.save_s / progress.train_s if progress.train_s else 0.0,
        **{tag: most[tag] for tag in most if tag.startswith("memory/")},
    }
    return values, slowest


LONG_S = 10.0
"""A micro-batch that takes longer than this is worth a word before its step is done."""


def long_step_line(seconds: float, n_batches: int) -> str | None:
    """How long a step will take, by the first of its micro-batches; None where that is soon to be seen."""
    if n_batches < 2 or seconds < LONG_S:
        return None
    step_s = seconds * n_batches
    about = f"{step_s / 60:,.0f} minutes" if step_s > 120 else f"{step_s:.0f} s"
    return f"the first of {n_batches} micro-batches of a step took {seconds:.0f} s: a step takes about {about}"


def summary(
    plan: LoopConfig, first_step: int, done: int, before: Progress, now: Progress, scores: Mapping[str, Reported]
) -> Summary:
    """Of a start at `first_step` that has come to `done`."""
    return Summary(
        run_dir=plan.dir,
        steps=plan.steps,
        first_step=first_step,
        done=done,
        n_tokens=now.n_tokens - before.n_tokens,
        seconds=now.train_s - before.train_s,
        save_s=now.save_s - before.save_s,
        skipped_steps=now.health.skipped_steps,
        spikes=now.health.spikes,
        scores=scores,
    )
