"""Curves stay continuous: what was reported beyond a checkpoint is taken back."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.metrics import Metrics, duration, environment, peak_gib


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write(run_dir: Path, first: int, until: int) -> None:
    metrics = Metrics(run_dir, first)
    for step in range(first + 1 if first else 0, until + 1):
        metrics.write(step, {"train/loss": first + step / 3})
    metrics.close()


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 8, "train/lo')
    write(tmp_path, 5, 9)
    assert steps(tmp_path) == list(range(10))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(10))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["train/loss"] == 5 + 9 / 3


def test_a_run_begun_anew_forgets_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    write(tmp_path, 0, 2)
    assert steps(tmp_path) == [0, 1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [0, 1, 2]


def test_environment_and_memory() -> None:
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert "git_commit" in found
    assert 0.01 < peak_gib(torch.device("cpu")) < 100


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3600 * 30 + 59.6)] == ["0:00:00", "0:01:01", "30:01:00"]
