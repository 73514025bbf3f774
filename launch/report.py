"""Say in a few lines how a run went, or how several compare, and draw the curves.

Beside each first and last value is its step: training steps are reported every run.log_every, evaluations every
run.eval_every, and a run that was stopped in between has done more steps than its last line says.

python launch/report.py runs/demo/run
python launch/report.py runs/demo/run --plot loss.png
python launch/report.py runs/one runs/two runs/three --plot losses.png        a line each, and what differs

Where several are given, what is no run, or has no training step yet, is left out.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median_high, stdev
from typing import Any, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.output import exit_code, reader_may_leave, table
from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.config import ConfigError
from trainer.curves import HELD_OUT, Curves, Point, common_step, differences, read_curves, repetitions, unlike
from trainer.scoring import source_tag
from trainer.terminal import see_curves

Value = TypeVar("Value", bound=str | None)

LONGEST = 40
"""Characters of a setting that are shown, where runs are compared."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the bits per byte by step (.png or .svg)")
    return parser.parse_args()


def read_all(paths: Sequence[Path]) -> list[Curves]:
    """Of several, what is no run, or has no step yet, is left out with a note.

    Raises ConfigError where there is no other, or a single one is no run.
    """
    if len(paths) == 1:
        return [read_curves(paths[0])]
    runs = []
    for path in paths:
        try:
            runs.append(read_curves(path))
        except ConfigError as error:
            print(f"note: left out: {error}", file=sys.stderr)
    if not runs:
        raise ConfigError(f"none of these {len(paths)} is a run that can be reported")
    return runs


def unigram(run: Curves, width: int) -> str:
    """What a unigram model says of the held-out rows, or why that is not known: the rest of a report needs no store."""
    data = run.config.data
    try:
        for path, fingerprint in run.fingerprints():
            if Store.open(path).manifest.fingerprint != fingerprint:
                raise DataError(f"{path} is not the store that it was: it was built anew, or added to")
        score = unigram_score(Store.open(data.store), data, run.config.run.eval_rows)
    except DataError as error:
        return f"unigram model, held out: not known, since {error}"
    return f"{row(width, 'unigram model, held out:', last=f'{score.bits_per_byte:.4f}')} bits per byte"


def report(run: Curves) -> str:
    """The text of the report on a run."""
    config, evaluations, said = run.config, run.points(HELD_OUT), list(scores(run))
    width = max(32, *(len(name) + 1 for name, _ in said))
    lines = [row(width, "", "first", "step", "last", "step")]
    lines += [row(width, name, *cells(points[0]), *cells(points[-1])) for name, points in said]
    if (best := run.best()) and best[0] != evaluations[-1][0]:
        lines.append(row(width, "held out, best, bits per byte", "", "", *cells(best)))
    is_evaluated = bool(run.column("eval/loss") and config.run.eval_every)  # by what is configured now
    if is_evaluated:
        lines.append(unigram(run, width))
    if since := run.since(HELD_OUT):
        lines.append(f"evaluations before step {since} were of other rows, or by other rounds, and are left out")
    if config.data.mixture and is_evaluated:
        lines.append(f"held out is {config.data.eval_split!r} of {config.data.store}, batches are of the mixture")
    lines += [row(width, name, last=value) for name, value in costs(run)]
    return "\n".join([*lines, "", f"the run lies in {run.path}", f"see its curves:  {see_curves(run.path)}"])


def row(width: int, name: str, first: str = "", first_step: str = "", last: str = "", last_step: str = "") -> str:
    """A line of the report: reports and evaluations are not of the same steps, so each value has its own beside it."""
    return f"{name:<{width}}{first:>12}{first_step:>8}{last:>12}{last_step:>8}".rstrip()


def cells(point: Point) -> tuple[str, str]:
    """A value and its step; "none" for what was not finite."""
    step, value = point
    return "none" if value is None else f"{value:.4f}", str(step)


def scores(run: Curves) -> Iterator[tuple[str, list[Point]]]:
    """What is predicted how well: a name, and its values in order, at least one."""
    tags = sorted({tag for values in run.metrics for tag in values})
    names: dict[str, str] = {}
    for split, name in (("train", "training batch"), ("eval", "held out")):
        names |= {f"{split}/loss": f"{name}, nats per token", f"{split}/bits_per_byte": f"{name}, bits per byte"}
    positions = [tag for tag in tags if tag.startswith("eval/loss_at/")]
    names |= {tag: f"  up to {tag.split('/')[-1].lstrip('0')} tokens before" for tag in positions}
    names["eval/lsh_gain"] = "  more without LSH attention"
    for name in sorted(run.config.data.mixture):
        names[source_tag(name, "bits_per_byte")] = f"held out of {name}, bits per byte"
    for tag, name in names.items():
        if said := run.points(tag):
            yield name, said
    if recovered := run.recovered_mass():
        yield "dense attention recovered", recovered


def costs(run: Curves) -> Iterator[tuple[str, str]]:
    """What the run took, and what went wrong in it: a name and a value."""
    yield "tokens per second (median)", f"{median_high(run.column('speed/tokens_per_s')):,.0f}"
    if shares := run.column("speed/mfu"):
        yield "of the devices' peak (median)", f"{median_high(shares):.1%}"
    yield "peak memory of a process, GiB", f"{max(run.column('memory/peak_gib')):.2f}"
    if saves := run.column("speed/save_share"):
        yield "share of checkpoints", f"{saves[-1]:.1%}"
    for tag, name in (("train/skipped_steps", "steps skipped"), ("train/spikes", "spikes of the loss")):
        if counts := run.column(tag):
            yield name, f"{counts[-1]:.0f}"


def comparison(runs: Sequence[Curves]) -> str:
    """The text of the report on several runs, best first; each has a number, since names may be long."""
    at = common_step(runs)

    def key(run: Curves) -> float:
        score = run.best() if at is None else (at, dict(run.points(HELD_OUT))[at])
        return math.inf if score is None or score[1] is None else score[1]

    runs = sorted(runs, key=key)
    sources = sorted({name for run in runs for name in run.config.data.eval_splits})
    there = [] if at is None else [f"at step {at}", *(f"of {name}" for name in sources)]
    heads = ["run", "steps", "held out", *there, "best", "step", "tokens/s", "GiB"]
    rows = [[f"[{i}] {run.path}", *numbers(run, at, sources)] for i, run in enumerate(runs, start=1)]
    lines = [table([heads, *rows])]
    common = "" if at is None else ", at the last that all have"
    lines += ["", f"held out: bits per byte, at each run's last evaluation{common}, and at its best"]
    if at is None:
        lines.append("there is no step, but for the beginning, at which all were evaluated")
    for score, of_rows in unlike(runs, sources).items():
        alike = ", ".join(runs for rows, runs in numbered(of_rows).items() if rows)  # where there are any
        lines.append(f"note: not all were scored on the same rows: what stands below {score!r} compares within {alike}")
    lines += seeds(runs, [key(run) for run in runs], "at their best" if at is None else f"at step {at}")
    if different := differences(runs):
        width = max(map(len, different))
        lines += ["", "what differs:", *(f"{name:<{width}}  {by_value(each)}" for name, each in different.items())]
    return "\n".join(lines)


def seeds(runs: Sequence[Curves], scores: Sequence[float], where: str) -> list[str]:
    """What chance makes of a score: mean and standard deviation of runs that differ in their seeds alone."""
    lines = []
    for places in repetitions(runs):
        found = [scores[place] for place in places]
        if all(map(math.isfinite, found)):
            named = " ".join(f"[{place + 1}]" for place in places)
            lines.append(f"{named} differ in seeds alone: {mean(found):.4f} ± {stdev(found):.4f} bits per byte {where}")
    return lines


def numbers(run: Curves, at: int | None, sources: Sequence[str]) -> list[str]:
    """Of a run in the order of the heads; empty where there is no such thing."""
    evaluations, best = run.points(HELD_OUT), run.best()
    curves = [dict(run.points(tag)) for tag in (HELD_OUT, *(source_tag(name, "bits_per_byte") for name in sources))]
    there = [cells((at, curve[at]))[0] if at in curve else "" for curve in curves]
    return [
        str(run.points("train/loss")[-1][0]),
        cells(evaluations[-1])[0] if evaluations else "",
        *([] if at is None else there),
        *(cells(best) if best else ("", "")),
        f"{median_high(run.column('speed/tokens_per_s')):,.0f}",
        f"{max(run.column('memory/peak_gib')):.2f}",
    ]


def numbered(values: Sequence[Value]) -> dict[Value, str]:
    """The numbers of the runs that have each value."""
    return {
        value: " ".join(f"[{number}]" for number, other in enumerate(values, start=1) if other == value)
        for value in dict.fromkeys(values)
    }


def by_value(values: Sequence[str]) -> str:
    """Which runs have which value of a setting."""
    # Whole where their beginnings are alike.
    say = shortened if len({*map(shortened, values)}) == len({*values}) else str
    return "; ".join(f"{say(value)} in {runs}" for value, runs in numbered(values).items())


def shortened(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"


def plot(runs: Sequence[Curves], file: Path) -> None:
    """Bits per byte of training batches and of the held-out rows, by step."""
    from trainer.figures import Figure  # matplotlib's, which takes a while: only a drawing needs it

    axes: Any
    legend_lines = len(runs) + 1 if len(runs) > 1 else 0  # above the picture
    figure = Figure(figsize=(7, 3.5 + 0.22 * legend_lines), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if len(runs) == 1:
        draw(axes, runs[0], "train", "-", label="training batches")
        draw(axes, runs[0], "eval", "o--", label="held-out documents")
        axes.legend()
    else:
        shown = []
        for number, run in enumerate(runs):
            shown += draw(axes, run, "train", "-", color=f"C{number}", alpha=0.3)
            # matplotlib leaves out what begins with "_", and reads "$" as mathematics.
            name = f" {run.path}".replace("$", r"\$")
            shown += draw(axes, run, "eval", "o--", color=f"C{number}", label=name)
        if shown:  # their beginnings would leave no room for what differs
            last = max(step for step, _ in shown)
            later = [bits for step, bits in shown if 10 * step >= last]
            axes.set_ylim(min(later) * 0.98, max(later) * 1.02)
        figure.legend(title="held-out documents (faint: training batches)", loc="outside upper center")
    figure.savefig(file, dpi=150)


def draw(axes: Any, run: Curves, split: str, style: str, **options: Any) -> list[tuple[int, float]]:
    """A curve; its points."""
    points = [(step, bits) for step, bits in run.points(f"{split}/bits_per_byte") if bits is not None]
    axes.plot(*zip(*points, strict=True) if points else ((), ()), style, **options)
    return points


def run(arguments: argparse.Namespace) -> None:
    runs = read_all(arguments.runs)
    text = report(*runs) if len(runs) == 1 else comparison(runs)
    with reader_may_leave():  # the drawing is wanted all the same
        print(text)
    if arguments.plot:
        try:
            plot(runs, arguments.plot)
        except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not write
            raise ConfigError(f"cannot draw {arguments.plot}: {error}") from None
        print(f"drew {arguments.plot}")


def main() -> int:
    return exit_code(partial(run, parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
