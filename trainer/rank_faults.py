"""Ranks that hold the others up because they are slow, or that are gone."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from trainer import checkpoint, ranks
from trainer.ranks import RankState

SLOW = 1.5
"""A rank that was busy for so many times the median of all ranks holds them up,"""
SLOW_S = 0.1
"""if that is so many seconds longer: of less there is nothing to be made."""
LOOK_S = 1.0
"""How long to look for a rank that is gone: its connections close a moment before the process is no more."""


@dataclass(frozen=True)
class Slowest:
    """The rank that was busy for the longest."""

    rank: int
    over_median: float
    """Its time by the median of all ranks; for an even number of ranks the median is the lower of the middle two."""
    line: str | None
    """What to say if it holds the others up."""


def slow_ranks(busy_s: Sequence[float], hosts: Sequence[str]) -> Slowest:
    """Which rank is slowest, and by how much.

    busy_s: seconds by rank, of its own data and forward passes over the same steps, without the exchanges of ranks that
    share sequences, which wait for each other there; hosts: their names, by rank.

    Only what a rank does by itself tells it apart. Backward passes and updates wait for each other, and under ZeRO-3
    forward passes do too, layer by layer: they last equally long on all ranks, and what is left to be seen is a rank
    that is slow with its data. There, a ratio near 1 does not say that no rank computes slowly.
    """
    rank = max(range(len(busy_s)), key=busy_s.__getitem__)
    typical = median_low(busy_s)
    ratio = busy_s[rank] / typical if typical > 0 else 1.0
    if ratio <= SLOW or busy_s[rank] - typical <= SLOW_S:
        return Slowest(rank, ratio, None)
    times = f"busy for {busy_s[rank]:.3g} s where the median is {typical:.3g} s"
    return Slowest(rank, ratio, f"rank {rank} on {hosts[rank]} is slow: {times} ({ratio:.1f} times)")


def lost_ranks(run_dir: Path, world_size: int) -> str:
    """What to add to the error of a collective that broke: which ranks are gone, where they were last seen, and how to
    go on; empty if none is. A rank that was killed is seen to be by those on its own host alone."""
    deadline = time.monotonic() + LOOK_S
    while not (lost := [state for state in ranks.read_states(run_dir, world_size) if _is_gone(state)]):
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.05)
    lines = [f"{state.name} {_end_of(state)}; last seen {state.place}" for state in lost[: ranks.SHOWN]]
    if len(lost) > ranks.SHOWN:
        lines.append(f"and {len(lost) - ranks.SHOWN} more")
    return "\n".join([*lines, checkpoint.way_on(run_dir)])


def _is_gone(state: RankState) -> bool:
    """Whether a rank failed, or its process is no more; Linux tells."""
    if state.ended is not None or state.host != socket.gethostname() or not Path("/proc/self").exists():
        return state.failed
    status = ranks.read_bytes(Path(f"/proc/{state.pid}/status"))
    return not status or b"State:\tZ" in status


def _end_of(state: RankState) -> str:
    return f"has ended ({state.ended})" if state.ended else "was killed, perhaps for want of memory"
