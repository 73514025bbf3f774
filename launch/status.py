"""Show what a run is doing, or how it ended; during the run or afterwards.

python launch/status.py runs/books_64k
python launch/status.py runs/books_64k --json

It shows who trains there, the step, which rank is furthest behind and where, the speed and the time left, recent
losses, and the newest checkpoint that is sound: every byte of it is read. Nothing is written, so it may be asked at any
time, on any machine that sees the folder. The exit code is 0 whatever the run does, and 2 where there is no run.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.output import reader_may_leave
from trainer.checkpoint import problems, published
from trainer.config import ConfigError
from trainer.presence import holder
from trainer.ranks import SHOWN, RankState, holding_up, parse_state, read_bytes, state_path
from trainer.terminal import duration

TAIL_BYTES = 2**22
"""How much of metrics.jsonl is read, from its end: thousands of lines."""
RECENT = 60
"""Losses that are shown, at most."""
QUIET_S = 30.0
"""A rank that wrote nothing for so much longer than others is pointed out."""
BARS = "▁▂▃▄▅▆▇█"
STATES = {
    "training": "training",
    "starting": "starting: no step is done since it began",
    "hung": "not running: it hung, and its watchdog ended it",
    "failed": "not running: it failed",
    "killed": "not running: no exit was recorded: it was killed, or its node failed",
    "preempted": "not running: it was preempted; the same command goes on",
    "finished": "not running: it is finished",
    "idle": "not running",
}


def facts(run: Path) -> dict[str, Any]:
    """All that can be found out, as plain JSON values. Raises ConfigError where there is no run."""
    if not any((run / name).exists() for name in ("run.json", "metrics.jsonl", "checkpoints", "ranks")):
        raise ConfigError(
            f"{run} is not the folder of a run: it has neither run.json nor metrics, checkpoints or ranks; give what "
            "run.dir was"
        )
    who = holder(run)
    states = rank_states(run)
    steps, hang = planned_steps(run), read_json(run / "ranks" / "hang.json")
    metrics = list(read_metrics(run / "metrics.jsonl"))
    newest = newest_values(metrics)
    sound, damaged = check_checkpoints(run)
    # A run that was stopped between two lines (run.log_every) has its last step in the checkpoint only.
    done = max([0, *(line["step"] for line in metrics), *([sound["step"]] if sound else [])])
    left_s = (steps - done) * newest["speed/step_s"] if steps is not None and "speed/step_s" in newest else None
    paths = {state.rank: state_path(run, state.rank) for state in states}  # a new start removes some
    written = {rank: path.stat().st_mtime for rank, path in paths.items() if path.exists()}  # by one clock
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
        "stacks": str(run / "stacks") if hang else None,
    }


def rank_states(run: Path) -> list[RankState]:
    """What each rank said last. Rank 0 removes what was said by ranks that there are no more."""
    found = (parse_state(read_bytes(path)) for path in sorted((run / "ranks").glob("rank_*.json")))
    return [state for state in found if state is not None]


def planned_steps(run: Path) -> int | None:
    """run.steps; None where the record of the run is not there or damaged."""
    try:
        return int(read_json(run / "run.json")["config"]["run"]["steps"])
    except (KeyError, TypeError, ValueError):
        return None


def state_of(who: str | None, states: Sequence[RankState], hang: Mapping[str, Any], started: bool) -> str:
    """One of STATES."""
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
    return state.ended is None and state.part == "start"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or where it is just being written."""
    try:
        found = json.loads(read_bytes(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The last lines; one that is not whole is left out."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, 2) - TAIL_BYTES)
            file.seek(begin)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    for line in lines[bool(begin) : -1]:
        try:
            values = json.loads(line, parse_constant=lambda _: None)  # NaN and the like, which are no JSON
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


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
    damaged = {
        str(path): ["was put aside when the run went on"] for path in (run / "checkpoints").glob("damaged-step_*")
    }
    for found in reversed(published(run)):
        wrong = problems(found.path)
        if not wrong:
            return {"path": str(found.path), "step": found.step}, damaged
        if found.path.exists():  # the run may have removed it meanwhile
            damaged[str(found.path)] = wrong
    return None, damaged


def text(found: Mapping[str, Any]) -> str:
    """The facts for people: one on a line."""
    states = [RankState(**state) for state in found["ranks"]]
    running = found["state"] in ("training", "starting")
    lines = [("run", found["run"]), ("state", STATES[found["state"]])]
    if running:
        lines += [("by", found["holder"])]
    lines += [("step", progress(found))]
    lines += ranks_at_work(found, states) if running else endings(states)
    lines += figures(found["newest"], found["recent"])
    lines += [("checkpoint", f"{found['checkpoint']['path']}, sound" if found["checkpoint"] else "none that is sound")]
    for path, wrong in found["damaged"].items():
        more = f"; and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        lines += [("damaged", f"{path}: {wrong[0]}{more}")]
    if found["hang"]:
        verdict = found["hang"].get("verdict") or "the rank that noticed it did not come to say more"
        lines += [("hang", verdict.replace("\n", "\n" + 12 * " ")), ("stacks", found["stacks"])]
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


def progress(found: Mapping[str, Any]) -> str:
    done, steps = found["step"], found["steps"]
    if steps is None:
        return f"{done:,}"
    left = found["left_s"] if found["state"] == "training" else None
    remaining = f", {duration(left)} left without evaluations and checkpoints" if left is not None else ""
    return f"{done:,} of {steps:,} ({done / steps:.1%}){remaining}"


def ranks_at_work(found: Mapping[str, Any], states: Sequence[RankState]) -> list[tuple[str, str]]:
    """How many there are, and those that are behind."""
    if not states:
        return []
    n_ranks, n_hosts = states[0].world_size, len({state.host for state in states})
    hosts = "1 host" if n_hosts == 1 else f"{n_hosts} hosts"
    lines = [("ranks", f"{n_ranks} on {hosts}, last sign of life {found['sign_of_life_s']:.0f} s ago")]
    behind = [state for state in states if state.rank in found["furthest_back"]]
    label = "all" if len(behind) == len(states) else "last"
    lines += [(label, f"{state.name}: {state.in_part_s:.1f} s {state.place}") for state in behind[:SHOWN]]
    if missing := sorted(set(range(n_ranks)) - {state.rank for state in states}):
        lines.append(("missing", f"nothing was heard yet of {ranks(missing)}"))
    if found["quiet"]:
        lines.append(("quiet", f"no sign of life from {ranks(found['quiet'])} for {QUIET_S:.0f} s and more"))
    return lines


def endings(states: Sequence[RankState]) -> list[tuple[str, str]]:
    """What became of the ranks, those of one fate on one line; where one was, if that says anything."""
    fates: dict[str, list[RankState]] = {}
    for state in states:
        fates.setdefault(state.ended or "ended without a word", []).append(state)
    alone = {fate for fate, same in fates.items() if len(same) == 1 and fate not in ("finished", "preempted")}
    places = {fate: f" {same[0].place}" if fate in alone else "" for fate, same in fates.items()}
    return [("ended", f"{ranks([state.rank for state in same])}: {fate}{places[fate]}") for fate, same in fates.items()]


def ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN])) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {shown}"


def figures(
    newest: Mapping[str, float], losses: Mapping[str, Sequence[tuple[int, float | None]]]
) -> list[tuple[str, str]]:
    """Speed, losses and what went wrong with steps."""
    lines = []
    if "speed/tokens_per_s" in newest and "speed/step_s" in newest:
        lines.append(("speed", f"{newest['speed/tokens_per_s']:,.0f} tokens/s, {newest['speed/step_s']:.3g} s a step"))
    for split, name in (("train", "train loss"), ("eval", "held out")):
        if values := losses[f"{split}/loss"]:
            step, value = values[-1]
            bits = newest.get(f"{split}/bits_per_byte")
            per_byte = f", {bits:.4f} bits per byte" if bits is not None and value is not None else ""
            number = f"{value:.4f}" if value is not None else "not finite"
            lines.append((name, f"{number} at step {step:,}{per_byte}  {sparkline([each for _, each in values])}"))
    if "train/skipped_steps" in newest:
        skipped, spikes = (newest.get(f"train/{name}", 0.0) for name in ("skipped_steps", "spikes"))
        counted = f"steps skipped: {skipped:.0f}, spikes of the loss: {spikes:.0f}"
        lines.append(("trouble", f"{counted}, by step {losses['train/loss'][-1][0]:,}"))  # on the same lines
    return lines


def sparkline(values: Sequence[float | None]) -> str:
    """A bar for each value, between the least and the largest; a gap for what is no finite number."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if len(finite) < 2:
        return ""
    least, span = min(finite), (max(finite) - min(finite)) or 1.0
    heights = [" " if value is None else BARS[int((value - least) / span * (len(BARS) - 1) + 0.5)] for value in values]
    return "".join(heights)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--json", action="store_true", help="one JSON object with everything, for programs")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        found = facts(arguments.run)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with reader_may_leave():
        print(json.dumps(found, indent=1) if arguments.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
