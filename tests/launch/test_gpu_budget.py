"""What of `make gpu-check` is left out for want of time or memory."""

from typing import Any

import pytest
import torch
from bench_gpu import budget as gpu_budget
from bench_gpu import timing


def test_budget_leaves_out_what_takes_too_long_or_comes_too_late() -> None:
    now = 100.0
    budget = gpu_budget.Budget(total_s=60, item_s=20, clock=lambda: now)
    assert budget.objection(19) is None
    assert budget.objection(21) == "left out: about 21 s expected, more than 20 s"
    assert budget.no_time(21) is None
    assert budget.objection(15, reserve_s=50) == "left out: about 15 s expected, 10 s were left"
    now = 150.0
    assert budget.objection(9) is None
    assert budget.objection(11) == "left out: about 11 s expected, 10 s were left"
    now = 161.0
    assert budget.objection(0) == "left out: about 0 s expected, 0 s were left"


def test_time_is_expected_to_grow_as_it_did() -> None:
    assert gpu_budget.expected_call_s([], 100) == 0
    assert gpu_budget.expected_call_s([(100, 1.0)], 400) == 16  # nothing known: with the square
    assert gpu_budget.expected_call_s([(100, 1.0), (200, 2.0)], 800) == pytest.approx(8)
    assert gpu_budget.expected_call_s([(100, 1.0), (200, 4.0)], 400) == pytest.approx(16)
    assert gpu_budget.expected_call_s([(100, 1.0), (200, 1.1)], 400) == pytest.approx(
        2.2
    )  # overhead: no less than linear
    assert gpu_budget.expected_call_s([(100, 1.0), (200, 9.0)], 400) == pytest.approx(36)


def test_what_needs_more_memory_than_there_is_is_left_out() -> None:
    budget = gpu_budget.Budget(60, 20, memory_gib=140)
    assert budget.no_memory([], 100) is None
    assert budget.no_memory([(100, 35.0)], 400) is None
    assert budget.no_memory([(100, 35.0)], 401) == "left out: about 140 GiB expected, of 140 GiB"
    assert budget.no_memory([(100, 20.0), (200, 35.0)], 1000) == "left out: about 175 GiB expected, of 140 GiB"
    assert gpu_budget.Budget(60, 20).no_memory([(100, 35.0)], 10**6) is None


@pytest.mark.parametrize(
    ("limit", "found"), [(7, 6), (10, 8), (12, 12), (19, 16), (24, 24), (39, 32), (40, 32), (63, 48)]
)
def test_longest_doubles_then_bisects(limit: int, found: int) -> None:
    tried: list[int] = []
    assert gpu_budget.longest(lambda length: tried.append(length) or length <= limit, known=4) == found
    assert max(tried) <= max(8, 2 * limit)


def test_what_takes_long_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(build: Any, device: torch.device, once: bool = False) -> Any:
        asked.append(once)
        return {"seconds": 1.0, "first_s": 1.0, "peak_gib": 1.0}

    monkeypatch.setattr(timing, "measure", fake)
    setting = timing.Setting(torch.device("cpu"), torch.float32, gpu_budget.Budget(100, 25), None, ["flash"])

    def earlier(seconds: float, compile_s: float) -> Any:
        done = {"what": "model fwd+bwd", "peer": "flash", "seq_len": 64}
        return [{**done, "seconds": seconds, "first_s": seconds + compile_s}]

    # Four times that are expected at 128, and as long for compilation.
    for seconds, compile_s, expected in ((2.4, 5, [False]), (2.4, 6, []), (2.6, 0, [True]), (6.3, 0, [])):
        asked.clear()
        model = list(timing.run_items(timing.Sizes(seq_len=128), setting, earlier(seconds, compile_s)))[-1]
        assert model["what"] == "model fwd+bwd" and asked[2:] == expected, seconds


def test_the_longest_says_what_ended_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(build: Any, device: torch.device, once: bool) -> Any:
        raise torch.OutOfMemoryError

    def search(seconds: float, **known: object) -> Any:
        return timing.find_longest(timing.Sizes(), [{"seq_len": 64, "seconds": seconds, **known}], setting, list)

    setting = timing.Setting(torch.device("cpu"), torch.float32, gpu_budget.Budget(100, 10), None, ["ours"])
    monkeypatch.setattr(timing, "measure", too_long)
    assert search(0.1)["limited_by"] == "memory"
    assert search(90.0)["limited_by"] == "time"
    setting.budget.memory_gib = 140.0
    fits = {"seconds": 1.0, "first_s": 1.0, "peak_gib": 100.0}
    monkeypatch.setattr(timing, "measure", lambda *_, **__: fits)
    found = search(0.1, peak_gib=100.0)  # of another model, which keeps more
    assert (found["limited_by"], found["seq_len"]) == ("memory", 128)
    assert [x.get("left_out") for x in found["tried"]] == [
        None,
        "left out: about 200 GiB expected, of 140 GiB",
        "left out: about 150 GiB expected, of 140 GiB",
    ]
