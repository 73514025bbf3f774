"""The trace of a window of steps, as a reader of Chrome traces finds it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import ConfigError, LoopConfig
from trainer.profiling import Profiler
from trainer.timing import Stopwatch

PHASES = ["data", "forward", "backward", "optimizer"]


def steps(run_dir: Path, first: int, last: int, window: str | None, rank: int = 0) -> None:
    """What a run does in steps first to last."""
    watch = Stopwatch(torch.device("cpu"))
    weights = torch.randn(64, 64, requires_grad=True)
    with Profiler(run_dir, window, rank) as profiler:
        for step in range(first, last + 1):
            with profiler.step(step):
                for phase in PHASES:
                    with watch.phase(phase):
                        (weights @ weights).sum()
            if step == profiler.last_step:
                profiler.write()


def trace(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The events of the only trace of a run."""
    assert [file.name for file in (run_dir / "profile").iterdir()] == [name]
    with gzip.open(run_dir / "profile" / name, "rt") as file:
        return json.load(file)["traceEvents"]


def ranges(events: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, begin and end of the ranges that we named, in order of time."""
    ours = [event for event in events if event.get("cat") == "user_annotation"]
    return sorted(((event["name"], event["ts"], event["ts"] + event["dur"]) for event in ours), key=lambda r: r[1])


def test_the_window_is_the_steps_as_they_are_logged(tmp_path: Path) -> None:
    steps(tmp_path, 1, 14, "10..12")
    events = trace(tmp_path, "rank_00000_steps_10-12.json.gz")
    found = ranges(events)
    assert [name for name, *_ in found] == [name for step in (10, 11, 12) for name in (f"step {step}", *PHASES)]
    for i in range(0, len(found), 1 + len(PHASES)):
        (_, begin, end), *phases = found[i : i + 1 + len(PHASES)]
        assert all(begin <= part_begin <= part_end <= end for _, part_begin, part_end in phases)
    assert sum(event.get("name") == "aten::matmul" for event in events) == 3 * len(PHASES)


def test_a_run_that_continues_or_stops_within_the_window_profiles_what_it_does_of_it(tmp_path: Path) -> None:
    steps(tmp_path / "stopped", 1, 10, "9..12")
    steps(tmp_path / "continued", 11, 20, "9..12")
    assert [name for name, *_ in ranges(trace(tmp_path / "stopped", "rank_00000_steps_9-10.json.gz"))][::5] == [
        "step 9",
        "step 10",
    ]
    assert len(ranges(trace(tmp_path / "continued", "rank_00000_steps_11-12.json.gz"))) == 2 * 5


def test_an_error_within_the_window_leaves_its_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row"), Profiler(tmp_path, "1..3", 0) as profiler, profiler.step(1):
        raise ValueError("no row")
    assert [name for name, *_ in ranges(trace(tmp_path, "rank_00000_steps_1-1.json.gz"))] == ["step 1"]


def test_a_trace_that_cannot_be_written_hides_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("not a folder")
    with pytest.raises(ValueError, match="no row"), Profiler(tmp_path, "1..3", 0) as profiler, profiler.step(1):
        raise ValueError("no row")
    assert f"cannot write the profile in {tmp_path / 'profile'}: " in capsys.readouterr().err
    with Profiler(tmp_path, "1..3", 0) as profiler:
        with profiler.step(1):
            pass
        with pytest.raises(OSError, match="exists"):
            profiler.write()


@pytest.mark.parametrize(("window", "rank"), [(None, 0), ("2..3", 1), ("8..9", 0)])
def test_no_profiler_runs_for_other_steps_and_ranks(
    tmp_path: Path, window: str | None, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.profiling.profile", None)
    steps(tmp_path, 1, 4, window, rank)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("window", ["12..10", "0..3", "98..101", "10", "10-12", "a..b", "..", "10..12..14", "", 5, 1.5])
def test_a_bad_window_is_refused_with_a_way_out(window: Any) -> None:
    with pytest.raises(ConfigError, match=r"profile_steps.*\"10\.\.12\""):
        LoopConfig(dir="x", deepspeed_config="x.json", steps=100, profile_steps=window)


def test_of_one_step_the_window_is_told() -> None:
    windows: list[Any] = ["5", 5]
    for window in windows:
        with pytest.raises(ConfigError, match=r"^run.profile_steps='5' must be .*\(5\.\.5 for this step alone\)"):
            LoopConfig(dir="x", deepspeed_config="x.json", steps=100, profile_steps=window)


@pytest.mark.parametrize("window", [None, "1..1", "10..12", "100..100"])
def test_a_good_window_is_taken(window: str | None) -> None:
    assert LoopConfig(dir="x", deepspeed_config="x.json", steps=100, profile_steps=window).profile_steps == window
