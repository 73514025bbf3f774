"""The report of very many runs: what differs in lines that can be read, and the best of them in colour."""

import json
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from reported_runs import make_run, report
from small_stores import cabbage_store

from trainer.comparison import by_value


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return cabbage_store(tmp_path)


def make_sweep(folder: Path, store: Path, n_runs: int, n_seeds: int = 1) -> list[Path]:
    """Runs of other learning rates, the later the better, each with some seeds; the first third have diverged."""
    paths = []
    for number in range(n_runs):
        for seed in range(n_seeds):
            path = folder / f"run_{number:02d}_{seed}"
            make_run(path, store)
            record = json.loads((path / "run.json").read_text())
            record["deepspeed"] = {"optimizer": {"params": {"lr": (number + 1) / 1000}}}
            record["config"]["run"]["seed"] = seed
            (path / "run.json").write_text(json.dumps(record))
            metrics = path / "metrics.jsonl"
            score = (6.0 if number < n_runs // 3 else 2.0) + (n_runs - number) / 64 + seed / 256
            metrics.write_text(metrics.read_text().replace("4.0625", str(score)))
            paths.append(path)
    return paths


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    return drawn


def legend_of(picture: Figure) -> tuple[str, list[str]]:
    """Its title and its lines."""
    (legend,) = picture.legends
    return legend.get_title().get_text(), [text.get_text().strip() for text in legend.get_texts()]


def test_ten_values_of_a_setting_are_shown_and_of_more_the_best_runs() -> None:
    ten = [str(number) for number in range(10)]
    assert by_value(ten) == "; ".join(f"{number} in [{number + 1}]" for number in range(10))
    numbers = ["0.5", "2e-05", "0.5", "16", *ten]
    assert by_value(numbers) == "13 values from 0 to 16: 0.5 in [1] [3]; 2e-05 in [2]; 16 in [4]; …"
    for other in ("null", '"bestfit"', "true", "-"):
        assert by_value([other, *ten]) == f"11 values: {other} in [1]; 0 in [2]; 1 in [3]; …"


def test_twenty_runs_of_a_value_are_named_and_of_more_the_best() -> None:
    twenty = " ".join(f"[{number}]" for number in range(1, 21))
    assert by_value(20 * ["4"]) == f"4 in {twenty}"
    assert by_value([*20 * ["4"], "8", "4", "4"]) == f"4 in {twenty} and 2 more; 8 in [21]"


def test_the_best_of_a_sweep_are_in_colour_and_the_values_are_complete(
    tmp_path: Path, store: Path, pictures: list[Figure]
) -> None:
    paths = make_sweep(tmp_path, store, 24)
    done = report(*paths, "--plot", "x.png", "--json", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.partition("what differs:\n")[2].splitlines()
    said = "24 values from 0.001 to 0.024: 0.024 in [1]; 0.023 in [2]; 0.022 in [3]; …"
    assert [" ".join(line.split()) for line in lines[:1]] == [f"deepspeed.optimizer.params.lr {said}"]
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    rates = [run["settings"]["deepspeed.optimizer.params.lr"] for run in runs]
    assert rates == [number / 1000 for number in range(24, 0, -1)]

    title, legend = legend_of(pictures[0])
    assert title == "held-out documents (faint: training batches)\nof the best 10 of 24 runs; the others are grey"
    assert legend == [str(path) for path in paths[:-11:-1]]
    (axes,) = pictures[0].axes
    grey = [line for line in axes.lines if to_hex(line.get_color()) == "#bfbfbf"]
    assert len(grey) == 14 and len(axes.lines) == 14 + 2 * 10
    last = [2.0 + place / 64 for place in range(11, 17)] + [6.0 + place / 64 for place in range(17, 25)]
    assert [float(line.get_ydata()[-1]) for line in grey] == last
    low, high = axes.get_ylim()
    assert low < 2.0 + 1 / 64 and 2.0 + 12 / 64 < high < 2.0 + 14 / 64, "the better half is shown"


def test_twenty_runs_are_all_in_colour(tmp_path: Path, store: Path, pictures: list[Figure]) -> None:
    assert report(*make_sweep(tmp_path, store, 20), "--plot", "x.png").returncode == 0
    title, legend = legend_of(pictures[0])
    assert title == "held-out documents (faint: training batches)" and len(legend) == 20
    assert pictures[0].axes[0].get_ylim()[1] > 6.0 + 20 / 64, "all are shown"


def test_of_many_groups_the_best_are_in_colour(tmp_path: Path, store: Path, pictures: list[Figure]) -> None:
    assert report(*make_sweep(tmp_path, store, 21, n_seeds=2), "--plot", "x.png").returncode == 0
    title, legend = legend_of(pictures[0])
    assert title.endswith("from the lowest to the highest\nof the best 10 of 21 groups; the others are grey")
    assert legend == [f"lr={rate / 1000}" for rate in range(21, 11, -1)]
    (axes,) = pictures[0].axes
    assert len(axes.lines) == 21 and len(axes.collections) == 10
    assert report(*make_sweep(tmp_path / "few", store, 3, n_seeds=2), "--plot", "x.png").returncode == 0
    assert legend_of(pictures[1])[1] == ["lr=0.001", "lr=0.002", "lr=0.003"], "in the order given"
