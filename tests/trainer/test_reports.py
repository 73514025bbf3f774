"""What of a step is reported, out of what each rank tells the others."""

from pathlib import Path

import pytest

from trainer.config import LoopConfig
from trainer.reports import Progress, Spent, Step, own_figures, step_values, summary
from trainer.scoring import Score

SECONDS = {"data": 0.5, "forward": 3.0, "forward/exchange": 1.0, "backward": 4.0, "backward/exchange": 0.25}


def test_who_waits_for_others_is_not_busy() -> None:
    own = own_figures(SECONDS, {"memory/peak_gib": 2.0}, 3)
    assert own == {
        "speed/data_s": 0.5,
        "speed/forward_s": 3.0,
        "speed/backward_s": 4.0,
        "speed/optimizer_s": 0.0,
        "speed/exchange_s": 1.25,
        "busy_s": 2.5,
        "memory/peak_gib": 2.0,
        "data/skipped_rows": 3,
    }


def test_figures_are_of_a_step_and_of_the_rank_that_has_the_most() -> None:
    figures = [own_figures(SECONDS, {"memory/peak_gib": gib}, 0) for gib in (2.0, 1.0)]
    figures.append(own_figures({**SECONDS, "data": 2.0, "forward": 1.5}, {"memory/peak_gib": 1.5}, 0))
    step = Step(Score(6.0, 3.0, 2.0), lr=0.1, grad_norm=2.0, param_norm=5.0)
    progress = Progress(train_s=40.0, save_s=10.0, last_save_s=3.0)
    spent = Spent(steps=2, n_samples=4, n_tokens=100.0, seconds=8.0)
    values, slowest = step_values(step, spent, progress, figures, ["a", "a", "b"])
    assert slowest.rank == 0 and slowest.over_median == 1.0
    speed = {tag.removeprefix("speed/"): value for tag, value in values.items() if tag.startswith("speed/")}
    assert speed == {
        "tokens_per_s": 12.5,
        "sequences_per_s": 0.5,
        "step_s": 4.0,
        "data_s": 1.0,
        "forward_s": 1.5,
        "backward_s": 2.0,
        "optimizer_s": 0.0,
        "exchange_s": 0.625,
        "data_stall": 0.25,
        "slowest_rank": 0,
        "slowest_over_median": 1.0,
        "save_s": 3.0,
        "save_share": 0.25,
    }
    assert values["memory/peak_gib"] == 2.0 and values["train/loss"] == 2.0


@pytest.mark.parametrize("exchange", [{}, {"forward/exchange": 0.5}])
def test_exchanges_are_reported_where_there_are_some(exchange: dict[str, float]) -> None:
    own = own_figures({"forward": 1.0, **exchange}, {}, 0)
    step, spent = Step(Score(1.0, 1.0, 1.0), 0.1, 1.0, 1.0), Spent(1, 1, 1.0, 1.0)
    values, _ = step_values(step, spent, Progress(), [own], ["a"])
    assert ("speed/exchange_s" in values) == bool(exchange) and values["speed/save_share"] == 0


def test_a_summary_is_of_one_start() -> None:
    plan = LoopConfig(dir=Path("run"), deepspeed_config=Path("x.json"), steps=9)
    before, now = Progress(train_s=10, save_s=4, n_tokens=100), Progress(train_s=30, save_s=5, n_tokens=300)
    said = summary(plan, 3, 5, before, now, {})
    assert (said.seconds, said.save_s, said.n_tokens) == (20, 1, 200)
