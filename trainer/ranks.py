"""What every rank of a run says about itself, and which of them holds the others up.

Files are all that is needed, so it can be read when collectives do not work, and from outside. Which rank is to blame
is a pure function of them.

RUN/ranks/rank_00003.json, written every few seconds by that rank's watchdog: one JSON object with RankState's fields.
"""

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import walk_tb
from types import FrameType, TracebackType

from data_pipeline.output import listed
from trainer.run_files import RANKS, write_json

SHOWN = 8
"""Ranks that a message describes, at most."""
_COLLECTIVES = ("torch.distributed", "deepspeed.comm", "deepspeed.runtime.zero", "trainer.distributed")
"""Modules in whose own code a rank waits for others: where it communicates, or asks for what is communicated."""
_WRAPPERS = "deepspeed.utils.nvtx"
_OURS = ("trainer", "reformer", "data_pipeline", "__main__")


@dataclass(frozen=True)
class RankState:
    """Where a rank is, as plain JSON values."""

    rank: int
    world_size: int
    host: str
    pid: int
    step: int
    turn: int
    """Phases that it has begun with this number of the step: all ranks begin the same ones, in the same order."""
    phase: str
    """What it does there: "start", "data", "forward", "backward", "histograms", "optimizer", "profile", "log",
    "evaluate", "save", "between"."""
    in_phase_s: float
    """How long it has been there."""
    limit_s: float | None
    """How long it may be; None: for ever."""
    at: str
    """The line of code."""
    waiting: bool
    """Whether that is inside a collective, where it waits for other ranks."""
    time: float
    """Unix time by its own clock; clocks of nodes may differ."""
    stacks_written: bool = False
    """Whether it has written its stacks because of a hang."""
    ended: str | None = None
    """None while it runs; then "finished", "preempted" or "failed: …"."""

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and not well."""
        return (self.ended or "").startswith("failed") and not self.stacks_written

    @property
    def overdue(self) -> bool:
        return self.failed or (self.limit_s is not None and self.in_phase_s > self.limit_s)

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"in {self.phase!r} of step {self.step}, at {self.at}"


def state_path(run_dir: Path, rank: int) -> Path:
    return run_dir / RANKS / f"rank_{rank:05d}.json"


def write_state(run_dir: Path, state: RankState) -> None:
    """Raises OSError."""
    write_json(state_path(run_dir, state.rank), asdict(state))


def parse_state(content: bytes) -> RankState | None:
    """None for what is no state."""
    try:
        return RankState(**json.loads(content))
    except (ValueError, TypeError):
        return None


def read_bytes(path: Path) -> bytes:
    """The content of a file; nothing where it cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


def read_states(run_dir: Path, world_size: int) -> list[RankState]:
    """What ranks 0 … world_size - 1 said last, in order; without those that said nothing."""
    states = (parse_state(read_bytes(state_path(run_dir, rank))) for rank in range(world_size))
    return [state for state in states if state is not None]


def holding_up(states: Sequence[RankState], silent: Collection[int]) -> list[RankState]:
    """The ranks that the others wait for: those that failed or are `silent`; or else those that are furthest back.

    Among equals it is those that do not wait in a collective themselves; all of them where all do.
    """
    if gone := [state for state in states if state.failed or state.rank in silent]:
        return gone
    running = [state for state in states if state.ended is None or state.stacks_written]
    last = min(((state.step, state.turn) for state in running), default=None)
    equals = [state for state in running if (state.step, state.turn) == last]
    return [state for state in equals if not state.waiting] or equals


def judge(states: Sequence[RankState], silent: Collection[int]) -> str:
    """What to tell people about a hang: a line that names the ranks to blame, and one on where each of them is."""
    guilty = holding_up(states, silent)
    names = listed([state.name for state in guilty], SHOWN)
    if len(states) == 1 and not silent:
        first = f"the run hangs: {names}"
    elif len(guilty) == len(states):
        first = f"the run hangs: no rank is behind the others: {names}"
    else:
        first = f"the run hangs: the others wait for {names}"
    return "\n".join([first, *(f"  rank {state.rank} {_symptom(state, silent)}" for state in guilty[:SHOWN])])


def _symptom(state: RankState, silent: Collection[int]) -> str:
    if state.failed:
        return f"has ended ({state.ended}) {state.place}"
    if state.rank in silent:
        return (
            "gives no sign of life: its process was stopped or killed, cannot run any Python code, or its node is "
            f"gone; last seen {state.place}"
        )
    limit = f" (at most {state.limit_s:,.0f} s)" if state.limit_s is not None else ""
    return f"has been {state.in_phase_s:,.0f} s{limit} {state.place}{', waiting for others' if state.waiting else ''}"


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread, of which this is the innermost frame, is inside a collective."""
    while _module(frame) == _WRAPPERS and frame.f_back:
        frame = frame.f_back
    return _module(frame).startswith(_COLLECTIVES)


def line_of_code(frame: FrameType) -> str:
    """The innermost line of this project's code under which a thread is; the innermost of all if there is none."""
    ours: FrameType | None = frame
    while ours is not None and not _is_ours(ours):
        ours = ours.f_back
    return _spelled(ours or frame, (ours or frame).f_lineno)


def line_of_error(traceback: TracebackType) -> str:
    """The same of where an error came up."""
    places = list(walk_tb(traceback))
    ours = [place for place in places if _is_ours(place[0])]
    return _spelled(*(ours or places)[-1])


def _spelled(frame: FrameType, line: int) -> str:
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line} in {frame.f_code.co_name}"


def _is_ours(frame: FrameType) -> bool:
    return _module(frame).partition(".")[0] in _OURS


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def ending(error: BaseException) -> str:
    """What a rank says about its end by an error."""
    if isinstance(error, SystemExit):  # after the error of another rank, which says what it is
        return f"failed: exit code {error.code}"
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + text[0] if text else ''}"
