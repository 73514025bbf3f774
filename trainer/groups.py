"""Runs that differ in seeds alone: how much of a score is chance, and what differs from group to group."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from trainer.curves import INITIAL, NEUTRAL, STORE, Curves, settings, shown

SEED = re.compile(r"run\.seed|model\.seed|samples\.(.*\.)?seed")
"""samples.…: run.seed, as run.json says it of a mixture and of each of its stores."""
COMMIT = "git_commit"


@dataclass(frozen=True)
class Spread:
    """Of some numbers."""

    n: int
    mean: float
    sd: float | None
    """The standard deviation; None of a single number."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but seeds, and what changes no score."""

    places: Sequence[int]
    settings: dict[str, str]
    """Those in which groups differ, by name: as they are to be shown."""
    n_seeds: int
    score: Spread | None
    """Over seeds; of several runs with the same seeds their mean counts. None where a run has no score."""
    more: Spread | None
    """How much more than the first group's, seed by seed; None of the first group itself, and where it has no seeds in
    common with this one, was scored on other rows, or a score is missing."""
    is_of_one_commit: bool


def grouped(runs: Sequence[Curves], scores: Sequence[float | None]) -> list[Group]:
    """All runs, in the order of the first of each group."""
    rows = [run.rows("") for run in runs]
    alike = repetitions(runs)
    tables = _telling(runs)
    names = _differing(tables, alike)
    by_seeds = [_by_seeds(runs, scores, rows, places) for places in alike]
    return [
        Group(
            places,
            {name: shown(tables[places[0]], name) for name in names},
            len(mine),
            spread(mine.values()),
            spread(_less(mine[key], by_seeds[0][key]) for key in mine if key in by_seeds[0]) if index else None,
            len({runs[place].record[COMMIT] for place in places}) == 1,
        )
        for index, (places, mine) in enumerate(zip(alike, by_seeds, strict=True))
    ]


def repetitions(runs: Sequence[Curves]) -> list[list[int]]:
    """Runs that differ in nothing but seeds and what changes no score, by their places.

    Commits tell runs apart only where some of the same settings and seeds have different ones.
    """
    tables, groups = _telling(runs), []
    for places in _alike(tables, range(len(runs)), with_commit=False):
        has_twins = len({_seeds(runs[place]) for place in places}) < len(places)
        groups += _alike(tables, places, with_commit=True) if has_twins else [places]
    return sorted(groups)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of numbers; None where there are none, or one is missing."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    if not numbers or len(numbers) < len(known):
        return None
    return Spread(len(numbers), mean(numbers), stdev(numbers) if len(numbers) > 1 else None)


def band(runs: Sequence[Curves], tag: str, by_tokens: bool) -> list[tuple[int, float, float, float]]:
    """Of each step (or number of tokens) at which all these runs have a finite value of a tag: it, mean, lowest and
    highest."""
    curves = [run.finite(tag, by_tokens) for run in runs]
    places = sorted(set.intersection(*map(set, curves)))
    columns = [(place, [curve[place] for curve in curves]) for place in places]
    return [(place, mean(values), min(values), max(values)) for place, values in columns]


def _alike(tables: Sequence[Mapping[str, Any]], places: Iterable[int], with_commit: bool) -> list[list[int]]:
    """Which of the runs at these places have the same settings."""
    alike: dict[str, list[int]] = {}
    for place in places:
        kept = {name: value for name, value in tables[place].items() if name != COMMIT or with_commit}
        alike.setdefault(json.dumps(kept, sort_keys=True), []).append(place)
    return list(alike.values())


def _telling(runs: Sequence[Curves]) -> list[dict[str, Any]]:
    """Of each run the settings that change a score, but for seeds.

    Of a folder of initial weights what is in it counts, and not what it is called, where that is known of all runs.
    """
    by_weights = all(run.record.get("initial_sha256") for run in runs if run.config.run.init_from)
    other_name = "run.init_from" if by_weights else INITIAL
    return [
        {
            name: value
            for name, value in settings(run).items()
            if name != other_name and name not in NEUTRAL and not SEED.fullmatch(name) and not STORE.fullmatch(name)
        }
        for run in runs
    ]


def _differing(tables: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[int]]) -> list[str]:
    """Names of the settings in which groups differ, each of which has one value in each group."""
    names = sorted(set().union(*tables))
    values = {name: [{shown(tables[place], name) for place in places} for places in groups] for name in names}
    return [
        name for name in names if all(len(each) == 1 for each in values[name]) and len(set().union(*values[name])) > 1
    ]


def _by_seeds(
    runs: Sequence[Curves], scores: Sequence[float | None], rows: Sequence[str | None], places: Sequence[int]
) -> dict[Any, float | None]:
    """The score of each seed; the rows are in the key, so that no score is compared with one of other rows."""
    found: dict[Any, list[float | None]] = {}
    for place in places:
        found.setdefault((_seeds(runs[place]), rows[place]), []).append(scores[place])
    return {key: None if (of_seed := spread(values)) is None else of_seed.mean for key, values in found.items()}


def _seeds(run: Curves) -> tuple[int, int]:
    return run.config.run.seed, run.config.model.seed


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
