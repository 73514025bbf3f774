"""A run that begins with the weights of another: where that one was, and as if it had had them from the beginning."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from distributed.conftest import ROOT, Run

from data_pipeline.tokenizer_folder import read_tokenizer
from trainer.initial import folder_sha256

STAGE = ("deepspeed.zero_optimization.stage=3",)
BF16 = ("deepspeed.bf16.enabled=true",)


@pytest.fixture(scope="module")
def before(train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A run of two ranks, and what launch/export.py makes of it."""
    folder = tmp_path_factory.mktemp("before")
    run = train(2, folder / "run", *STAGE)
    assert run.code == 0, run.errors
    command = [sys.executable, "launch/export.py", str(run.dir), "--output", str(folder / "model")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return run, folder / "model"


def test_it_begins_where_the_other_was_and_goes_on_as_every_run(before, train, tmp_path: Path) -> None:
    other, folder = before
    own = shutil.copytree(folder, tmp_path / "model")
    changes = [*STAGE, f"run.init_from={own}", "run.seed=7"]
    run = train(2, tmp_path / "run", *changes)
    assert run.code == 0, run.errors
    assert f"starting anew in {run.dir} with the weights of {own}; first these are evaluated" in run.output
    assert run.column("eval/loss")[0] == other.column("eval/loss")[-1]
    assert run.column("train/lr") == other.column("train/lr"), "the course of the learning rate begins again"
    whole = run.column("train/loss")
    began_with = json.loads((run.dir / "run.json").read_text())["initial_sha256"]
    assert began_with == folder_sha256(own)
    assert read_tokenizer(run.dir)[0].sha256 == json.loads((own / "tokenizer.json").read_text())["sha256"]

    # Who goes on has weights of its own, wherever those of the beginning are now.
    shutil.rmtree(own)
    for now in (changes, [*STAGE, "run.seed=7"]):
        shutil.rmtree(run.dir / "checkpoints" / "step_00000004")
        again = train(2, run.dir, *now)
        assert again.code == 0, again.errors
        assert "after step 2" in again.output
        assert again.column("train/loss") == whole
    assert "note: " not in again.output
    assert json.loads((run.dir / "run.json").read_text())["initial_sha256"] == began_with
    (state,) = (run.dir / "checkpoints" / "step_00000004").glob("state.json")
    assert json.loads(state.read_text())["run"]["run"]["init_from"] == str(own), "as the line that began it says"


def test_in_bf16_the_fp32_weights_are_those_of_the_folder(before, train, tmp_path: Path) -> None:
    other, folder = before
    changes = [*BF16, f"run.init_from={folder}", "run.steps=1", "deepspeed.optimizer.params.lr=1e-30"]
    run = train(1, tmp_path / "run", *changes, "deepspeed.optimizer.params.weight_decay=0")
    assert run.code == 0, run.errors
    assert run.column("train/param_norm") == pytest.approx(other.column("train/param_norm")[-1:], rel=1e-12)


def test_a_folder_that_does_not_fit_ends_all_ranks(before, train, tmp_path: Path) -> None:
    _, folder = before
    run = train(2, tmp_path / "run", f"run.init_from={folder}", "model.d_ff=96")
    assert run.code == 2
    assert f"error: run.init_from={folder} holds another model than [model]: model.d_ff is 96, and 128 " in run.errors
    assert "Traceback" not in run.errors
    assert not run.dir.exists()
