"""Health on made-up losses."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from trainer.config import ConfigError, LoopConfig
from trainer.health import WINDOW, Diverged, Health

NAN, INF = math.nan, math.inf


def plan(folder: Path = Path("runs/none"), **values: float) -> LoopConfig:
    return LoopConfig(dir=folder, deepspeed_config=Path("deepspeed.json"), steps=10, **values)


def noisy(n: int, mean: float = 3.0) -> list[float]:
    rng = random.Random(0)
    return [rng.gauss(mean, 0.05) for _ in range(n)]


def watched(losses: list[float], **values: float) -> tuple[Health, list[str]]:
    health, lines = Health(), []
    for step, loss in enumerate(losses, 1):
        lines += health.observe(step, loss, 1.0, False, plan(**values))
    return health, lines


def test_noise_is_no_spike() -> None:
    health, lines = watched(noisy(1000))
    assert (health.spikes, lines) == (0, [])


def test_a_loss_that_falls_is_no_spike() -> None:
    health, lines = watched([9 * 0.98**step for step in range(300)])
    assert (health.spikes, lines) == (0, [])


def test_a_spike_is_named_with_its_step_its_loss_and_the_mean() -> None:
    health, lines = watched([*noisy(50), 3.5, *noisy(50)])
    assert health.spikes == 1
    (line,) = lines
    assert line.startswith("step 51 has a loss of 3.5000, a spike: ")
    assert "the mean of the last 50" in line
    mean = sum(noisy(50)) / 50
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in noisy(50)) / 50)
    assert f" {(3.5 - mean) / deviation:.1f} standard deviations above {mean:.4f}," in line


def test_the_limit_is_the_configured_one() -> None:
    losses = noisy(100)
    mean = sum(losses) / 100
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 100)
    for factor, spikes in ((3.99, 0), (4.01, 1)):
        assert watched([*losses, mean + factor * deviation], spike_deviations=4.0)[0].spikes == spikes


def test_nothing_is_a_spike_when_that_is_off_or_before_20_losses() -> None:
    assert watched([*noisy(50), 100.0], spike_deviations=0.0)[0].spikes == 0
    assert watched([*noisy(19), 100.0])[0].spikes == 0
    assert watched([*noisy(20), 100.0])[0].spikes == 1


def test_a_loss_that_stood_still_may_move_by_a_little() -> None:
    still = [2.0] * 30
    assert watched([*still, 2.0 * (1 + 1e-6)])[0].spikes == 0
    assert watched([*still, 2.5])[0].spikes == 1
    assert watched([0.0] * 30 + [0.1])[1] == [
        "step 31 has a loss of 0.1000, a spike: above 0.0000, the mean of the last 30; 1 in all"
    ]


def test_a_new_level_is_a_spike_only_for_a_while() -> None:
    health, _ = watched([*noisy(200), *noisy(300, mean=5.0)])
    assert 1 <= health.spikes <= 5
    assert watched([*noisy(200), *noisy(300, mean=5.0), 9.0])[0].spikes == health.spikes + 1


def test_the_window_holds_the_last_hundred() -> None:
    health, _ = watched([float(step) for step in range(250)])
    assert health.recent_losses == [float(step) for step in range(250 - WINDOW, 250)]


def test_a_huge_loss_does_not_overflow() -> None:
    health, _ = watched([*noisy(30), 1e300, *noisy(10)])
    assert health.spikes == 1


@pytest.mark.parametrize(
    ("loss", "norm", "skipped"),
    [(NAN, 1.0, False), (INF, 1.0, False), (3.0, NAN, False), (3.0, INF, False), (3.0, -INF, False), (3.0, 1.0, True)],
)
def test_a_step_that_is_not_finite_counts_and_is_named(loss: float, norm: float, skipped: bool) -> None:
    health = Health([2.0, 4.0])
    (line,) = health.observe(7, loss, norm, skipped, plan())
    assert line == (
        f"step 7 has a loss of {loss:.4g} and a gradient norm of {norm:.4g}: it changes nothing. the first in a row, "
        "10 stop the run; 1 skipped in all; the last finite losses have a mean of 3.0000"
    )
    assert health == Health([2.0, 4.0], skipped_steps=1, nonfinite_in_row=1)


def test_a_finite_step_ends_the_row() -> None:
    health = Health()
    for step in range(1, 31):
        health.observe(step, NAN if step % 3 else 2.0, 1.0, bool(step % 3), plan(max_nonfinite=3))
    assert (health.skipped_steps, health.nonfinite_in_row) == (20, 0)


def test_too_many_in_a_row_stop_the_run(tmp_path: Path) -> None:
    health = Health()
    for step in range(1, 3):
        health.observe(step, NAN, NAN, True, plan(tmp_path, max_nonfinite=3))
    with pytest.raises(Diverged, match=r"step 3 has a loss of nan and a gradient norm of inf, 3 in a row: .*: none$"):
        health.observe(3, NAN, INF, True, plan(tmp_path, max_nonfinite=3))
    assert issubclass(Diverged, ConfigError)


def test_the_newest_checkpoint_and_the_ways_out_are_named(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    health = Health()
    health.observe(202, NAN, NAN, True, plan(tmp_path))
    with pytest.raises(Diverged) as error:
        health.observe(203, NAN, NAN, True, plan(tmp_path, max_nonfinite=2))
    message = str(error.value)
    assert message.endswith(f"was finite: {tmp_path / 'checkpoints/step_00000200'}")
    for way in ("deepspeed.optimizer.params.lr", "run.warmup_steps", "deepspeed.gradient_clipping"):
        assert way in message


def test_a_checkpoint_from_which_no_loss_was_finite_may_be_why(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    with pytest.raises(Diverged) as error:
        Health().observe(201, NAN, NAN, True, plan(tmp_path, max_nonfinite=1))
    good = tmp_path / "checkpoints/step_00000100"
    doubts = "In doubt, and to be removed before the same command goes on: step_00000200"
    assert str(error.value).endswith(f"was finite: {good}. {doubts}")


def test_a_fault_that_comes_back_for_days_does_not_fill_the_log() -> None:
    health = Health()
    lines = [health.observe(step, NAN if step % 2 else 2.0, 1.0, bool(step % 2), plan()) for step in range(10_000)]
    said = [step for step, some in enumerate(lines) if some]
    assert said[:11] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 39]
    assert len(said) == 9 * 3 + 5
    assert health.skipped_steps == 5000


def test_an_interrupted_run_reports_what_an_undisturbed_one_does() -> None:
    rng = random.Random(1)
    steps = [(rng.choices([rng.gauss(2, 0.1), 9.0, NAN], [90, 5, 5])[0], rng.random()) for _ in range(400)]
    undisturbed, interrupted = Health(), Health()
    for step, (loss, norm) in enumerate(steps):
        expected = undisturbed.observe(step, loss, norm, math.isnan(loss), plan())
        interrupted = Health.from_state(json.loads(json.dumps(asdict(interrupted))))
        assert interrupted.observe(step, loss, norm, math.isnan(loss), plan()) == expected
        assert interrupted == undisturbed
    assert undisturbed.spikes and undisturbed.skipped_steps
