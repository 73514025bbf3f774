"""Which runs differ in seeds alone, and what is made of their scores."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.comparison import LONGEST, by_value, label, shortened
from trainer.config import LoopConfig, RunConfig, flatten
from trainer.curves import ABSENT, INITIAL, Curves
from trainer.groups import NEUTRAL, Group, Spread, band, grouped, repetitions, spread


def make_run(commit: str = "c", store: str = "s", fingerprint: str = "f", **changes: Any) -> Curves:
    """A run that has scored 4 + step at steps 0 and 1; changes: settings by dotted name, with "__" for dots."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 258, "max_seq_len": 100},
        "data": {"store": store},
        "run": {"dir": "r", "deepspeed_config": "x.json", "steps": 20},
    }
    for name, value in changes.items():
        table, _, key = name.partition("__")
        tables[table][key] = value
    record = {
        "deepspeed": {},
        "store": {"fingerprint": fingerprint},
        "samples": {},
        "launch": {"device": "cpu", "world_size": 1},
        "evaluated": {"": {"rows": "a", "n_hashes": None, "since": 0}},
        "versions": {},
        "git_commit": commit,
    }
    lines = [{"step": step, "eval/bits_per_byte": 4.0 + step} for step in (0, 1)]
    return Curves(Path("r"), record, RunConfig(**tables), lines)


@pytest.mark.parametrize(
    "change",
    [
        *({"run__seed": 1}, {"model__seed": 1}, {"commit": "d", "run__seed": 1}, {"store": "t"}),
        *({"run__log_every": 3}, {"run__save_every": 3}, {"run__keep_last": 3}, {"run__keep_best": True}),
        *({"run__watchdog_factor": 3.0}, {"run__watchdog_min_s": 3.0}, {"run__profile_steps": "2..3"}),
        *(
            {"run__histogram_every": 3},
            {"run__on_full_disk": "continue"},
            {"run__dir": "other"},
            {"run__keep_every": 3},
        ),
        *({"run__deepspeed_config": "y.json"}, {"run__sample_tokens": 0}, {"run__ablation_rows": 0}),
        *({"run__diagnostics": False}, {"run__max_nonfinite": 3}, {"run__spike_deviations": 0.0}),
    ],
)
def test_seeds_and_what_changes_no_score_make_no_groups(change: dict[str, Any]) -> None:
    assert repetitions([make_run(), make_run(**change)]) == [[0, 1]]


@pytest.mark.parametrize(
    "change",
    [
        *({"model__n_hashes": 2}, {"run__steps": 30}, {"run__eval_every": 3}, {"run__eval_rows": 3}),
        *({"run__sequence_parallel": 2}, {"model__keep_ends": False}, {"data__on_damage": "skip"}),
        *({"run__init_from": "elsewhere"}, {"fingerprint": "g"}, {"commit": "d"}),
    ],
)
def test_what_changes_a_score_does(change: dict[str, Any]) -> None:
    """A commit, where the seeds are the same."""
    assert repetitions([make_run(), make_run(**change)]) == [[0], [1]]


def test_weights_that_runs_began_with_are_told_apart_by_what_they_are() -> None:
    """A folder may be written anew, or moved."""
    runs = [make_run(run__init_from=folder, run__seed=seed) for seed, folder in enumerate(("one", "one", "moved"))]
    for run, sha256 in zip(runs, "aba", strict=True):
        run.record["initial_sha256"] = sha256 * 64  # type: ignore[index]
    assert repetitions(runs) == [[0, 2], [1]]
    first, second = grouped(runs, [1.0, 2.0, 3.0])
    assert (first.settings, second.settings) == tuple({INITIAL: f'"{sha256 * 12}"'} for sha256 in "ab")
    for run in runs[:2]:
        del run.record["initial_sha256"]  # type: ignore[attr-defined]
    assert repetitions(runs) == [[0, 1], [2]], "of an earlier version: by what the folder is called"
    assert [group.settings for group in grouped(runs, [1.0, 2.0, 3.0])] == [
        {"run.init_from": '"one"'},
        {"run.init_from": '"moved"'},
    ]
    for run in runs[:2]:
        run.record["initial_sha256"] = "a" * 64  # type: ignore[index]
    *_, random = grouped([*runs, make_run()], [1.0, 2.0, 3.0, 4.0])
    assert random.settings == {INITIAL: ABSENT}, "and not that no folder is given"


def test_a_run_that_changed_settings_on_the_way_is_not_one_that_had_them_all_along() -> None:
    runs = [make_run(), make_run(), make_run()]
    for run, name in zip(runs, ("run.decay", "run.log_every"), strict=False):
        run.record["continued"] = [{"step": 3, "before": {name: "another"}}]  # type: ignore[index]
    assert repetitions(runs) == [[0], [1, 2]]


def test_names_of_settings_that_change_no_score_exist() -> None:
    assert {f"run.{name}" for name in LoopConfig.model_fields} > NEUTRAL
    assert set(flatten(make_run().config.model_dump())) > NEUTRAL


def test_seeds_of_a_mixture_make_no_groups() -> None:
    web = {"web": {"store": "w", "weight": 1.0}}
    runs = [make_run(run__seed=seed, data__mixture=web) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        run.record["samples"] = {"seed": seed, "web.seed": seed, "web.store": "f"}
    assert repetitions(runs) == [[0, 1]]


def test_a_group_that_is_split_by_commits_is_named_by_them() -> None:
    runs = [make_run(commit, run__seed=seed) for commit in "cd" for seed in (0, 1)]
    first, second = grouped(runs, [1.0, 2.0, 1.5, 2.75])
    assert (first.places, first.settings) == ([0, 1], {"git_commit": '"c"'})
    assert (second.places, second.settings) == ([2, 3], {"git_commit": '"d"'})
    assert first.is_of_one_commit and second.is_of_one_commit
    assert second.more == Spread(2, 0.625, pytest.approx(0.25 / 2**0.5))
    (both,) = grouped([make_run("c"), make_run("d", run__seed=1)], [1.0, 2.0])
    assert not both.is_of_one_commit and not both.settings


def test_runs_of_the_same_seeds_count_once() -> None:
    runs = [make_run(), make_run(run__log_every=3), make_run(run__seed=1)]
    (group,) = grouped(runs, [1.0, 2.0, 3.5])
    assert group.n_seeds == 2 and group.score == Spread(2, 2.5, pytest.approx(2**0.5))


def test_scores_of_other_rows_are_not_subtracted() -> None:
    runs = [make_run(), make_run(run__eval_rows=3)]
    runs[1].record["evaluated"][""]["rows"] = "b"  # type: ignore[index]
    assert grouped(runs, [1.0, 2.0])[1].more is None
    runs[1] = make_run(run__steps=30)
    assert grouped(runs, [1.0, 2.0])[1].more == Spread(1, 1.0, None)


def test_a_score_that_is_missing_is_not_passed_over() -> None:
    runs = [make_run(), make_run(run__seed=1), *(make_run(run__seed=seed, run__steps=30) for seed in (0, 1))]
    first, second = grouped(runs, [1.0, 2.0, 3.0, None])
    assert first.score and second.score is None and second.more is None
    assert spread([]) is None


def test_a_band_is_of_the_steps_that_all_have() -> None:
    low = make_run()
    high = replace(
        low, metrics=[{"step": step, "eval/bits_per_byte": bits} for step, bits in enumerate((4.0, 7.0, 1.0))]
    )
    assert band([low, high], "eval/bits_per_byte", by_tokens=False) == [(0, 4.0, 4.0, 4.0), (1, 6.0, 5.0, 7.0)]


def test_groups_come_in_the_order_of_their_first_runs() -> None:
    assert repetitions([make_run(), make_run(run__steps=30), make_run("d")]) == [[0], [1], [2]]


def test_the_order_of_settings_in_a_file_makes_no_groups() -> None:
    runs = [make_run(), make_run()]
    for run, names in zip(runs, ("ab", "ba"), strict=True):
        run.record["deepspeed"] = dict.fromkeys(names, 1)  # type: ignore[index]
    assert repetitions(runs) == [[0, 1]]


def test_folders_of_a_mixtures_stores_make_no_groups() -> None:
    runs = [make_run(run__seed=i, data__mixture={"web": {"store": "vw"[i], "weight": 1.0}}) for i in (0, 1)]
    for run in runs:
        run.record["samples"] = {"web.store": "f"}  # type: ignore[index]
    assert repetitions(runs) == [[0, 1]]


def test_a_band_has_no_step_at_which_a_score_is_not_finite() -> None:
    low = make_run()
    lines = [{"step": 0, "eval/bits_per_byte": 5.0}, {"step": 1, "eval/bits_per_byte": None}]
    assert band([low, replace(low, metrics=lines)], "eval/bits_per_byte", False) == [(0, 4.5, 4.0, 5.0)]


def test_long_values_that_begin_alike_are_said_whole() -> None:
    one, other = f"{'x' * 50}1", f"{'x' * 50}2"
    assert by_value([one, other, one]) == f"{one} in [1] [3]; {other} in [2]"
    assert by_value([one, "y"]) == f"{'x' * 39}… in [1]; y in [2]"
    assert shortened("x" * LONGEST) == "x" * LONGEST
    assert shortened("x" * (LONGEST + 1)) == "x" * (LONGEST - 1) + "…"


def test_settings_that_nobody_would_read_are_not_a_label() -> None:
    settings = {f"model.setting_{number}": "1" * 20 for number in range(4)}
    group = Group([0, 2], settings, 1, None, None, True)
    assert label(group) == "[1] [3]"
    few = dict([*settings.items()][:2])
    assert label(replace(group, settings=few)) == f"setting_0={'1' * 20}, setting_1={'1' * 20}"
