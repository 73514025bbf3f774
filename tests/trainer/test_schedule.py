"""The learning rate at the steps that matter."""

import pytest

from trainer.config import ConfigError, LoopConfig
from trainer.schedule import lr_factor


def factor(step: int, **plan: object) -> float:
    return lr_factor(step, LoopConfig(dir="run", deepspeed_config="ds.json", **plan))


@pytest.mark.parametrize("decay", ["cosine", "linear", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(decay) -> None:
    factors = [factor(step, steps=100, warmup_steps=4, decay=decay, final_lr_ratio=0.1) for step in range(5)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", [1.0, 0.55, 0.1]),
        ("linear", [1.0, 0.55, 0.1]),
        ("inverse_sqrt", [(10 / 11) ** 0.5, (10 / 61) ** 0.5, (10 / 111) ** 0.5]),
        ("constant", [1.0, 1.0, 1.0]),
    ],
)
def test_decay(decay, expected: list[float]) -> None:
    factors = [factor(step, steps=110, warmup_steps=10, decay=decay, final_lr_ratio=0.1) for step in (10, 60, 110)]
    assert factors == pytest.approx(expected)


def test_wsd_is_constant_and_falls_in_its_last_steps() -> None:
    plan = {"steps": 100, "warmup_steps": 10, "decay": "wsd", "decay_steps": 20, "final_lr_ratio": 0.1}
    assert [factor(step, **plan) for step in (9, 10, 50, 80)] == [1.0] * 4
    assert [factor(step, **plan) for step in (90, 99, 100)] == pytest.approx([0.55, 0.145, 0.1])
    assert factor(50, **{**plan, "steps": 60}) == pytest.approx(0.55), "a run that was to go on, ended earlier"


def test_wsd_says_how_long_it_falls() -> None:
    with pytest.raises(ConfigError, match=r"run.decay='wsd' falls in the last run.decay_steps: give their number"):
        factor(0, steps=10, decay="wsd")
    with pytest.raises(ConfigError, match=r"run.decay_steps=5 is for run.decay='wsd', not 'cosine': leave it out"):
        factor(0, steps=10, decay="cosine", decay_steps=5)
    with pytest.raises(ConfigError, match=r"run.decay_steps=8 are more than run.steps=10: lower one of them"):
        factor(0, steps=10, warmup_steps=3, decay="wsd", decay_steps=8)


def test_edges() -> None:
    assert factor(0, steps=1, warmup_steps=0, decay="cosine", final_lr_ratio=0.0) == 1.0
    assert factor(0, steps=1, warmup_steps=1, decay="cosine", final_lr_ratio=0.0) == 1.0
    assert factor(0, steps=9, warmup_steps=0, decay="inverse_sqrt", final_lr_ratio=0.0) == 1.0
    assert factor(999, steps=1000, warmup_steps=1, decay="inverse_sqrt", final_lr_ratio=0.5) == 0.5
