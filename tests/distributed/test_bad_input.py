"""With two ranks, a mistake ends both with a message and a non-zero exit code; under a launcher at once, with one."""

import shutil
from pathlib import Path

from data_pipeline.order import permute


def messages(run) -> int:
    return sum(line.startswith("error: ") for line in run.errors.splitlines())


def test_a_wrong_configuration(train_by_deepspeed, tmp_path: Path):
    """Under a launcher, which ends the other rank before it says the same."""
    run = train_by_deepspeed(2, tmp_path / "run", "run.stesp=3")
    assert run.code != 0
    assert messages(run) == 1
    assert "error: [run] unknown key 'stesp': did you mean 'steps'?" in run.errors
    assert "Traceback" not in run.errors
    assert not run.dir.exists()


def test_a_batch_that_the_ranks_cannot_share(train, tmp_path: Path):
    run = train(2, tmp_path / "run", "deepspeed.train_batch_size=3")
    assert run.code == 2
    wrong = "deepspeed.train_batch_size=3 is not divisible by train_micro_batch_size_per_gpu=1 times 2 ranks: "
    assert f"error: {wrong}2 or 4 would do" in run.errors
    assert "Traceback" not in run.errors
    assert not run.dir.exists()


def test_a_missing_shard(train, store: Path, tmp_path: Path):
    damaged = tmp_path / "store"
    shutil.copytree(store, damaged)
    shard = next((damaged / "tokens" / "c").rglob("0"))
    while shard.is_dir():
        shard = next(shard.iterdir())
    shard.unlink()
    run = train(2, tmp_path / "run", f"data.store={damaged}")
    assert run.code == 2
    assert str(shard) in run.errors
    assert "Traceback" not in run.errors
    assert not run.dir.exists()


def test_a_damaged_shard_found_while_training(train, damaged: Path, tmp_path: Path):
    """In the step that reads it; nothing may hang then either."""
    run = train(2, tmp_path / "run", f"data.store={damaged}", "run.save_every=0")
    assert run.code != 0
    assert messages(run) == 1
    assert f"row 0 of {damaged} is damaged in shard {damaged / 'tokens/c/0/0'}" in run.errors
    assert "Traceback" not in run.errors
    assert not any((run.dir / "checkpoints").glob("step_*"))


def test_a_damaged_row_may_be_left_out(train, damaged: Path, tmp_path: Path):
    """Of 14 rows in 16 samples, whichever rank has it; all of them count."""
    changes = ["data.on_damage=skip", "run.eval_every=0", "run.save_every=0"]
    run = train(2, tmp_path / "run", f"data.store={damaged}", *changes)
    assert run.code == 0, run.errors
    steps = [i // 4 for i in range(16) if permute(i % 14, 14, seed=0, epoch=i // 14) == 0]
    assert run.column("data/skipped_rows") == [sum(step <= done for step in steps) for done in range(4)]
    assert run.errors.count(f"left out: row 0 of {damaged} is damaged in shard") == len(steps) >= 1
    assert None not in run.column("train/loss")


def test_an_error_that_only_one_rank_has_is_not_lost(train_by_srun, tmp_path: Path):
    """Started by hand without a launcher that would end the others, every rank speaks for itself."""
    run = train_by_srun(2, tmp_path / "run", "run.stesp=3")
    assert run.code == 2
    assert messages(run) == 2


def test_a_run_that_diverges_stops_and_saves_nothing_more(train, tmp_path: Path):
    changes = ["deepspeed.optimizer.params.lr=1e30", "run.warmup_steps=0", "deepspeed.gradient_clipping=0"]
    changes += ["run.max_nonfinite=2", "run.save_every=1", "run.eval_every=0"]
    run = train(2, tmp_path / "run", *changes)
    assert run.code == 2
    assert messages(run) == 1
    assert "training diverged. Lower deepspeed.optimizer.params.lr" in run.errors
    assert "Traceback" not in run.errors
    assert "was finite: none. In doubt, and to be removed before the same command goes on: step_00000001" in run.errors
    assert "step 2 has a loss of nan and a gradient norm of inf: it changes nothing" in run.output
    assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step_00000001"]
