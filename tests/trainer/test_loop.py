"""What the loop decides by itself, without an engine or data."""

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_stores import write_store

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer import checkpoint
from trainer.checkpoint import Checkpoint
from trainer.config import ConfigError, LoopConfig
from trainer.distributed import Launch
from trainer.loop import Trainer
from trainer.profiling import Profiler
from trainer.reports import Progress, Spent, long_step_line, summary
from trainer.scoring import Score
from trainer.sequence_parallel import Place
from trainer.terminal import Reported


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
    trainer = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=Path("run"), deepspeed_config=Path("x.json"), steps=9)
    trainer.watchdog = trainer.loader = trainer.engine = trainer.launch = trainer.job = Anything()  # type: ignore[assignment]
    trainer.job.identity = {}  # type: ignore[misc]
    trainer.progress, trainer.before, trainer.place, trainer.scores = Progress(), Progress(), Place(), {}
    trainer.device, trainer.saved_step = torch.device("cpu"), 0
    trainer.reporter = SimpleNamespace(say=lambda line: None, write=lambda what: None)  # type: ignore[assignment]
    trainer.refuse_replaced_stores, trainer.param_norm = lambda: None, lambda: 1.0  # type: ignore[method-assign]
    return trainer, removes


def test_weights_that_may_be_why_losses_are_not_finite_take_no_place(saving: tuple[Any, list[bool]]) -> None:
    trainer, removes = saving
    trainer.save(1, needed=False)
    trainer.progress.health.nonfinite_in_row = 1
    trainer.save(2, needed=False)
    assert (removes, trainer.saved_step) == ([True], 1)
    trainer.save(2, needed=True)  # because of a signal, or after the last step
    trainer.progress.health.nonfinite_in_row = 0
    trainer.save(3, needed=False)
    assert removes == [True, False, True]
    assert trainer.saved_step == 3


def test_a_store_that_is_replaced_ends_the_run_before_it_is_evaluated_or_saved(
    saving: tuple[Any, list[bool]], process_group: None, tmp_path: Path
) -> None:
    trainer, removes = saving
    del trainer.refuse_replaced_stores
    trainer.held_out, trainer.launch = {"": []}, Launch("this test")
    for name in ("evaluated", "source"):
        write_store(tmp_path / name, {"a": b"text"})
    evaluated, source = (Store.open(tmp_path / name) for name in ("evaluated", "source"))
    trainer.job.stores = {"": evaluated, "web": source}
    trainer.save(1, needed=True)
    source.path.rename(tmp_path / "before")
    write_store(source.path, {"a": b"another"})
    for what in (partial(trainer.save, 2, needed=True), partial(trainer.evaluate, 2)):
        with pytest.raises(DataError, match=f"{source.path} is not what it was"):
            what()
    assert removes == [True]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(
    saving: tuple[Any, list[bool]], process_group: None, norm: float
) -> None:
    """The update that ruined them came after a loss that was finite."""
    trainer, removes = saving
    said: list[str] = []
    trainer.param_norm, trainer.reporter.say = lambda: norm, said.append  # type: ignore[method-assign]
    ruined = "after step 1 not all weights are finite: no checkpoint is written, earlier ones are kept"
    for needed in (False, True):  # because of a signal: the run goes on from the one before
        trainer.save(1, needed=needed)
    assert said == [ruined, ruined]
    trainer.launch, trainer.plan = Launch("this test"), trainer.plan.model_copy(update={"steps": 1})
    with pytest.raises(ConfigError, match=f"{ruined}. Lower the learning rate"):
        trainer.save(1, needed=True)
    assert not removes


def test_a_long_step_is_foretold_by_its_first_micro_batch() -> None:
    assert long_step_line(9.0, 64) is None
    assert long_step_line(1000.0, 1) is None, "it is the step"
    assert long_step_line(12.4, 4) == "the first of 4 micro-batches of a step took 12 s: a step takes about 50 s"
    assert (
        long_step_line(600.0, 64)
        == "the first of 64 micro-batches of a step took 600 s: a step takes about 640 minutes"
    )


@pytest.fixture
def stepping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, list[tuple[int, str]]]:
    """A trainer whose steps cost nothing, with a loss of as many nats as steps were done before, and the marks that it
    leaves with the watchdog."""
    marks: list[tuple[int, str]] = []
    trainer: Any = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=tmp_path, deepspeed_config=Path("x.json"), steps=9, log_every=3)
    trainer.job = SimpleNamespace(deepspeed={"optimizer": {"params": {"lr": 1.0}}})
    trainer.watchdog = SimpleNamespace(mark=lambda *mark: marks.append(mark))
    trainer.spent, trainer.progress, trainer.batch_size = Spent(), Progress(), 1
    trainer.watch_health = trainer.log = trainer.evaluate = trainer.save = lambda *_, **__: None
    trainer.reporter = SimpleNamespace(step=lambda *_: None, write=lambda write: write(None))
    trainer.engine = None
    trainer.scores = {}
    trainer.profiler = Profiler(tmp_path, "2..3", rank=1)
    monkeypatch.setattr("trainer.loop.set_learning_rate", lambda *_: None)
    trainer.step = lambda step: (Score(float(step), 1, 1), SimpleNamespace(norm=1.0))
    return trainer, marks


def test_the_watchdog_knows_that_a_trace_is_being_written(stepping: tuple[Any, list[tuple[int, str]]]) -> None:
    """Which may take longer than anything else between two steps. On all ranks alike, though one writes."""
    trainer, marks = stepping
    for step in range(4):
        trainer.train_step(step)
    assert marks == [(3, "profile")]


def test_the_summary_of_a_run_that_stops_between_two_reports_is_of_its_last_step(
    stepping: tuple[Any, list[tuple[int, str]]],
) -> None:
    trainer, _ = stepping
    logged: list[int] = []
    trainer.log = lambda done, *_: logged.append(done)
    for step in range(5):
        trainer.train_step(step)
    trainer.progress.health.skipped_steps = 2  # since the report of step 3
    assert logged == [3]
    said = summary(trainer.plan, 0, 5, Progress(), trainer.progress, trainer.scores).text()
    assert said.startswith("stopped: 5 of 9 steps")
    assert f"last batch, step 5: 4.0000 nats per token, {4 / math.log(2):.4f} bits per byte" in said
    assert "2 steps skipped" in said


def test_the_best_checkpoint_is_one_that_was_evaluated_at_its_step() -> None:
    rows, others = {"": "64 rows of val"}, {"": "64 rows of another store", "web": "8 rows"}
    progress = Progress(n_tokens=3.0).of(rows, None, 1)
    assert progress.saved(4, None) == progress.saved(4, Reported(3, 1.0, 1.0)) == progress
    assert progress.saved(4, Reported(4, math.nan, math.nan)) == progress
    best = progress.saved(4, Reported(4, 2.0, 1.0))
    assert (best.best_step, best.best_loss, best.n_tokens) == (4, 2.0, 3.0)
    assert best.saved(6, Reported(6, 2.0, 1.0)) == best, "of two equal ones it is the first"
    assert best.saved(6, Reported(6, 1.9, 1.0)).best_step == 6
    assert best.of(rows, None, 5) == best.of({}, None, 5) == best
    assert best.of({**rows, "web": "8 rows"}, None, 5).best_step == 4, "other scores beside it change nothing"
    other = best.of(others, None, 5)
    assert (other.best_step, other.best_loss, other.n_tokens) == (0, None, 3.0)
    assert other.of(others, None, 7).saved(8, Reported(8, 9.0, 1.0)).best_step == 8, "though it is a larger loss"


def test_it_is_known_since_when_evaluations_are_of_the_same_rows() -> None:
    """What was never evaluated before is of the same rows since the beginning."""

    def since(progress: Progress) -> dict[str, int]:
        return {name: each["since"] for name, each in progress.scored.items()}

    first = Progress().of({"": "a"}, None, 1)
    assert since(first) == {"": 0} and since(first.of({"": "a"}, None, 5)) == {"": 0}
    assert since(first.of({"": "a"}, 4, 5)) == {"": 5}, "by other rounds"
    later = first.of({"": "b", "web": "w"}, None, 5)
    assert since(later) == {"": 5, "web": 0}
    assert since(later.of({"": "a", "web": "x"}, None, 9)) == {"": 9, "web": 9}
    assert since(later.of({}, None, 9)) == {"": 5, "web": 0}, "nothing is evaluated, but was"
    assert Progress.from_state(json.loads(json.dumps(asdict(later)))) == later


def test_a_run_that_is_stopped_before_its_first_step_again_and_again_is_over(
    process_group: None, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text('{"config": {}, "stops_before_a_step": 2}')
    trainer: Any = object.__new__(Trainer)
    trainer.plan = LoopConfig(dir=tmp_path, deepspeed_config=Path("x.json"), steps=9)
    trainer.launch, trainer.device, trainer.first_step, trainer.saved_step = Launch("none"), torch.device("cpu"), 2, 3
    trainer.preemption, trainer.reporter = SimpleNamespace(signal=10), SimpleNamespace(say=lambda line: None)
    assert trainer.asked_to_stop(2) and trainer.asked_to_stop(3)
    assert json.loads((tmp_path / "run.json").read_text()) == {"config": {}, "stops_before_a_step": 3}
    for n_stops in (4, 5):
        with pytest.raises(ConfigError, match=f"^{n_stops} starts in .* since its last checkpoint .*the job more time"):
            trainer.asked_to_stop(2)
    assert trainer.asked_to_stop(3), "after a step"
