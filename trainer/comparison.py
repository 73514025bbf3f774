"""How several runs went, beside each other: a text, and values for programs.

Runs that differ in seeds alone make a group (groups.py).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from data_pipeline.output import listed, table
from trainer.curves import (
    ABSENT,
    HELD_OUT,
    Curves,
    common_tokens,
    continued,
    differences,
    score,
    steps_are_alike,
    unlike,
)
from trainer.groups import Group, Spread, grouped
from trainer.run_report import cells, costs, n_steps, run_values
from trainer.scoring import source_tag

Value = TypeVar("Value", bound=str | None)

LONGEST = 40
"""Characters of a setting that are shown."""
MOST_VALUES, OF_THE_BEST = 10, 3
"""Of a setting with more values than the first number only so many are shown, those of the best runs."""
MOST_RUNS = 20
"""Whose numbers are shown beside a value."""
LONGEST_LABEL = 100
"""Characters of the settings in a line of a picture's legend."""


@dataclass(frozen=True)
class Comparison:
    """Of several runs."""

    runs: Sequence[Curves]
    """The best first."""
    tokens: int | None
    """After how many, padding included, they are compared; None: each at its best."""
    differences: dict[str, list[str]]
    """What is not the same for all runs, by name: of each."""
    sources: Sequence[str]
    """Stores of a mixture that some of them are evaluated on too."""
    groups: Sequence[Group]
    """In the order in which they were given; none where no runs differ in seeds alone."""
    notes: Sequence[str]
    """What a reader must know not to be misled."""

    @property
    def step(self) -> int | None:
        """The one at which they are compared, where it is the same for all."""
        if self.tokens is None or not steps_are_alike(self.runs):
            return None
        return self.tokens // self.runs[0].tokens_per_step()

    @property
    def place(self) -> str:
        """Where they are compared, in words."""
        if self.tokens is None:
            return "at its best"
        return f"after {self.tokens:,} tokens" if self.step is None else f"at step {self.step}"


def compare(given: Sequence[Curves]) -> Comparison:
    """Several runs, beside each other."""
    tokens = common_tokens(given)
    found = [score(run, tokens) for run in given]
    ranked = sorted(range(len(given)), key=lambda place: math.inf if (of := found[place]) is None else of)
    runs = [given[place] for place in ranked]
    sources = sorted({name for run in runs for name in run.config.data.evaluated if name})
    scored = [place for place, bits in enumerate(found) if bits is not None]
    groups = [
        replace(group, places=sorted(ranked.index(scored[place]) for place in group.places))
        for group in grouped([given[place] for place in scored], [found[place] for place in scored])
    ]
    notes = []
    if tokens is None:
        place = "step" if steps_are_alike(given) else "number of tokens"
        notes.append(f"there is no {place}, but for the beginning, at which all were evaluated")
    if 0 < len(scored) < len(given):
        others = " ".join(f"[{place}]" for place in range(len(scored) + 1, len(given) + 1))  # ranked last
        have = "has" if len(given) - len(scored) == 1 else "have"
        notes.append(f"note: {others} {have} no finite score of held-out rows after the beginning: compared with none")
    of_steps = numbered([f"{run.tokens_per_step():,} tokens" for run in runs])
    if len(of_steps) > 1:
        each = "; ".join(f"{tokens} in {alike}" for tokens, alike in of_steps.items())
        how = "at the same step they have not seen as many" if tokens is None else "they are compared after as many"
        notes.append(f"note: a step is {each}: {how}")
    for what, of_rows in unlike(runs, sources).items():
        alike = [of for rows, of in numbered(of_rows).items() if rows and " " in of]  # where there are any
        how = f"compares within {', '.join(alike)} alone" if alike else "does not compare"
        notes.append(f"note: not all were scored on the same rows: what stands below {what!r} {how}")
    if changed := [f"[{place}]" for place, run in enumerate(runs, start=1) if continued(run.record)]:
        notes.append(
            f"note: {' '.join(changed)} changed settings on the way ('continued' says which); the others are the last"
        )
    if not any(group.n_seeds > 1 for group in groups):
        groups = []
    notes += [
        f"note: {members(group)} are of one group, but not of one git commit"
        for group in groups
        if not group.is_of_one_commit
    ]
    return Comparison(runs, tokens, differences(runs), sources, groups, notes)


def comparison_text(compared: Comparison) -> str:
    """The text of the report on several runs, best first; each has a number, since names may be long."""
    runs, tokens, sources = compared.runs, compared.tokens, compared.sources
    there = [] if tokens is None else [compared.place, *(f"of {name}" for name in sources)]
    heads = ["run", "steps", "held out", *there, "best", "step", "tokens/s", "GiB"]
    rows = [[f"[{i}] {run.path}", *numbers(run, tokens, sources)] for i, run in enumerate(runs, start=1)]
    common = "" if tokens is None else ", at the last that all have"
    said = f"held out: bits per byte, at each run's last evaluation{common}, and at its best"
    lines = [table([heads, *rows]), "", said, *compared.notes, *group_lines(compared.groups, compared.place)]
    if different := compared.differences:
        width = max(map(len, different))
        lines += ["", "what differs:", *(f"{name:<{width}}  {by_value(each)}" for name, each in different.items())]
    return "\n".join(lines)


def group_lines(groups: Sequence[Group], place: str) -> list[str]:
    """What chance makes of scores: a table with a row for each group of runs that differ in seeds alone.

    place: where scores are compared, in words.
    """
    if not groups:
        return []
    is_paired = any(group.more for group in groups)
    heads = ["runs", *short_names(groups[0].settings), "seeds", "held out"]
    heads += ["more than the first", "pairs"] if is_paired else []
    lines = ["", "in groups, of runs that differ in seeds alone:"]
    lines += [table([heads, *(group_row(group, is_paired) for group in groups)]), ""]
    lines.append(f"held out: bits per byte of a run {place}, mean ± standard deviation over seeds")
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

    They are compared after `tokens`, at `step`: null where each is at its best, or where steps have different tokens.
    Of each run, besides `run_values`: `settings`, those in which runs differ, and `at_step`, the scores there by tag.
    Of each group its runs, settings and number of seeds; `held_out` and `more_than_first`: n, mean and sd, null if not
    known.
    """
    tags = [HELD_OUT, *(source_tag(name, "bits_per_byte") for name in compared.sources)]
    runs = []
    for place, run in enumerate(compared.runs):
        there = {} if compared.tokens is None else {tag: run.finite(tag, True).get(compared.tokens) for tag in tags}
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
    compared_at = {"tokens": compared.tokens, "step": compared.step}
    return {**compared_at, "runs": runs, "groups": groups, "notes": list(compared.notes)}


def parsed(settings: Mapping[str, str]) -> dict[str, Any]:
    """Settings as values; those that there are."""
    return {name: json.loads(value) for name, value in settings.items() if value != ABSENT}


def numbers(run: Curves, tokens: int | None, sources: Sequence[str]) -> list[str]:
    """Of a run in the order of the heads; empty where there is no such thing."""
    evaluations, best, scale = run.points(HELD_OUT), run.best(), run.tokens_per_step()
    tags = [HELD_OUT, *(source_tag(name, "bits_per_byte") for name in sources)]
    there = ["".join(cells(each)[0] for each in run.points(tag) if each[0] * scale == tokens) for tag in tags]
    cost = {key: f"{value:{form}}" for key, _, value, form in costs(run)}
    return [
        str(n_steps(run)),
        cells(evaluations[-1])[0] if evaluations else "",
        *([] if tokens is None else there),
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
    """Which runs have which value of a setting, given of each run, the best first.

    Of more than MOST_VALUES how many there are, in which range if all are numbers, and those of the best runs.
    """
    runs = numbered(values)
    # Whole where their beginnings are alike.
    say = shortened if len({*map(shortened, runs)}) == len(runs) else str
    said = [f"{say(value)} in {first_of(numbers)}" for value, numbers in runs.items()]
    if len(said) <= MOST_VALUES:
        return "; ".join(said)
    return f"{len(said)} values{_range(runs)}: {'; '.join(said[:OF_THE_BEST])}; …"


def first_of(numbers: str) -> str:
    """The numbers of runs, and how many more there are where they are too many."""
    return listed(numbers.split(), MOST_RUNS, " ")


def _range(values: Iterable[str]) -> str:
    """From the least to the largest; nothing where one is no number."""
    try:
        ordered = sorted(values, key=float)
    except ValueError:
        return ""
    return f" from {ordered[0]} to {ordered[-1]}"


def shortened(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 1]}…"


def label(group: Group) -> str:
    """The settings of a group; the numbers of its runs, where none differ, or so many that nobody would read them."""
    values = map(shortened, group.settings.values())
    said = ", ".join(map("{}={}".format, short_names(group.settings), values))
    return said if 0 < len(said) <= LONGEST_LABEL else members(group)
