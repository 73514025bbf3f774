"""Show what a run is doing, or how it ended; during the run or afterwards. Of several, a line for each.

python launch/status.py runs/books_64k
python launch/status.py runs/books_64k --json
python launch/status.py runs/sweep/*            a line each: state, step, newest loss, when it ends, by whom
python launch/status.py runs/sweep/* --json     a line each: the object that one run has

It shows who trains there, the step, which rank is furthest behind and where, the speed and the time left, recent
losses, and the newest checkpoint that is sound: every byte of it is read. Nothing is written, so it may be asked at any
time, on any machine that sees the folder.

Of several runs the state is one word: training, starting, preempted, finished, failed, hung, killed (no exit was
recorded) or idle (no rank has left a word). When one ends is reckoned without evaluations and checkpoints. A folder
that is no run is named on standard error, after the lines of the others.

The exit code is 0 whatever the runs do, and 2 where one of the folders is no run. So it means the same whether a
pattern finds one run or many, and a script that waits for runs, or looks for those that failed, reads the "state" of
--json.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.output import BAD_INPUT, as_path, counted, exit_code, listed
from trainer.config import ConfigError
from trainer.ranks import SHOWN, RankState
from trainer.status import QUIET_S, facts
from trainer.terminal import duration

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
RUNNING = ("training", "starting")
WORDLESS = "ended without a word"
ADDRESS = re.compile(r"\[[\w.:%]+\]:\d+")
"""As gloo names the other end of a connection, which each rank has another of."""
LOSSES = {"train": "train loss", "eval": "held out"}


def text(found: Mapping[str, Any]) -> str:
    """The facts for people: one on a line."""
    states = [RankState(**state) for state in found["ranks"]]
    running = found["state"] in RUNNING
    lines = [("run", found["run"]), ("state", STATES[found["state"]])]
    if running:
        lines += [("by", found["holder"])]
    lines += [("step", progress(found))]
    lines += ranks_at_work(found, states) if running else endings(states)
    lines += figures(found["newest"], found["recent"])
    lines += [("checkpoint", f"{found['checkpoint']['path']}, sound" if found["checkpoint"] else "none that is sound")]
    for path, wrong in found["damaged"].items():
        lines += [("damaged", f"{path}: {listed(wrong, 1, '; ')}")]
    if found["hang"]:
        verdict = found["hang"].get("verdict") or "the rank that noticed it did not come to say more"
        lines += [("hang", verdict.replace("\n", "\n" + 12 * " ")), ("stacks", found["stacks"])]
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


def line(found: Mapping[str, Any], width: int) -> str:
    """The facts on one of several runs, whose names take so many columns."""
    said = [f"step {steps_done(found)}", *newest_loss(found["recent"])]
    left = time_left(found)
    said += [f"ends in {left}"] if left else []
    said += [f"damaged checkpoints: {len(found['damaged'])}"] if found["damaged"] else []
    said += [f"by {found['holder'].partition(', since ')[0]}"] if found["state"] in RUNNING else []
    return f"{found['run']:<{width}}  {found['state']:<{max(map(len, STATES))}}  {', '.join(said)}"


def progress(found: Mapping[str, Any]) -> str:
    left = time_left(found)
    return steps_done(found) + (f", {left} left without evaluations and checkpoints" if left else "")


def steps_done(found: Mapping[str, Any]) -> str:
    done, steps = found["step"], found["steps"]
    return f"{done:,}" if steps is None else f"{done:,} of {steps:,} ({done / steps:.1%})"


def time_left(found: Mapping[str, Any]) -> str | None:
    """Until the last step; None where nobody trains, or it is not known."""
    is_known = found["state"] == "training" and found["left_s"] is not None
    return duration(found["left_s"]) if is_known else None


def ranks_at_work(found: Mapping[str, Any], states: Sequence[RankState]) -> list[tuple[str, str]]:
    """How many there are, and those that are behind."""
    if not states:
        return []
    n_ranks, n_hosts = states[0].world_size, len({state.host for state in states})
    lines = [
        ("ranks", f"{n_ranks} on {counted(n_hosts, 'host')}, last sign of life {found['sign_of_life_s']:.0f} s ago")
    ]
    behind = [state for state in states if state.rank in found["furthest_back"]]
    label = "all" if len(behind) == len(states) else "last"
    lines += [(label, f"{state.name}: {state.in_phase_s:.1f} s {state.place}") for state in behind[:SHOWN]]
    if missing := sorted(set(range(n_ranks)) - {state.rank for state in states}):
        lines.append(("missing", f"nothing was heard yet of {ranks(missing)}"))
    if found["quiet"]:
        lines.append(("quiet", f"no sign of life from {ranks(found['quiet'])} for {QUIET_S:.0f} s and more"))
    return lines


def endings(states: Sequence[RankState]) -> list[tuple[str, str]]:
    """What became of the ranks, those of one fate on one line; where one was, if that says anything.

    First who ended without a word, then by number: errors of many ranks are mostly that another is gone.
    """
    fates: dict[str, list[RankState]] = {}
    for state in states:
        fates.setdefault(ADDRESS.sub("another", state.ended or WORDLESS), []).append(state)
    found = sorted(fates.items(), key=lambda of: (of[0] != WORDLESS, len(of[1])))
    lines = [("ended", f"{ranks([state.rank for state in same])}: {fate}{place(fate, same)}") for fate, same in found]
    more = [state.rank for _, same in found[SHOWN:] for state in same]
    return lines[:SHOWN] + (
        [("ended", f"{ranks(more)}: in {counted(len(found) - SHOWN, 'other way')}")] if more else []
    )


def place(fate: str, same: Sequence[RankState]) -> str:
    """Where the ranks of one fate were, if that says anything."""
    if len(same) > 1 or fate in ("finished", "preempted"):
        return ""
    # Who was killed wrote this some seconds before.
    return f"{' ' if same[0].ended else ', last seen '}{same[0].place}"


def ranks(numbers: Sequence[int]) -> str:
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {listed(list(map(str, numbers)), SHOWN)}"


def figures(
    newest: Mapping[str, float], losses: Mapping[str, Sequence[tuple[int, float | None]]]
) -> list[tuple[str, str]]:
    """Speed, losses and what went wrong with steps."""
    lines = []
    if "speed/tokens_per_s" in newest and "speed/step_s" in newest:
        lines.append(("speed", f"{newest['speed/tokens_per_s']:,.0f} tokens/s, {newest['speed/step_s']:.3g} s a step"))
    for split, name in LOSSES.items():
        if values := losses[f"{split}/loss"]:
            step, value = values[-1]
            bits = newest.get(f"{split}/bits_per_byte")
            per_byte = f", {bits:.4f} bits per byte" if bits is not None and value is not None else ""
            lines.append((name, f"{at_step(step, value)}{per_byte}  {sparkline([each for _, each in values])}"))
    if "train/skipped_steps" in newest:
        skipped, spikes = (newest.get(f"train/{name}", 0.0) for name in ("skipped_steps", "spikes"))
        counts = f"steps skipped: {skipped:.0f}, spikes of the loss: {spikes:.0f}"
        lines.append(("trouble", f"{counts}, by step {losses['train/loss'][-1][0]:,}"))  # on the same lines
    return lines


def newest_loss(losses: Mapping[str, Sequence[tuple[int, float | None]]]) -> list[str]:
    """The last one, of held-out rows if both are of one step; none where there is none yet."""
    last = [(name, *losses[f"{split}/loss"][-1]) for split, name in LOSSES.items() if losses[f"{split}/loss"]]
    return [f"{name} {at_step(step, value)}" for name, step, value in sorted(last, key=lambda each: each[1])[-1:]]


def at_step(step: int, value: float | None) -> str:
    number = f"{value:.4f}" if value is not None else "not finite"
    return f"{number} at step {step:,}"


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
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--json", action="store_true", help="everything as JSON, an object for each run, for programs")
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) > 1:
        return show_each(arguments.runs, arguments.json)
    found = facts(arguments.runs[0])
    print(json.dumps(found, indent=1) if arguments.json else text(found))
    return 0


def show_each(paths: Sequence[Path], as_json: bool) -> int:
    """A line for each run as soon as it is known, then what is wrong with the others; the exit code."""
    width = max(len(str(path)) for path in paths)
    errors: list[Exception] = []
    for path in paths:
        try:
            found = facts(path)
        except (ConfigError, OSError) as error:
            errors.append(error)
        else:
            print(json.dumps(found) if as_json else line(found, width), flush=True)
    for each in errors:
        print(f"error: {each}", file=sys.stderr)
    return BAD_INPUT if errors else 0


def main() -> int:
    return exit_code(lambda: run(parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
