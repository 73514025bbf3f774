"""launch/train.py --check: what a run would be, on ranks that are not there."""

import re
from pathlib import Path

from distributed.conftest import Train

from trainer.run_lock import hold

RUN = """\
model        49,794 parameters in 2 layers (1 local, 1 lsh), fp32
data         14 rows of 256 tokens from train of {store}, 14.29 times in 50 steps
step         4 rows, 1,024 tokens, 3.23e+08 FLOPs; of {step}
checkpoints  about 0.000556 GiB each, {kept} of them at most; … are free there
run          {run}
"""


def without_room(output: str) -> str:
    """The room on this disk is another one each time."""
    return re.sub(r"[\d,.e+]+ GiB are free", "… are free", output)


def test_it_says_what_the_run_would_be_and_writes_nothing(train: Train, store: Path, tmp_path: Path) -> None:
    course = ("run.steps=50", "run.save_every=4", "run.keep_every=10", "run.keep_best=true")  # 20, 40; 2 + 1; 1
    new = train(1, tmp_path / "run", "--check", "2", *course)
    assert (new.code, new.errors) == (0, "")
    each = "2 ranks each rank takes 1 row at a time, 2 times"
    anew = f"begins anew in {tmp_path / 'run'} with untrained weights"
    assert without_room(new.output) == RUN.format(store=store, step=each, kept=6, run=anew)
    assert not (tmp_path / "run").exists()

    assert train(1, tmp_path / "run").code == 0
    before = sorted(tmp_path.rglob("*"))
    course = ("run.steps=50", "run.save_every=0", "run.keep_every=10")
    shared = train(1, tmp_path / "run", "--check", "8", "run.sequence_parallel=2", *course)
    each = "8 ranks each group of 2 takes 1 row at a time, 1 time"
    goes_on = f"goes on from {tmp_path / 'run/checkpoints/step_00000004'}, if that is sound, to step 50"
    differences = (
        "note: run.keep_every was 0 and is 10 now",
        "note: run.save_every was 2 and is 0 now",
        "note: run.sequence_parallel was 1 and is 2 now",
        "note: run.steps was 4 and is 50 now: from here on the learning rate is that of a run of so many steps",
    )
    assert without_room(shared.output) == RUN.format(
        store=store, step=each, kept=1, run="\n".join((goes_on, *differences))
    )
    with hold(tmp_path / "run"):
        done = train(1, tmp_path / "run", "--check", "1").output.splitlines()[-1]
    assert done.startswith(
        f"run          nothing to do: {tmp_path / 'run'} is at step 4, run.steps=4; at this moment it is"
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_start_would_refuse(train: Train, tmp_path: Path) -> None:
    assert train(1, tmp_path / "run", "run.steps=1").code == 0
    for changes, said in {
        ("3",): "train_batch_size=4 is not divisible by train_micro_batch_size_per_gpu=1 times 3 ranks",
        ("4", "run.seed=1"): "run.seed was 0 and is 1 now",
        ("4", "--new"): "already holds a run up to step 1",
        ("4", "run.dir=pyproject.toml"): "pyproject.toml: Not a directory: choose another folder",
        ("0",): "0 is not a whole number of at least 1",
    }.items():
        refused = train(1, tmp_path / "run", "--check", *changes)
        assert refused.code == 2 and said in refused.errors and not refused.output


def test_a_mixture(train: Train, store: Path, other_store: Path, tmp_path: Path) -> None:
    stores = {"a": (store, 3), "b": (other_store, 1)}
    mixture = [f"data.mixture.{name}.store={path}" for name, (path, _) in stores.items()]
    mixture += [f"data.mixture.{name}.weight={weight}" for name, (_, weight) in stores.items()]
    found = train(1, tmp_path / "run", "--check", "1", "run.steps=7", "deepspeed.train_batch_size=8", *mixture)
    assert found.output.splitlines()[1:3] == [
        f"data         75.0% of all samples: 14 rows of 256 tokens from train of {store}, 3.00 times in 7 steps",
        f"data         25.0% of all samples: 14 rows of 256 tokens from train of {other_store}, 1.00 times in 7 steps",
    ]
