"""What the loop decides by itself, without an engine or data."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import LoopConfig
from trainer.loop import Trainer
from trainer.reports import Progress


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
    monkeypatch.setattr("trainer.loop.all_sum", lambda values, device: values)
    monkeypatch.setattr(Trainer, "report", lambda *_: None)
    trainer = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=Path("run"), deepspeed_config=Path("x.json"), steps=9)
    trainer.watchdog = trainer.loader = trainer.engine = trainer.launch = trainer.job = Anything()  # type: ignore[assignment]
    trainer.job.identity = {}  # type: ignore[misc]
    trainer.progress, trainer.before = Progress(), Progress()
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
