"""The learning rate at the steps that matter."""

import pytest

from trainer.config import LoopConfig
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


def test_edges() -> None:
    assert factor(0, steps=1, warmup_steps=0, decay="cosine", final_lr_ratio=0.0) == 1.0
    assert factor(0, steps=1, warmup_steps=1, decay="cosine", final_lr_ratio=0.0) == 1.0
    assert factor(0, steps=9, warmup_steps=0, decay="inverse_sqrt", final_lr_ratio=0.0) == 1.0
    assert factor(999, steps=1000, warmup_steps=1, decay="inverse_sqrt", final_lr_ratio=0.5) == 0.5
