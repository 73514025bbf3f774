"""A run that stopped and continued equals one that did not, bit for bit; what cannot continue is refused."""

import json
import shutil
from pathlib import Path

import pytest
from distributed.conftest import Run
from on_disk import flip
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TIMELESS = (
    *(
        f"train/{name}"
        for name in ("loss", "bits_per_byte", "lr", "grad_norm", "param_norm", "skipped_steps", "spikes")
    ),
    *(f"eval/{name}" for name in ("loss", "bits_per_byte", "loss_without_lsh", "lsh_gain", "loss_at/00256")),
    "lsh/layer01/largest_bucket_over_mean",
    "lsh/layer01/empty_buckets",
    "lsh/layer01/recovered_mass",
    "reversible/reconstruction_error",
)
"""What a run reports that no clock has a part in."""
DROPOUT = ("model.dropout=0.1", "deepspeed.zero_optimization.stage=2")
ROOM = 1e-5
"""How far the losses of other ranks and stages may be apart, relatively."""


def curve(run) -> list[dict[str, float]]:
    return [{tag: line[tag] for tag in ("step", *TIMELESS) if tag in line} for line in run.metrics]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory) -> Run:
    """Two ranks. Tests break it and have it continued, to the same end."""
    run = train(2, tmp_path_factory.mktemp("undisturbed") / "run", *DROPOUT)
    assert run.code == 0, run.errors
    return run


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, DROPOUT),
        (1, ("deepspeed.zero_optimization.stage=0",)),
        (2, DROPOUT),
        (2, ("deepspeed.zero_optimization.stage=3", "deepspeed.bf16.enabled=true")),
    ],
)
def test_resumed_equals_uninterrupted(train, undisturbed: Run, tmp_path: Path, ranks: int, changes: tuple[str, ...]):
    is_here = (ranks, changes) == (2, DROPOUT)
    run = undisturbed if is_here else train(ranks, tmp_path / "run", *changes)
    assert run.code == 0, run.errors
    whole = curve(run)
    assert {tag for line in whole for tag in line} == {"step", *TIMELESS}
    checkpoints = run.dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]

    # As if it had died while saving step 4, after reporting it.
    (checkpoints / "step_00000004").rename(checkpoints / ".partial-step_00000004")
    again = train(ranks, run.dir, *changes)
    assert again.code == 0, again.errors
    assert f"continuing from {checkpoints / 'step_00000002'}, after step 2" in again.output
    assert "note: " not in again.output, "nothing has changed since"
    assert curve(again) == whole
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
    assert json.loads((run.dir / "run.json").read_text())["resumed_from_step"] == 2

    events = EventAccumulator(str(run.dir / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {tag for line in again.metrics for tag in line} - {"step"}
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    for tag in ("eval/loss", "lsh/layer01/recovered_mass"):
        assert [event.step for event in events.Scalars(tag)] == [0, 4]


def test_on_other_ranks_and_under_another_stage(train, tmp_path: Path):
    """The same samples in the same order, and losses within rounding. All other changes: test_state.py."""
    run = train(2, tmp_path / "run", "model.dropout=0.1", "deepspeed.zero_optimization.stage=3")
    assert run.code == 0, run.errors
    tags = ("step", "train/loss", "train/lr", "train/grad_norm", "train/param_norm", "eval/loss")
    expected = {tag: run.column(tag) for tag in tags}
    shutil.rmtree(run.dir / "checkpoints" / "step_00000004")
    again = train(1, run.dir, "model.dropout=0.1", "deepspeed.zero_optimization.stage=1")
    assert again.code == 0, again.errors
    assert "after step 2" in again.output
    assert "note: deepspeed.zero_optimization.stage was 3 and is 1 now" in again.output
    for tag in tags:
        assert again.column(tag) == pytest.approx(expected[tag], rel=ROOM), tag


def test_a_damaged_checkpoint_is_reported_and_the_one_before_continues(train, undisturbed: Run):
    run = undisturbed
    whole, checkpoints = curve(run), run.dir / "checkpoints"
    file = checkpoints / "step_00000004" / "rank_00001.safetensors"
    flip(file, -5)
    again = train(2, run.dir, *DROPOUT)
    assert again.code == 0, again.errors
    assert f"damaged checkpoint {file.parent}: rank_00001.safetensors is not what was written" in again.output
    assert "after step 2" in again.output
    assert curve(again) == whole
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["damaged-step_00000004", "step_00000002", "step_00000004"]


def test_a_mixture_is_continued_where_it_was_and_by_no_other(train, store: Path, other_store: Path, tmp_path: Path):
    mixture = [f"data.mixture.{name}.store={path}" for name, path in (("one", store), ("two", other_store))]
    changes = [*mixture, "data.mixture.one.weight=2", "data.mixture.two.weight=1", "data.mixture.two.eval_split=val"]
    run = train(1, tmp_path / "run", *changes)
    assert run.code == 0, run.errors
    tags = ("train/loss", "train/grad_norm", "eval/source/two/loss", "eval/source/two/bits_per_byte")
    whole = [run.column(tag) for tag in tags]
    assert [len(values) for values in whole] == [4, 4, 2, 2]
    assert "held-out rows of two\n" in run.output
    of_one = run.column("eval/loss")[-1]
    assert json.loads((run.dir / "run.json").read_text())["samples"]["one.per_thousand"] == 667
    shutil.rmtree(run.dir / "checkpoints" / "step_00000004")
    other = train(1, run.dir, *changes, "data.mixture.two.weight=2")
    assert other.code == 2
    assert (
        "store_fingerprint.one.per_thousand was 667 and is 500 now: how many of 1,000 samples are its own follows from "
        "data.mixture.*.weight; set these back, or start anew in another run.dir" in other.errors
    )
    # The losses stay; data.store is for evaluations only, and a change of it is told.
    again = train(1, run.dir, *changes, f"data.store={other_store}")
    assert again.code == 0, again.errors
    assert [again.column(tag) for tag in tags] == whole
    assert again.column("eval/loss")[-1] == again.column("eval/source/two/loss")[-1] != of_one
    evaluated = json.loads((again.dir / "run.json").read_text())["evaluated"]
    assert {name: each["since"] for name, each in evaluated.items()} == {"": 3, "two": 0}
    assert evaluated[""]["rows"] == evaluated["two"]["rows"]
    assert "note: eval_store_fingerprint was " in again.output


def test_a_run_goes_on_by_its_own_folder(train, tmp_path: Path):
    """With the settings of before, and none of the file's; what is changed is said, and stays in the record."""
    changes = ("run.eval_every=0", "run.diagnostics=false", "model.n_hashes=1", "deepspeed.gradient_clipping=0.5")
    whole = train(1, tmp_path / "whole", "run.decay=constant", "run.steps=3", *changes)
    assert train(1, tmp_path / "run", "run.decay=constant", "run.steps=2", *changes).code == 0
    again = train(1, tmp_path / "run", "--config", str(tmp_path / "run"), "run.steps=3")
    assert again.code == 0, again.errors
    assert [line for line in again.output.splitlines() if "note: " in line] == ["note: run.steps was 2 and is 3 now"]
    assert curve(again) == curve(whole)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["continued"] == [{"step": 2, "before": {"run.steps": 2}}]
    done = train(1, tmp_path / "run", "--config", str(tmp_path / "run"), "deepspeed.optimizer.params.lr=0.5")
    assert done.code == 0 and "nothing to do" in done.output and "params.lr was" in done.output
    reported = (again.dir / "metrics.jsonl").read_text()
    shutil.rmtree(again.dir / "checkpoints")
    anew = train(1, again.dir, "--config", str(again.dir))
    kept = again.dir / "before" / "0001"
    assert f"note: there was a run without a checkpoint; its curves are in {kept}" in anew.output
    assert (kept / "metrics.jsonl").read_text() == reported and curve(anew) == curve(whole)


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    run = train(1, tmp_path_factory.mktemp("finished") / "run", "run.steps=2", "run.diagnostics=false")
    assert run.code == 0, run.errors
    return run


def test_a_run_that_is_new_says_so(finished):
    assert f"starting anew in {finished.dir}" in finished.output


def test_without_diagnostics_an_evaluation_is_the_loss_alone(finished):
    tags = {tag.split("/")[0] for line in finished.metrics if "eval/loss" in line for tag in line}
    assert tags == {"step", "eval"}


def test_a_finished_run_has_nothing_to_do(train, finished):
    run = train(1, finished.dir, "run.steps=2")
    assert run.code == 0
    assert "nothing to do" in run.output


def test_a_new_run_is_not_begun_over_another(train, finished):
    run = train(1, finished.dir, "--new")
    assert run.code == 2
    assert "already holds a run up to step 2: leave out --new to continue it" in run.errors


def test_what_does_not_belong_to_the_run_is_refused(train, finished, other_store: Path):
    run = train(1, finished.dir, f"data.store={other_store}", "model.n_hashes=4", "run.seed=1")
    assert run.code == 2
    assert f"cannot continue from {finished.dir / 'checkpoints' / 'step_00000002'}" in run.errors
    assert "model.n_hashes was 2 and is 4 now" in run.errors
    assert "run.seed was 0 and is 1 now" in run.errors
    assert "store_fingerprint was" in run.errors
    assert len(run.errors.splitlines()) == 4


def test_only_the_last_checkpoints_are_kept(train, tmp_path: Path):
    run = train(1, tmp_path / "run", "run.steps=3", "run.save_every=1", "run.keep_last=2", "run.eval_every=0")
    assert sorted(path.name for path in (run.dir / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]
    assert not any("eval/loss" in line for line in run.metrics)
