"""Say in a few lines how a run went, or how several compare, and draw the curves.

Beside each first and last value is its step: training steps are reported every run.log_every, evaluations every
run.eval_every, and a run that was stopped in between has done more steps than its last line says.

python launch/report.py runs/demo/run
python launch/report.py runs/demo/run --plot loss.png
python launch/report.py runs/one runs/two runs/three --plot losses.png        a line each, and what differs
python launch/report.py runs/rounds_* --json rounds.json                      the same as values, for programs

Of runs that differ in seeds alone (run.seed, model.seed; what changes no score may differ too) there is a line for each
group, and what it has more than the group of the run that was given first. Where several are given, what is no run, or
has no training step yet, is left out.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median_high
from typing import Any, TypeVar

from data_pipeline.errors import DataError
from data_pipeline.output import exit_code, reader_may_leave, table
from data_pipeline.staging import check_json
from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.config import ConfigError
from trainer.curve_plot import plot_groups, plot_run, plot_runs
from trainer.curves import ABSENT, HELD_OUT, Curves, Point, common_step, differences, read_curves, score, unlike
from trainer.groups import Group, Spread, grouped
from trainer.scoring import source_tag
from trainer.terminal import see_curves

Value = TypeVar("Value", bound=str | None)

LONGEST = 40
"""Characters of a setting that are shown, where runs are compared."""
LONGEST_LABEL = 100
"""Characters of the settings in a line of a picture's legend."""


@dataclass(frozen=True)
class Comparison:
    """Of several runs."""

    runs: Sequence[Curves]
    """The best first."""
    at: int | None
    """The step at which they are compared; None: each at its best."""
    differences: dict[str, list[str]]
    """What is not the same for all runs, by name: of each."""
    sources: Sequence[str]
    """Stores of a mixture that some of them are evaluated on too."""
    groups: Sequence[Group]
    """In the order in which they were given; none where no runs differ in seeds alone."""
    notes: Sequence[str]
    """What a reader must know not to be misled."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: what run.dir was")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the bits per byte by step (.png or .svg)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what is said as values")
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


def unigram(run: Curves) -> float | DataError:
    """Bits per byte of a unigram model on the held-out rows, or why they are not known: all else needs no store."""
    data = run.config.data
    try:
        for path, fingerprint in run.fingerprints():
            if Store.open(path).manifest.fingerprint != fingerprint:
                raise DataError(f"{path} is not the store that it was: it was built anew, or added to")
        return unigram_score(Store.open(data.store), data, run.config.run.eval_rows).bits_per_byte
    except DataError as error:
        return error


def report(run: Curves) -> tuple[str, dict[str, Any]]:
    """The report on a run, as a text and as values: those of `run_values`, `unigram_bits_per_byte` of a run that is
    evaluated (null where it is not known), and `notes`."""
    config, evaluations, said = run.config, run.points(HELD_OUT), list(scores(run))
    width = max(32, *(len(name) + 1 for _, name, _ in said))
    values, notes = run_values(run), list[str]()
    lines = [row(width, "", "first", "step", "last", "step")]
    lines += [row(width, name, *cells(points[0]), *cells(points[-1])) for _, name, points in said]
    if (best := run.best()) and best[0] != evaluations[-1][0]:
        lines.append(row(width, "held out, best, bits per byte", "", "", *cells(best)))
    is_evaluated = bool(run.column("eval/loss") and config.run.eval_every)  # by what is configured now
    if is_evaluated:
        bits = unigram(run)
        if isinstance(bits, DataError):
            notes.append(f"unigram model, held out: not known, since {bits}")
        else:
            lines.append(f"{row(width, 'unigram model, held out:', last=f'{bits:.4f}')} bits per byte")
        values["unigram_bits_per_byte"] = None if isinstance(bits, DataError) else bits
    if since := run.since(HELD_OUT):
        notes.append(f"evaluations before step {since} were of other rows, or by other rounds, and are left out")
    if config.data.mixture and is_evaluated:
        notes.append(f"held out is {config.data.eval_split!r} of {config.data.store}, batches are of the mixture")
    lines += notes
    lines += [row(width, name, last=f"{value:{form}}") for _, name, value, form in costs(run)]
    lines += ["", f"the run lies in {run.path}", f"see its curves:  {see_curves(run.path)}"]
    return "\n".join(lines), {**values, "notes": notes}


def run_values(run: Curves) -> dict[str, Any]:
    """What is said of a run: `scores` by tag, `best` of the held-out rows (null without any), and what it cost."""
    spans = {tag: {"first": point(points[0]), "last": point(points[-1])} for tag, _, points in scores(run)}
    best = run.best()
    values = {"run": str(run.path), "steps": n_steps(run), "scores": spans, "best": best and point(best)}
    since = {"evaluations_since": run.since(HELD_OUT)}
    return {**values, **since, **{key: value for key, _, value, _ in costs(run)}}


def point(found: Point) -> dict[str, float | None]:
    """A value and its step; null for what was not finite."""
    return {"step": found[0], "value": found[1]}


def n_steps(run: Curves) -> int:
    return run.points("train/loss")[-1][0]


def row(width: int, name: str, first: str = "", first_step: str = "", last: str = "", last_step: str = "") -> str:
    """A line of the report: reports and evaluations are not of the same steps, so each value has its own beside it."""
    return f"{name:<{width}}{first:>12}{first_step:>8}{last:>12}{last_step:>8}".rstrip()


def cells(point: Point) -> tuple[str, str]:
    """A value and its step; "none" for what was not finite."""
    step, value = point
    return "none" if value is None else f"{value:.4f}", str(step)


def scores(run: Curves) -> Iterator[tuple[str, str, list[Point]]]:
    """What is predicted how well: a tag, its name, and its values in order, at least one."""
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
            yield tag, name, said
    if recovered := run.recovered_mass():
        yield "lsh/recovered_mass", "dense attention recovered", recovered


def costs(run: Curves) -> Iterator[tuple[str, str, float, str]]:
    """What the run took, and what went wrong in it: a key, a name, a value and its format."""
    yield "tokens_per_s", "tokens per second (median)", median_high(run.column("speed/tokens_per_s")), ",.0f"
    if shares := run.column("speed/mfu"):
        yield "mfu", "of the devices' peak (median)", median_high(shares), ".1%"
    yield "peak_gib", "peak memory of a process, GiB", max(run.column("memory/peak_gib")), ".2f"
    if saves := run.column("speed/save_share"):
        yield "save_share", "share of checkpoints", saves[-1], ".1%"
    for tag, name in (("train/skipped_steps", "steps skipped"), ("train/spikes", "spikes of the loss")):
        if counts := run.column(tag):
            yield tag.removeprefix("train/"), name, counts[-1], ".0f"


def compare(given: Sequence[Curves]) -> Comparison:
    """Several runs, beside each other."""
    at = common_step(given)
    found = [score(run, at) for run in given]
    ranked = sorted(range(len(given)), key=lambda place: math.inf if (of := found[place]) is None else of)
    runs = [given[place] for place in ranked]
    sources = sorted({name for run in runs for name in run.config.data.eval_splits})
    groups = [replace(group, places=sorted(map(ranked.index, group.places))) for group in grouped(given, found)]
    notes = []
    if at is None:
        notes.append("there is no step, but for the beginning, at which all were evaluated")
    for what, of_rows in unlike(runs, sources).items():
        alike = ", ".join(of for rows, of in numbered(of_rows).items() if rows)  # where there are any
        notes.append(f"note: not all were scored on the same rows: what stands below {what!r} compares within {alike}")
    if not any(group.n_seeds > 1 for group in groups):
        groups = []
    notes += [
        f"note: {members(group)} are of one group, but not of one git commit"
        for group in groups
        if not group.is_of_one_commit
    ]
    return Comparison(runs, at, differences(runs), sources, groups, notes)


def comparison_text(compared: Comparison) -> str:
    """The text of the report on several runs, best first; each has a number, since names may be long."""
    runs, at, sources = compared.runs, compared.at, compared.sources
    there = [] if at is None else [f"at step {at}", *(f"of {name}" for name in sources)]
    heads = ["run", "steps", "held out", *there, "best", "step", "tokens/s", "GiB"]
    rows = [[f"[{i}] {run.path}", *numbers(run, at, sources)] for i, run in enumerate(runs, start=1)]
    common = "" if at is None else ", at the last that all have"
    said = f"held out: bits per byte, at each run's last evaluation{common}, and at its best"
    lines = [table([heads, *rows]), "", said, *compared.notes, *group_lines(compared.groups, at)]
    if different := compared.differences:
        width = max(map(len, different))
        lines += ["", "what differs:", *(f"{name:<{width}}  {by_value(each)}" for name, each in different.items())]
    return "\n".join(lines)


def group_lines(groups: Sequence[Group], at: int | None) -> list[str]:
    """What chance makes of scores: a table with a row for each group of runs that differ in seeds alone."""
    if not groups:
        return []
    is_paired = any(group.more for group in groups)
    heads = ["runs", *short_names(groups[0].settings), "seeds", "held out"]
    heads += ["more than the first", "pairs"] if is_paired else []
    lines = ["", "in groups, of runs that differ in seeds alone:"]
    lines += [table([heads, *(group_row(group, is_paired) for group in groups)]), ""]
    where = "at its best" if at is None else f"at step {at}"
    lines.append(f"held out: bits per byte of a run {where}, mean ± standard deviation over seeds")
    if is_paired:
        lines += [
            "more than the first: each run less the run with the same seeds (run.seed, model.seed) in the first line,",
            "mean ± standard deviation over such pairs; what seeds do to both alike, such as the order of the same",
            "data, cancels out, so that a difference may be clear that is smaller than the deviation over seeds",
        ]
    return lines


def group_row(group: Group, is_paired: bool) -> list[str]:
    """Of a group in the order of the heads; empty where there are no pairs."""
    cells = [members(group), *map(shortened, group.settings.values()), str(group.n_seeds), spread_cell(group.score)]
    if is_paired:
        cells += [spread_cell(group.more, "+"), str(group.more.n)] if group.more else ["", ""]
    return cells


def members(group: Group) -> str:
    """The numbers of its runs."""
    return " ".join(f"[{place + 1}]" for place in group.places)


def spread_cell(spread: Spread | None, sign: str = "") -> str:
    """Mean and standard deviation; of a single number itself."""
    if spread is None:
        return "none"
    return f"{spread.mean:{sign}.4f}" + ("" if spread.sd is None else f" ± {spread.sd:.4f}")


def short_names(names: Iterable[str]) -> list[str]:
    """Settings by the last part of their names, where no other has the same."""
    ends = {name: name.rpartition(".")[2] for name in names}
    return [end if [*ends.values()].count(end) == 1 else name for name, end in ends.items()]


def comparison_values(compared: Comparison) -> dict[str, Any]:
    """What `comparison_text` says, as values: `runs`, best first, and `groups`, in the order given.

    Of each run, besides `run_values`: `settings`, those in which runs differ, and `at_step`, scores by tag. Of each
    group its runs, settings and number of seeds; `held_out` and `more_than_first`: n, mean and sd, null if not known.
    """
    tags = [HELD_OUT, *(source_tag(name, "bits_per_byte") for name in compared.sources)]
    runs = []
    for place, run in enumerate(compared.runs):
        there = {} if compared.at is None else {tag: dict(run.points(tag)).get(compared.at) for tag in tags}
        differing = {name: of_each[place] for name, of_each in compared.differences.items()}
        runs.append({**run_values(run), "at_step": there, "settings": parsed(differing)})
    groups = [
        {
            "runs": [str(compared.runs[place].path) for place in group.places],
            "settings": parsed(group.settings),
            "seeds": group.n_seeds,
            "held_out": group.score and asdict(group.score),
            "more_than_first": group.more and asdict(group.more),
        }
        for group in compared.groups
    ]
    return {"step": compared.at, "runs": runs, "groups": groups, "notes": list(compared.notes)}


def parsed(settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings as values; those that there are."""
    return {name: json.loads(value) for name, value in settings.items() if value != ABSENT}


def numbers(run: Curves, at: int | None, sources: Sequence[str]) -> list[str]:
    """Of a run in the order of the heads; empty where there is no such thing."""
    evaluations, best = run.points(HELD_OUT), run.best()
    curves = [dict(run.points(tag)) for tag in (HELD_OUT, *(source_tag(name, "bits_per_byte") for name in sources))]
    there = [cells((at, curve[at]))[0] if at in curve else "" for curve in curves]
    cost = {key: f"{value:{form}}" for key, _, value, form in costs(run)}
    return [
        str(n_steps(run)),
        cells(evaluations[-1])[0] if evaluations else "",
        *([] if at is None else there),
        *(cells(best) if best else ("", "")),
        cost["tokens_per_s"],
        cost["peak_gib"],
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


def draw(reported: Curves | Comparison, file: Path) -> None:
    """A picture of a run, of several, or of groups of them. Raises OSError or ValueError where it cannot be written."""
    if isinstance(reported, Curves):
        plot_run(reported, file)
    elif not reported.groups:
        plot_runs(reported.runs, file)
    else:
        labels = [label(group) for group in reported.groups]
        plot_groups([[reported.runs[place] for place in group.places] for group in reported.groups], labels, file)


def label(group: Group) -> str:
    """The settings of a group; the numbers of its runs, where none differ, or so many that nobody would read them."""
    values = map(shortened, group.settings.values())
    said = ", ".join(map("{}={}".format, short_names(group.settings), values))
    return said if 0 < len(said) <= LONGEST_LABEL else members(group)


def run(arguments: argparse.Namespace) -> None:
    check_json(arguments.json)
    runs = read_all(arguments.runs)
    compared = compare(runs) if len(runs) > 1 else None
    text, values = (comparison_text(compared), comparison_values(compared)) if compared else report(runs[0])
    with reader_may_leave():  # the file and the drawing are wanted all the same
        print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.plot:
        try:
            draw(compared or runs[0], arguments.plot)
        except (OSError, ValueError) as error:  # no such folder, or a format that matplotlib does not write
            raise ConfigError(f"cannot draw {arguments.plot}: {error}") from None
        print(f"drew {arguments.plot}")


def main() -> int:
    return exit_code(partial(run, parse_arguments()), ConfigError)


if __name__ == "__main__":
    sys.exit(main())
