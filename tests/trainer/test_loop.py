"""What the loop decides by itself, without an engine or data."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import LoopConfig
from trainer.evaluate import Score
from trainer.loop import Trainer
from trainer.profiling import Profiler
from trainer.reports import Progress, Spent
from trainer.sequence_parallel import Place


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[bool]]:
    """A trainer that only saves, and for each of its checkpoints whether others were removed for it."""
    removes: list[bool] = []

    def save(*arguments: Any, **options: bool) -> Checkpoint:
        removes.append(options["removes"])
        return Checkpoint(Path("step"), arguments[2])

    class Anything:
        n_skipped = 0
        leads = rank = 0

        def mark(self, *_: object) -> None:
            pass

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr("trainer.loop.all_gather", lambda values, device: [values])
    monkeypatch.setattr(Trainer, "report", lambda *_: None)
    trainer = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=Path("run"), deepspeed_config=Path("x.json"), steps=9)
    trainer.watchdog = trainer.loader = trainer.engine = trainer.launch = trainer.job = Anything()  # type: ignore[assignment]
    trainer.job.identity = {}  # type: ignore[misc]
    trainer.progress, trainer.before, trainer.place = Progress(), Progress(), Place()
    trainer.device, trainer.leads, trainer.terminal = torch.device("cpu"), False, None
    return trainer, removes


def test_weights_that_may_be_why_losses_are_not_finite_take_no_place(saving: tuple[Any, list[bool]]) -> None:
    trainer, removes = saving
    trainer.save(1)
    trainer.progress.health.nonfinite_in_row = 1
    trainer.save(2)  # because of a signal, or after the last step
    trainer.progress.health.nonfinite_in_row = 0
    trainer.save(3)
    assert removes == [True, False, True]
    assert trainer.way_on == "step 3"


def test_the_watchdog_knows_that_a_trace_is_being_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which may take longer than anything else between two steps. On all ranks alike, though one writes."""
    marks: list[tuple[int, str]] = []
    trainer: Any = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=tmp_path, deepspeed_config=Path("x.json"), steps=9)
    trainer.job = SimpleNamespace(deepspeed={"optimizer": {"params": {"lr": 1.0}}})
    trainer.watchdog = SimpleNamespace(mark=lambda *mark: marks.append(mark))
    trainer.spent, trainer.progress, trainer.batch_size = Spent(), Progress(), 1
    trainer.watch_health = trainer.log = trainer.evaluate = trainer.save = lambda *_: None
    trainer.engine = trainer.terminal = None
    trainer.profiler = Profiler(tmp_path, "2..3", rank=1)
    monkeypatch.setattr("trainer.loop.set_learning_rate", lambda *_: None)
    trainer.step = lambda step: (Score(1.0, 1, 1), SimpleNamespace(norm=1.0))
    for step in range(4):
        trainer.train_step(step)
    assert marks == [(3, "profile")]
