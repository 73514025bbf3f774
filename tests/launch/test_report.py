"""The report of a run, and of several."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from reported_runs import make_run, report
from small_stores import cabbage_store

from data_pipeline.store import Store
from trainer.baseline import unigram_score
from trainer.config import DataConfig
from trainer.curve_plot import plot_runs
from trainer.curves import differences, read_curves, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return cabbage_store(tmp_path)


def test_report_names_every_figure(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    done = report(tmp_path / "run", "--plot", tmp_path / "curve.png")
    assert done.returncode == 0, done.stderr
    for figure in (
        "                                       first    step        last    step",
        "training batch, nats per token        5.2500       1      2.5000       2",
        "training batch, bits per byte         8.2500       1      3.7500       2",
        "held out, bits per byte               8.1250       0      4.0625       2",
        "held out of web, bits per byte        5.5000       2      5.5000       2",
        "  up to 16K tokens before             5.7500       0      2.2500       2",
        "  more without LSH attention          0.5000       2      0.5000       2",
        "dense attention recovered             0.3750       0      0.8125       2",
        "of the devices' peak (median)                              31.2%",
        "share of earlier checkpoints                                6.2%",
        "steps skipped                                                  3",
        "spikes of the loss                                             4",
        "1.25",
        "100",
        "--logdir",
    ):
        assert figure in done.stdout
    assert "best" not in done.stdout, "the last evaluation is"
    unigram = unigram_score(DataConfig(store=store), n_rows=64).bits_per_byte
    assert f"{unigram:.4f} bits per byte" in done.stdout
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_best_and_a_loss_that_was_not_finite_at_the_end(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('ss": null, "train/bits_per_byte": null}\n')
        file.write('{"step": 3, "eval/loss": 3.0, "eval/bits_per_byte": 4.5}\n')
        file.write('{"step": 4, "eval/loss": null, "eval/bits_per_byte": null}\n')
    done = report(tmp_path / "run")
    assert "held out, best, bits per byte                             4.0625       2\n" in done.stdout
    assert "training batch, nats per token        5.2500       1        none       3\n" in done.stdout, done.stderr
    assert "training batch, bits per byte         8.2500       1        none       3\n" in done.stdout
    assert "held out, nats per token              5.5000       0        none       4\n" in done.stdout


def test_a_store_that_is_gone_takes_the_unigram_model_with_it_and_nothing_else(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    store.rename(tmp_path / "elsewhere")
    done = report(tmp_path / "run")
    assert done.returncode == 0 and f"unigram model, held out: not known, since {store} does not exist" in done.stdout
    assert "held out, bits per byte               8.1250       0      4.0625       2" in done.stdout


@pytest.mark.parametrize("name", ["", "web"])
def test_nor_is_it_of_a_store_that_was_built_anew(tmp_path: Path, store: Path, name: str) -> None:
    """data.store, or one of the mixture."""
    make_run(tmp_path / "run", store)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    own = Store.open(store).manifest.fingerprint
    record |= {"store": {"fingerprint": own if name else "before"}, "samples": {"web.store": "before" if name else own}}
    record["config"]["data"]["mixture"] = {"web": {"store": str(store), "weight": 1.0}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    done = report(tmp_path / "run")
    assert f"unigram model, held out: not known, since {store} is not the store that it was: it was bu" in done.stdout


def test_a_reader_who_leaves_is_no_error_and_the_plot_is_drawn(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    command = [sys.executable, "launch/report.py", str(tmp_path / "run"), "--plot", str(tmp_path / "curve.png")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # as `report.py … | true` does, before it prints
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("damage", ["missing", "run.json", "metrics.jsonl", "no UTF-8", "no step", "plot"])
def test_report_of_what_is_no_run_is_one_line(tmp_path: Path, store: Path, damage: str) -> None:
    run, options = tmp_path / "run", []
    if damage != "missing":
        make_run(run, store)
    if damage in ("run.json", "metrics.jsonl"):
        (run / damage).write_text("{\n")
    if damage == "no UTF-8":
        (run / "metrics.jsonl").write_bytes(b"\xff\n")
    if damage == "no step":
        (run / "metrics.jsonl").write_text("")
    if damage == "plot":
        options = ["--plot", tmp_path / "nowhere" / "curve.png"]
    done = report(run, *options)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_runs_are_compared_by_their_scores_and_by_what_differs(tmp_path: Path, store: Path) -> None:
    """The best first, at the last step at which all were evaluated."""
    for name in ("one", "two", "three"):
        make_run(tmp_path / name, store)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    record["config"]["model"]["n_hashes"] = 8  # of the other, the record does not say it
    deepspeed = {"optimizer": {"params": {"lr": 0.5}}, "train_batch_size": 1}
    record |= {"deepspeed": deepspeed, "launch": {"device": "cpu", "world_size": 2}}
    (tmp_path / "two" / "run.json").write_text(json.dumps(record))
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().replace("4.0625", "3.5")
    more = '{"step": 3, "eval/loss": 3.0, "eval/bits_per_byte": 4.5}\n'
    (tmp_path / "two" / "metrics.jsonl").write_text(lines[: lines.rindex("\n") + 1] + more)
    three = tmp_path / "three" / "metrics.jsonl"
    three.write_text(three.read_text().replace('"eval/bits_per_byte": 4.0625', '"eval/bits_per_byte": null'))
    done = report(*(tmp_path / name for name in ("one", "two")), "--plot", tmp_path / "curves.svg")
    assert done.returncode == 0, done.stderr
    folder = re.escape(str(tmp_path))
    for line in (
        r"run +steps +held out +at step 2 +of web +best +step +tokens/s +GiB",
        rf"\[1\] {folder}/two +2 +4\.5000 +3\.5000 +5\.5000 +3\.5000 +2 +100 +1\.25",
        rf"\[2\] {folder}/one +2 +4\.0625 +4\.0625 +5\.5000 +4\.0625 +2 +100 +1\.25",
        r"what differs:",
        r"deepspeed\.optimizer\.params\.lr +0\.5 in \[1\]; - in \[2\]",
        r"model\.n_hashes +8 in \[1\]; 4 in \[2\]",
        r"ranks +2 in \[1\]; 1 in \[2\]",
    ):
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), (line, done.stdout)
    assert "run.dir" not in done.stdout and "note: " not in done.stdout
    drawn = (tmp_path / "curves.svg").read_text()  # which says in comments what its texts are
    assert all(f"<!--  {tmp_path / name} -->" in drawn for name in ("one", "two"))
    done = report(*(tmp_path / name for name in ("three", "one")))  # whose last score is not finite
    assert re.search(rf"^\[2\] {folder}/three +2 +none +none +5\.5000 +8\.1250 +0", done.stdout, re.MULTILINE), (
        done.stdout
    )
    assert "what differs" not in done.stdout
    compared_with_none = "has no finite score of held-out rows after the beginning: compared with none\n"
    assert f"note: [2] {compared_with_none}" in done.stdout


def test_of_several_what_is_no_run_is_left_out(tmp_path: Path, store: Path) -> None:
    for name in ("one", "two", "begun"):
        make_run(tmp_path / name, store)
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    others = [tmp_path / "begun", tmp_path / "file", tmp_path / "gone"]
    done = report(tmp_path / "one", *others, tmp_path / "two")
    assert done.returncode == 0 and re.search(r"^\[2\] .*/two ", done.stdout, re.MULTILINE)
    assert [line.split()[:4] for line in done.stderr.splitlines()] == [
        ["note:", "left", "out:", str(path)] for path in others
    ]
    done = report(tmp_path / "begun", tmp_path / "one")
    assert done.returncode == 0 and "the run lies in" in done.stdout, "the only one is reported by itself"
    done = report(*others)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: none of these 3 is a run")


def test_a_run_that_is_given_twice_is_one(tmp_path: Path, store: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, store)
    (tmp_path / "link").symlink_to("one")
    done = report(tmp_path / "one", tmp_path / "link", tmp_path / "two")
    assert done.stderr == f"note: left out: {tmp_path / 'link'} was given before\n"
    assert done.stdout == report(tmp_path / "one", tmp_path / "two").stdout
    (tmp_path / "loop").symlink_to("loop")
    done = report(tmp_path / "one", tmp_path / "loop", tmp_path / "two")
    assert done.returncode == 0 and done.stderr.startswith(f"note: left out: {tmp_path / 'loop'} is not the folder of")


def test_a_picture_has_the_name_that_was_given(tmp_path: Path, store: Path) -> None:
    """And no other, which matplotlib would make of it."""
    make_run(tmp_path / "one", store)
    (tmp_path / "a.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for name in ("loss", "one", "a.png"):
        done = report(tmp_path / "one", "--plot", tmp_path / name)
        assert done.returncode == 2 and f"--plot {tmp_path / name}: give the name of a file that ends in" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_scores_of_other_rows_are_told_and_a_run_without_any_is_compared(tmp_path: Path, store: Path) -> None:
    for name in ("never", "often"):
        make_run(tmp_path / name, store)
    record = json.loads((tmp_path / "never" / "run.json").read_text())
    record["config"]["run"]["eval_rows"] = 2
    record["evaluated"][""]["rows"] = "2 rows"
    (tmp_path / "never" / "run.json").write_text(json.dumps(record))
    lines = (tmp_path / "never" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "never" / "metrics.jsonl").write_text("".join(line for line in lines if "eval/loss" not in line))
    done = report(tmp_path / "never", tmp_path / "often")
    assert done.returncode == 0, done.stderr
    assert "note: not all were scored on the same rows: what stands below 'held out' does not compare\n" in done.stdout
    assert re.search(r"/never +2 +100 +1\.25$", done.stdout, re.MULTILINE), done.stdout


def test_evaluations_of_other_rows_are_left_out(tmp_path: Path, store: Path) -> None:
    """As after a resume with another data.store or eval_rows."""
    for name in ("one", "two"):
        make_run(tmp_path / name, store)
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    (tmp_path / "one" / "run.json").write_text(json.dumps({**record, "evaluated": {"": {"rows": "a", "since": 2}}}))
    done = report(tmp_path / "one")
    assert "held out, bits per byte               4.0625       2      4.0625       2\n" in done.stdout
    assert "evaluations before step 2 were of other rows" in done.stdout
    (tmp_path / "two" / "run.json").write_text(json.dumps({**record, "evaluated": {"": {"rows": "b", "since": 3}}}))
    done = report(tmp_path / "two", tmp_path / "one")
    assert "  at step 2  " in done.stdout and "note: [2] has no finite score of held-out rows after" in done.stdout
    assert "note: not all were scored on the same rows: what stands below 'held out' does not compare\n" in done.stdout
    assert re.search("/one +2 +4\\.0625 +4\\.0625 +5\\.5000 +4\\.0625 +2 +100", done.stdout), done.stdout
    assert re.search("/two +2 +5\\.5000 +100", done.stdout), done.stdout


def test_of_what_differs_hashes_are_shortened_and_nothing_else_is(tmp_path: Path, store: Path) -> None:
    for digit in "12":
        make_run(tmp_path / digit, store)
        file = tmp_path / digit / "run.json"
        record = json.loads(file.read_text()) | {"git_commit": digit * 40}
        record["config"]["data"]["store"] = f"a_folder_of_stores/{digit}"
        file.write_text(json.dumps(record))
    assert differences([read_curves(tmp_path / digit) for digit in "12"]) == {
        "data.store": ['"a_folder_of_stores/1"', '"a_folder_of_stores/2"'],
        "git_commit": ['"111111111111"', '"222222222222"'],
    }


def test_of_equal_scores_the_first_is_the_best(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.0}\n{"step": 3, "eval/loss": 2.75, "eval/bits_per_byte": 4.0625}\n')
    assert read_curves(tmp_path / "run").best() == (2, 4.0625)


def test_a_run_without_evaluations_is_not_said_to_have_some(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(line for line in lines if "eval/loss" not in line))
    done = report(tmp_path / "run")
    assert done.returncode == 0 and "held out" not in done.stdout


def test_a_run_that_went_on_with_other_settings_says_so(tmp_path: Path, store: Path) -> None:
    """But for what changes no score; beside others it is not taken for one that had its last settings all along."""
    make_run(tmp_path / "run", store)
    make_run(tmp_path / "other", store)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    before = {"run.steps": 1, "run.log_every": 3, "deepspeed.optimizer.params.lr": None}
    names = {"data.store": "was", "data.mixture.web.store": "was", "run.init_from": "was"}  # of folders that moved
    record["continued"] = [{"step": 1, "before": {**before, **names}}, {"step": 2, "before": {"run.save_every": 4}}]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    said = "at step 1, before which run.steps was 1, deepspeed.optimizer.params.lr was not given"
    done = report(tmp_path / "run")
    assert f"\ncontinued with other settings {said}\n" in done.stdout and "save_every" not in done.stdout
    done = report(tmp_path / "run", tmp_path / "other", "--json", tmp_path / "both.json")
    assert "note: [1] changed settings on the way ('continued' says which); the others are the last\n" in done.stdout
    assert "continued  " in done.stdout and "in groups" not in done.stdout
    runs = json.loads((tmp_path / "both.json").read_text())["runs"]
    assert [run["settings"] for run in runs] == [{"continued": said}, {}]


def test_a_run_of_another_version_is_named(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    before = {key: value for key, value in record.items() if key not in ("evaluated", "samples")}
    (tmp_path / "run" / "run.json").write_text(json.dumps(before))
    done = report(tmp_path / "run")
    assert done.returncode == 2
    assert f"{tmp_path / 'run' / 'run.json'} does not say samples, evaluated: use the version that wr" in done.stderr
    record["config"]["run"]["gone"] = 1
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    done = report(tmp_path / "run")
    assert done.returncode == 2 and f"{tmp_path / 'run'} has a configuration that this version does not" in done.stderr


def test_scores_of_a_source_are_of_the_same_rows_too(tmp_path: Path, store: Path) -> None:
    for name, rows in (("one", "5 rows of val"), ("two", "5 rows of test")):
        make_run(tmp_path / name, store)
        record = json.loads((tmp_path / name / "run.json").read_text())
        evaluated = {"": {"rows": "a", "n_hashes": 1, "since": 0}, "web": {"rows": rows, "n_hashes": 1, "since": 2}}
        (tmp_path / name / "run.json").write_text(json.dumps({**record, "evaluated": evaluated}))
    done = report(tmp_path / "one", tmp_path / "two")
    assert "note: not all were scored on the same rows: what stands below 'of web' does not compare\n" in done.stdout
    make_run(tmp_path / "without", store)
    file = tmp_path / "without" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "evaluated": {"": evaluated[""]}}))
    done = report(tmp_path / "one", tmp_path / "two", tmp_path / "without")
    assert "below 'of web' does not compare\n" in done.stdout, done.stdout
    assert "note:" not in report(tmp_path / "one", tmp_path / "without").stdout, "the other has no scores of it"
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    record["evaluated"]["web"]["rows"] = "5 rows of test"
    record["evaluated"][""]["n_hashes"] = None  # of as many rows, by other rounds
    (tmp_path / "one" / "run.json").write_text(json.dumps(record))
    assert "note:" not in report(tmp_path / "one", tmp_path / "two").stdout
    record["evaluated"][""]["since"] = record["evaluated"]["web"]["since"] = 3
    (tmp_path / "one" / "run.json").write_text(json.dumps(record))
    done = report(tmp_path / "one")
    assert "of web" not in done.stdout and "recovered" not in done.stdout and "held out" not in done.stdout


def test_runs_whose_losses_are_not_finite_are_drawn(tmp_path: Path, store: Path) -> None:
    for name in ("_one", "$x^{"):
        make_run(tmp_path / name, store)
        file = tmp_path / name / "metrics.jsonl"
        file.write_text(re.sub(r'("(train|eval)/bits_per_byte"): [\d.]+', r"\1: null", file.read_text()))
    done = report(tmp_path / "_one", tmp_path / "$x^{", "--plot", tmp_path / "curves.svg")
    assert done.returncode == 0, done.stderr
    assert f"<!--  {tmp_path / '_one'} -->" in (tmp_path / "curves.svg").read_text()


def test_a_picture_of_several_runs_has_room_for_what_differs(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginnings, whose losses are far higher, do not decide its height."""
    for name in ("one", "two"):
        make_run(tmp_path / name, store)
    pictures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: pictures.append(figure))
    runs = [read_curves(tmp_path / name) for name in ("one", "two")]
    later = [{"step": 60, "eval/bits_per_byte": 2.25}, {"step": 100, "eval/bits_per_byte": 2.0}]
    plot_runs([replace(run, metrics=[*run.metrics, *later]) for run in runs], tmp_path / "x.png")
    (low, high), (left, _) = pictures[0].axes[0].get_ylim(), pictures[0].axes[0].get_xlim()
    assert 1.9 < low < 2.0 and 2.25 < high < 2.3 and left == 50
    plot_runs([runs[0], replace(runs[1], metrics=[*runs[1].metrics, *later])], tmp_path / "x.png")
    (low, high), (left, _) = pictures[1].axes[0].get_ylim(), pictures[1].axes[0].get_xlim()
    assert low < 2.0 and 4.0625 < high < 8 and left == 1, "the shorter one is seen, too"


def test_a_run_that_changed_settings_is_named_by_its_rank(tmp_path: Path, store: Path) -> None:
    for name in ("changed", "best"):
        make_run(tmp_path / name, store)
    file = tmp_path / "changed" / "run.json"
    record = json.loads(file.read_text()) | {"continued": [{"step": 1, "before": {"run.steps": 1}}]}
    file.write_text(json.dumps(record))
    metrics = tmp_path / "best" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("4.0625", "3.5"))
    done = report(tmp_path / "changed", tmp_path / "best")
    assert "note: [2] changed settings on the way" in done.stdout


def test_where_no_run_has_a_score_none_is_compared_with_none(tmp_path: Path, store: Path) -> None:
    for name in ("one", "two"):
        make_run(tmp_path / name, store)
        metrics = tmp_path / name / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if "eval/loss" not in line))
    done = report(tmp_path / "one", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "there is no step, but for the beginning" in done.stdout and "are compared with none" not in done.stdout


def test_a_layer_whose_mass_is_not_finite_does_not_count(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    metrics = tmp_path / "run" / "metrics.jsonl"
    text = metrics.read_text().replace('"lsh/layer01/recovered_mass": 0.75', '"lsh/layer01/recovered_mass": null')
    metrics.write_text(re.sub(r'(recovered_mass"): 0\.(25|5)\b', r"\1: null", text))
    assert read_curves(tmp_path / "run").recovered_mass() == [(2, 0.875)]


def test_without_a_mixture_samples_are_no_setting(tmp_path: Path, store: Path) -> None:
    make_run(tmp_path / "run", store)
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    record["samples"]["seed"] = 3
    file.write_text(json.dumps(record))
    assert settings(read_curves(tmp_path / "run"))["samples.seed"] == 3
    record["config"]["data"]["mixture"] = {}
    file.write_text(json.dumps(record))
    assert not any(name.startswith("samples") for name in settings(read_curves(tmp_path / "run")))
