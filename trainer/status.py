"""What a run is doing, or how it ended, from what is in its folder: for any process that sees that, at any time.

Nothing is written, and every byte of a checkpoint is read before it is called sound. launch/status.py shows this.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.checkpoint import checked
from trainer.config import ConfigError
from trainer.ranks import RankState, holding_up, parse_state, read_bytes, state_path
from trainer.run_files import CHECKPOINTS, METRICS, RANKS, RECORD, STACKS, read_metrics_tail, read_record
from trainer.run_lock import holder

RECENT = 60
"""Losses that are told, at most."""
QUIET_S = 30.0
"""A rank that wrote nothing for so much longer than others is pointed out."""


def facts(run: Path) -> dict[str, Any]:
    """All that can be found out, as plain JSON values. Raises ConfigError where there is no run."""
    if not any((run / name).exists() for name in (RECORD, METRICS, CHECKPOINTS, RANKS)):
        raise ConfigError(
            f"{run} is not the folder of a run: it has neither {RECORD} nor metrics, checkpoints or ranks; give what "
            "run.dir was"
        )
    who = holder(run)
    states = rank_states(run)
    steps, hang, metrics = planned_steps(run), read_hang(run), read_metrics_tail(run)
    newest = newest_values(metrics)
    sound, damaged = check_checkpoints(run)
    # A run that was stopped between two lines (run.log_every) has its last step in the checkpoint only.
    done = max([0, *(line["step"] for line in metrics), *([sound["step"]] if sound else [])])
    left_s = (steps - done) * newest["speed/step_s"] if steps is not None and "speed/step_s" in newest else None
    written = {}
    for state in states:
        with suppress(FileNotFoundError):  # a new start removes some
            written[state.rank] = state_path(run, state.rank).stat().st_mtime  # all by one clock
    return {
        "run": str(run),
        "state": state_of(who, states, hang, started="train/loss" in newest and not any(map(is_loading, states))),
        "holder": who,
        "step": done,
        "steps": steps,
        "left_s": left_s,
        "newest": newest,
        "recent": {tag: recent(metrics, tag) for tag in ("train/loss", "eval/loss")},
        "checkpoint": sound,
        "damaged": damaged,
        "ranks": [asdict(state) for state in states],
        "furthest_back": [state.rank for state in holding_up(states, ())],
        "quiet": [rank for rank, at in written.items() if at < max(written.values()) - QUIET_S],
        "sign_of_life_s": max(0.0, time.time() - max(written.values())) if written else None,
        "hang": hang or None,
        "stacks": str(run / STACKS) if hang else None,
    }


def rank_states(run: Path) -> list[RankState]:
    """What each rank said last. Rank 0 removes what was said by ranks that there are no more."""
    found = (parse_state(read_bytes(path)) for path in sorted((run / RANKS).glob("rank_*.json")))
    return [state for state in found if state is not None]


def planned_steps(run: Path) -> int | None:
    """run.steps; None where the record of the run is not there or damaged."""
    try:
        return int(read_record(run)["config"]["run"]["steps"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def state_of(who: str | None, states: Sequence[RankState], hang: Mapping[str, Any], started: bool) -> str:
    """One of the words that launch/status.py explains."""
    if who is not None:
        return "training" if started else "starting"
    if hang:
        return "hung"
    if any(state.failed for state in states):
        return "failed"
    if any(state.ended is None for state in states):
        return "killed"
    if any(state.ended == "preempted" for state in states):
        return "preempted"
    return "finished" if states else "idle"


def is_loading(state: RankState) -> bool:
    """Whether a rank of a run that goes on has not come to its first step yet."""
    return state.ended is None and state.phase == "start"


def read_hang(run: Path) -> dict[str, Any]:
    """What the watchdog left behind (hang.json); empty where there is none, or where it is just being written."""
    try:
        found = json.loads(read_bytes(run / RANKS / "hang.json"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def newest_values(metrics: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last number of each tag."""
    newest: dict[str, float] = {}
    for line in metrics:
        newest |= {tag: value for tag, value in line.items() if value is not None}
    newest.pop("step", None)
    return newest


def recent(metrics: Sequence[Mapping[str, Any]], tag: str) -> list[tuple[int, float | None]]:
    """The last (step, value) of a tag; None for what is no finite number."""
    return [(line["step"], line[tag]) for line in metrics if tag in line][-RECENT:]


def check_checkpoints(run: Path) -> tuple[dict[str, Any] | None, dict[str, list[str]]]:
    """The newest sound checkpoint, and by path what is wrong with those that are newer or were put aside."""
    damaged = {str(path): ["was put aside when the run went on"] for path in (run / CHECKPOINTS).glob("damaged-step_*")}
    for found, wrong in checked(run):
        if not wrong:
            return {"path": str(found.path), "step": found.step}, damaged
        damaged[str(found.path)] = wrong
    return None, damaged
