"""Which rank the others wait for, decided from what each of them said last."""

import json
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest

from trainer import ranks
from trainer.ranks import (
    RankState,
    holding_up,
    is_waiting,
    judge,
    line_of_code,
    line_of_error,
    parse_state,
    read_states,
    write_state,
)

STATE = RankState(0, 4, "n1", 100, 7, 3, "forward", 1.0, 30.0, "trainer/loop.py:12 in step", True, 1e9)


def at(rank: int, step: int, turn: int, waiting: bool = True, **changes: object) -> RankState:
    return replace(STATE, rank=rank, pid=100 + rank, step=step, turn=turn, waiting=waiting, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("states", "silent", "guilty"),
    [
        ([at(0, 7, 3), at(1, 7, 2), at(2, 7, 3)], (), [1]),  # an earlier phase of the same step
        ([at(0, 7, 3), at(1, 7, 3), at(2, 6, 9)], (), [2]),  # an earlier step
        ([at(0, 7, 3), at(1, 7, 3, waiting=False), at(2, 7, 3)], (), [1]),  # the one that is not in the collective
        ([at(0, 7, 3, waiting=False), at(1, 7, 2)], (), [1]),  # how far it is counts first
        ([at(0, 7, 3), at(1, 7, 3)], (), [0, 1]),  # all wait
        ([at(0, 7, 2), at(1, 7, 3)], {1}, [1]),  # its last word may be older than what it did since
        ([at(0, 7, 3), at(1, 8, 1, ended="failed: RuntimeError: no")], (), [1]),
        ([at(0, 7, 3), at(1, 7, 2), at(2, 7, 1, ended="finished")], (), [1]),
        ([at(0, 7, 3), at(1, 7, 2), at(2, 7, 1, ended="preempted")], (), [1]),
        # Ended because of the hang itself.
        ([at(0, 7, 3, ended="failed: x", stacks_written=True), at(1, 7, 2, stacks_written=True)], (), [1]),
        ([], (), []),
    ],
)
def test_who_holds_the_others_up(states: list[RankState], silent: set[int], guilty: list[int]) -> None:
    assert [state.rank for state in holding_up(states, silent)] == guilty


def test_overdue() -> None:
    assert not STATE.overdue
    assert replace(STATE, in_phase_s=30.1).overdue
    assert not replace(STATE, in_phase_s=1e9, limit_s=None).overdue
    assert replace(STATE, ended="failed: x").overdue
    assert not replace(STATE, ended="finished").overdue


def test_the_verdict_names_rank_process_and_place() -> None:
    states = [at(0, 7, 3), at(1, 7, 2, waiting=False, phase="data", in_phase_s=31.0)]
    assert judge(states, ()).splitlines() == [
        "the run hangs: the others wait for rank 1 (pid 101 on n1)",
        "  rank 1 has been 31 s (at most 30 s) in 'data' of step 7, at trainer/loop.py:12 in step",
    ]
    first, second = judge(states, {0}).splitlines()
    assert first.endswith("rank 0 (pid 100 on n1)") and "no sign of life" in second and "last seen in" in second
    failed = [at(0, 7, 3), at(1, 7, 2, ended="failed: RuntimeError: no")]
    assert "rank 1 has ended (failed: RuntimeError: no) in 'forward'" in judge(failed, ())


def test_the_verdict_on_equals_blames_nobody() -> None:
    first, *lines = judge([at(rank, 7, 3) for rank in range(20)], ()).splitlines()
    assert "no rank is behind" in first and first.endswith("and 12 more") and len(lines) == 8
    assert all(line.endswith("waiting for others") for line in lines)
    assert judge([STATE], ()).startswith("the run hangs: rank 0 (pid 100 on n1)\n")


def test_states_come_back_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for state in (at(0, 7, 3), at(2, 7, 3, ended="finished"), at(3, 7, 3)):
        write_state(tmp_path, state)
    ranks.state_path(tmp_path, 1).write_text('{"rank": 1, "wor')
    ranks.state_path(tmp_path, 4).write_text("[]")
    assert read_states(tmp_path, 6) == [at(0, 7, 3), at(2, 7, 3, ended="finished"), at(3, 7, 3)]
    assert json.loads(ranks.state_path(tmp_path, 0).read_text()) == asdict(at(0, 7, 3))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"\xff", b'{"rank": 1}', b'{"unknown": 1}'])
def test_what_is_no_state(content: bytes) -> None:
    assert parse_state(content) is None


def call_in(*modules: str) -> FrameType:
    """The innermost frame of calls through modules of these names, the outermost first."""
    call: Callable[[], FrameType] = sys._getframe
    for module in reversed(modules):
        made = types.ModuleType(module)
        source = "def call():\n    return inner()"
        made.__dict__["inner"] = call
        exec(compile(source, f"/lib/{module.replace('.', '/')}.py", "exec"), made.__dict__)
        call = made.call
    return call()


@pytest.mark.parametrize(
    ("module", "waits"),
    [
        ("torch.distributed.distributed_c10d", True),
        ("deepspeed.comm.torch", True),
        ("deepspeed.runtime.zero.partition_parameters", True),
        ("deepspeed.runtime.engine", False),
        ("trainer.distributed", True),
        ("torch.nn.functional", False),
        ("trainer.loop", False),
    ],
)
def test_which_code_waits_for_others(module: str, waits: bool) -> None:
    assert is_waiting(call_in(module)) is waits


def test_what_is_called_by_code_that_waits_does_not() -> None:
    """distributed.together() runs what may hang."""
    assert not is_waiting(call_in("trainer.distributed", "data_pipeline.loader"))


def test_deepspeeds_wrappers_are_looked_through() -> None:
    wrapped = "deepspeed.utils.nvtx"
    assert is_waiting(call_in("deepspeed.runtime.zero.stage3", wrapped))
    assert not is_waiting(call_in("trainer.loop", wrapped))


def test_the_line_of_code_is_one_of_ours() -> None:
    assert line_of_code(call_in("trainer.loop", "torch.nn")) == "trainer/loop.py:2 in call"
    with ThreadPoolExecutor() as elsewhere:  # under nothing of ours
        assert elsewhere.submit(lambda: line_of_code(call_in("torch.nn"))).result() == "torch/nn.py:2 in call"


def test_the_line_of_an_error_is_the_innermost_of_ours() -> None:
    def fail() -> NoReturn:
        raise ValueError

    made = types.ModuleType("torch.nn")
    exec(compile("def call(inner):\n    inner()", "/lib/torch/nn.py", "exec"), made.__dict__)
    loop = types.ModuleType("trainer.loop")
    exec(compile("def step(call, inner):\n\n    call(inner)", "/lib/trainer/loop.py", "exec"), loop.__dict__)
    with pytest.raises(ValueError) as error:
        loop.step(made.call, fail)
    assert line_of_error(error.tb) == "trainer/loop.py:3 in step"
    with pytest.raises(ValueError) as error:
        made.call(fail)
    assert line_of_error(error.tb) == f"trainer/test_ranks.py:{fail.__code__.co_firstlineno + 1} in fail"


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (ValueError("one\ntwo"), "failed: ValueError: one"),
        (KeyboardInterrupt(), "failed: KeyboardInterrupt"),
        (SystemExit(2), "failed: exit code 2"),
    ],
)
def test_what_is_said_of_an_error(error: BaseException, ended: str) -> None:
    assert ranks.ending(error) == ended
