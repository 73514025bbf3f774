"""The checkpoint that predicts the held-out rows best is kept, also of a run that was stopped in between."""

import sys
from pathlib import Path

import export
import pytest
from distributed.conftest import Run, Train

from reformer import load_model
from trainer.checkpoint import published, read_weights

SETTINGS = (
    *("run.decay=constant", "run.warmup_steps=0", "run.eval_every=1", "run.save_every=1", "run.keep_last=1"),
    *("deepspeed.optimizer.params.lr=0.1", "run.eval_rows=1", "run.ablation_rows=0", "run.diagnostics=false"),
)
"""Steps so large that the loss goes up and down."""
STEPS = 6


def kept(run: Run) -> list[int]:
    assert run.code == 0, run.errors
    return [each.step for each in published(run.dir)]


def best_of(run: Run) -> int:
    """The step, not the first, of the lowest loss."""
    losses = run.column("eval/loss")[1:]
    return 1 + losses.index(min(losses))


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(1, tmp_path_factory.mktemp("whole") / "run", *SETTINGS, f"run.steps={STEPS}", "run.keep_best=true")


def test_it_is_kept_beside_the_newest(whole: Run) -> None:
    assert 1 < best_of(whole) < STEPS - 1, "a test that says nothing: other steps are better"
    assert kept(whole) == [best_of(whole), STEPS]


def test_a_run_that_goes_on_knows_it(train: Train, whole: Run, tmp_path: Path) -> None:
    """Stopped right after it, and then again."""
    for stop in (best_of(whole), STEPS - 1, STEPS):
        run = train(1, tmp_path / "run", *SETTINGS, f"run.steps={stop}", "run.keep_best=true")
        assert kept(run) == sorted({best_of(whole), stop})
    assert run.column("eval/loss") == whole.column("eval/loss")


def test_it_is_exported(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(run: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--best", "--output", str(tmp_path / "model")])
        return export.main(), "".join(capsys.readouterr())

    code, said = call(whole.dir)
    assert code == 0 and f"after {best_of(whole)} steps" in said
    best = next(each for each in published(whole.dir) if each.step == best_of(whole))
    weights, model = read_weights(best.path), load_model(tmp_path / "model").state_dict()
    assert weights.keys() == model.keys() and all(weights[name].equal(model[name]) for name in weights)

    code, said = call(best.path)
    assert code == 2 and f"--best is for the folder of a run, and {best.path} has no checkpoints in it" in said
    best.path.rename(tmp_path / "elsewhere")
    code, said = call(whole.dir)
    (tmp_path / "elsewhere").rename(best.path)
    assert code == 2 and f"was best after step {best_of(whole)}, whose checkpoint is not there any more" in said


def test_it_is_not_kept_where_nobody_asks(train: Train, tmp_path: Path) -> None:
    assert kept(train(1, tmp_path / "run", *SETTINGS, f"run.steps={STEPS}")) == [STEPS]
    run = train(1, tmp_path / "other", *SETTINGS, "run.keep_best=true", "run.eval_every=0")
    assert run.code == 2 and "run.keep_best=true, and run.eval_every=0 evaluates nothing" in run.errors
