"""The report of groups of runs that differ in seeds alone: as a text, as values and as a picture."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from reported_runs import make_run, report
from small_stores import cabbage_store

from trainer.baseline import unigram_score
from trainer.config import DataConfig


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return cabbage_store(tmp_path)


def make_other(folder: Path, store: Path, score: object, seed: int = 0, **changes: dict[str, object]) -> Path:
    """A run with another last score, of another seed, with changes to tables of the configuration."""
    make_run(folder, store)
    record = json.loads((folder / "run.json").read_text())
    record["config"]["run"]["seed"] = seed
    record["samples"] |= {"seed": seed, "web.seed": seed}
    record |= {"git_commit": changes.pop("git_commit", None)}
    for table, values in changes.items():
        record["config"][table] |= values
    (folder / "run.json").write_text(json.dumps(record))
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"eval/bits_per_byte": 4.0625', f'"eval/bits_per_byte": {score}'))
    return folder


def make_groups(folder: Path, store: Path) -> list[Path]:
    """Three runs, three of more rounds, and one that has no other beside it."""
    return [
        make_other(folder / "a0", store, "3.0"),
        make_other(folder / "a1", store, "3.5", seed=1),
        make_other(folder / "a2", store, "4.0", seed=2, run={"save_every": 7}),  # which changes no score
        make_other(folder / "b0", store, "2.75", model={"n_hashes": 8}),
        make_other(folder / "b1", store, "3.125", seed=1, model={"n_hashes": 8}),
        make_other(folder / "b5", store, "4.5", seed=5, model={"n_hashes": 8}),
        make_other(folder / "c2", store, "4.125", seed=2, model={"n_hashes": 2, "seed": 7}),
    ]


def section(text: str, head: str) -> list[str]:
    """The lines below a line, up to an empty one, with single spaces."""
    return [" ".join(line.split()) for line in text.partition(f"{head}\n")[2].partition("\n\n")[0].splitlines()]


GROUPS = "in groups, of runs that differ in seeds alone:"


def test_groups_of_seeds_are_compared_seed_by_seed(tmp_path: Path, store: Path) -> None:
    done = report(*make_groups(tmp_path, store))
    assert done.returncode == 0, done.stderr
    assert section(done.stdout, GROUPS) == [
        "runs n_hashes seeds held out more than the first pairs",
        "[2] [4] [5] 4 3 3.5000 ± 0.5000",
        "[1] [3] [7] 8 3 3.4583 ± 0.9214 -0.3125 ± 0.0884 2",  # b0 - a0, b1 - a1
        "[6] 2 1 4.1250",  # of another model.seed
    ]
    assert "held out: bits per byte of a run at step 2, mean ± standard deviation over seeds\n" in done.stdout
    assert "more than the first: each run less the run with the same seeds (run.seed, model.seed)" in done.stdout
    assert "note:" not in done.stdout


def test_the_first_group_is_that_of_the_run_given_first_and_scores_may_be_of_other_steps(
    tmp_path: Path, store: Path
) -> None:
    a0, a1, _, b0, _, _, _ = make_groups(tmp_path, store)
    assert section(report(b0, a1, a0).stdout, GROUPS)[1:] == ["[1] 8 1 2.7500", "[2] [3] 4 2 3.2500 ± 0.3536 +0.2500 1"]
    make_other(tmp_path / "a3", store, "null", seed=3)
    with (tmp_path / "a3" / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\n{"step": 3, "eval/loss": 2.75, "eval/bits_per_byte": 5.0}\n')
    done = report(a0, tmp_path / "a3")
    assert "there is no step, but for the beginning, at which all were evaluated\n" in done.stdout
    assert section(done.stdout, GROUPS) == ["runs seeds held out", "[1] [2] 2 4.0000 ± 1.4142"]
    assert "of a run at its best, mean ±" in done.stdout and "more than the first" not in done.stdout


def test_the_best_is_of_weights_that_were_trained(tmp_path: Path, store: Path) -> None:
    """Where there is no common step, runs that only grow worse are not all as good as their first weights."""
    bad = make_other(tmp_path / "bad", store, "9.0")
    worse = make_other(tmp_path / "worse", store, "null", seed=1)
    with (worse / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\n{"step": 3, "eval/loss": 7.75, "eval/bits_per_byte": 11.0}\n')
    done = report(worse, bad)
    assert section(done.stdout, GROUPS) == ["runs seeds held out", "[1] [2] 2 10.0000 ± 1.4142"]
    assert f"[1] {bad}" in done.stdout and f"[2] {worse}" in done.stdout


def test_runs_that_are_not_evaluated_yet_are_compared_with_none(tmp_path: Path, store: Path) -> None:
    """Amid a sweep: of weights that are not trained yet scores say nothing, and do not hide what others say."""
    a0, a1, _, b0, _, _, _ = make_groups(tmp_path, store)
    begun = make_other(tmp_path / "b1_begun", store, "null", seed=1, model={"n_hashes": 8})
    never = make_other(tmp_path / "c_begun", store, "null", model={"n_hashes": 2})
    lines = (never / "metrics.jsonl").read_text().splitlines(keepends=True)
    (never / "metrics.jsonl").write_text("".join(line for line in lines if "eval/loss" not in line))
    done = report(begun, a0, a1, b0, never, "--json", tmp_path / "all.json")
    assert section(done.stdout, GROUPS)[1:] == ["[2] [3] 4 2 3.2500 ± 0.3536", "[1] 8 1 2.7500 -0.2500 1"]
    assert "note: [4] [5] have no finite score of held-out rows after the beginning" in done.stdout
    values = json.loads((tmp_path / "all.json").read_text())
    assert values["step"] == 2 and [group["seeds"] for group in values["groups"]] == [2, 1]


def in_larger_steps(run: Path, *evaluations: str) -> Path:
    """Batches of two rows in place of one, and what was reported between the first step and the second."""
    record = json.loads((run / "run.json").read_text())
    record |= {"deepspeed": {"train_batch_size": 2}}
    (run / "run.json").write_text(json.dumps(record))
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines[:2], *evaluations, *lines[2:]]))
    return run


def test_runs_of_other_batches_are_compared_after_as_many_tokens(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of 100 tokens and one of 200, in the text, the values and the picture."""
    a0, a1, *_ = make_groups(tmp_path, store)
    early = '{"step": 1, "eval/loss": 3.0, "eval/bits_per_byte": 3.25, "eval/source/web/bits_per_byte": 6.5}'
    b0 = in_larger_steps(make_other(tmp_path / "large0", store, "2.5"), early)
    done = report(a0, a1, b0, "--json", tmp_path / "all.json", "--plot", tmp_path / "curves.svg")
    assert done.returncode == 0, done.stderr
    table = [" ".join(line.split()) for line in done.stdout.splitlines()[:4]]
    assert table == [
        "run steps held out after 200 tokens of web best step tokens/s GiB",
        f"[1] {a0} 2 3.0000 3.0000 5.5000 3.0000 2 100 1.25",
        f"[2] {b0} 2 2.5000 3.2500 6.5000 2.5000 2 100 1.25",
        f"[3] {a1} 2 3.5000 3.5000 5.5000 3.5000 2 100 1.25",
    ]
    said = "note: a step is 100 tokens in [1] [3]; 200 tokens in [2]: they are compared after as many\n"
    assert done.stdout.count("note: ") == done.stdout.count(said) == 1
    assert section(done.stdout, GROUPS)[1:] == ["[1] [3] - 2 3.2500 ± 0.3536", "[2] 2 1 3.2500 +0.2500 1"]
    assert "held out: bits per byte of a run after 200 tokens, mean ±" in done.stdout
    values = json.loads((tmp_path / "all.json").read_text())
    assert (values["step"], values["tokens"]) == (None, 200)
    assert values["runs"][1]["at_step"] == {"eval/bits_per_byte": 3.25, "eval/source/web/bits_per_byte": 6.5}

    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: pictures.append(figure))
    assert report(a0, a1, b0, "--plot", "groups.png").returncode == report(a0, b0, "--plot", "x.png").returncode == 0
    for (axes,) in (picture.axes for picture in pictures):
        assert axes.get_xlabel() == "tokens" and axes.get_xlim()[0] == 100, "half of the shorter one is left out"
        drawn = {str(line.get_label()): list(line.get_xdata()) for line in axes.lines}
        (large,) = (tokens for name, tokens in drawn.items() if "train_batch_size=2" in name or str(b0) in name)
        assert large == [0, 200, 400]


def test_runs_of_other_batches_that_never_saw_as_many_tokens(tmp_path: Path, store: Path) -> None:
    a0, *_ = make_groups(tmp_path, store)
    done = report(a0, in_larger_steps(make_other(tmp_path / "large", store, "3.5")))
    assert "there is no number of tokens, but for the beginning, at which all were evaluated\n" in done.stdout
    assert "after" not in done.stdout.splitlines()[0]
    assert "note: a step is 100 tokens in [1]; 200 tokens in [2]: at the same step they have not seen as many\n" in (
        done.stdout
    )


def test_runs_of_one_group_with_other_commits_are_noted(tmp_path: Path, store: Path) -> None:
    one = make_other(tmp_path / "one", store, "3.0", git_commit="a" * 40)
    two = make_other(tmp_path / "two", store, "4.0", seed=1, git_commit="b" * 40)
    assert "note: [1] [2] are of one group, but not of one git commit\n" in report(one, two).stdout


def test_json_says_what_the_text_says(tmp_path: Path, store: Path) -> None:
    paths, file = make_groups(tmp_path, store), tmp_path / "all.json"
    assert report(*paths, "--json", file).returncode == 0
    values = json.loads(file.read_text())
    assert values["step"] == 2 and values["tokens"] == 200 and values["notes"] == []
    assert [Path(run["run"]).name for run in values["runs"]] == ["b0", "a0", "b1", "a1", "a2", "c2", "b5"]
    first = values["runs"][0]
    assert first["settings"] == {
        "model.n_hashes": 8,
        "model.seed": 0,
        "run.save_every": 100,
        "run.seed": 0,
        "samples.seed": 0,
        "samples.web.seed": 0,
    }
    assert first["at_step"] == {"eval/bits_per_byte": 2.75, "eval/source/web/bits_per_byte": 5.5}
    a, b, c = values["groups"]
    assert a == {
        "runs": [str(path) for path in paths[:3]],
        "settings": {"model.n_hashes": 4},
        "seeds": 3,
        "held_out": {"n": 3, "mean": 3.5, "sd": 0.5},
        "more_than_first": None,
    }
    assert b["more_than_first"] == {"n": 2, "mean": -0.3125, "sd": pytest.approx(0.125 / 2**0.5)}
    assert c["held_out"] == {"n": 1, "mean": 4.125, "sd": None} and c["more_than_first"] is None
    metrics = paths[0] / "metrics.jsonl"
    metrics.write_text(metrics.read_text().rpartition("\n")[0] + '\n{"step": 3, "eval/bits_per_byte": null}\n')
    assert report(paths[0], "--json", file).returncode == 0
    values = json.loads(file.read_text())
    assert values["scores"]["eval/bits_per_byte"] == {
        "first": {"step": 0, "value": 8.125},
        "last": {"step": 3, "value": None},
    }
    assert values["best"] == {"step": 2, "value": 3.0} and values["steps"] == 2
    assert {
        key: values[key] for key in ("tokens_per_s", "mfu", "peak_gib", "save_share", "skipped_steps", "spikes")
    } == {
        "tokens_per_s": 100.0,
        "mfu": 0.3125,
        "peak_gib": 1.25,
        "save_share": 0.0625,
        "skipped_steps": 3,
        "spikes": 4,
    }
    unigram = unigram_score(DataConfig(store=store), n_rows=64).bits_per_byte
    assert values["unigram_bits_per_byte"] == unigram
    assert values["notes"] == [f"held out is 'val' of {store}, batches are of the mixture"]
    done = report(paths[0], "--json", tmp_path / "nowhere" / "x.json")
    assert done.returncode == 2 and not done.stdout and "--json" in done.stderr


def test_groups_are_drawn_as_a_line_and_a_band_each(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: pictures.append(figure))
    assert report(*make_groups(tmp_path, store), "--plot", "x.png").returncode == 0
    (axes,) = pictures[0].axes
    lines = [(line.get_label(), list(line.get_ydata())) for line in axes.lines]
    means = [(" n_hashes=4", 3.5), (" n_hashes=8", pytest.approx(10.375 / 3)), (" n_hashes=2", 4.125)]
    assert lines == [(label, [8.125, mean]) for label, mean in means]
    ends = [{y for x, y in each.get_paths()[0].vertices if x == 2} for each in axes.collections]
    assert ends == [{3.0, 4.0}, {2.75, 4.5}, {4.125}]
    low, high = axes.get_ylim()
    assert 2.5 < low < 2.75 and 4.5 < high < 4.75, "the scores of step 0 are cut off"
