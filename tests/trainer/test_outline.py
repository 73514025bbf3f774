"""What an outline says of checkpoints and of the beginning, in cases that no start of test_check.py shows."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluation import config

from data_pipeline.errors import DataError
from trainer import outline

ADAM = {"type": "AdamW"}


def job(optimizer: dict[str, object] = ADAM, **run: object) -> SimpleNamespace:
    return SimpleNamespace(config=config(run=run), deepspeed={"optimizer": optimizer})


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(ADAM, 3), ({"type": "Adam", "params": {"amsgrad": True}}, 4), ({"type": "Adafactor", "params": {}}, 1)],
    ids=str,
)
def test_a_checkpoint_is_as_large_as_weights_and_moments_in_fp32(optimizer: dict[str, object], expected: int) -> None:
    assert f"about {expected} GiB each" in outline._checkpoints(job(optimizer), 2**28)


def test_a_checkpoint_of_bf16_master_weights_is_half_as_large() -> None:
    halves = job()
    halves.deepspeed["bf16"] = {"bf16_master_weights_and_grads": True}
    assert "about 1.5 GiB each" in outline._checkpoints(halves, 2**28)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"save_every": 4, "keep_last": 9}, 3),
        ({"save_every": 4, "keep_last": 1}, 2),
        ({"save_every": 1, "keep_last": 1, "keep_best": True}, 3),
        ({"save_every": 2, "keep_last": 1, "keep_every": 3}, 3),
        ({"save_every": 0, "keep_last": 2}, 1),
    ],
    ids=str,
)
def test_as_many_are_there_at_most_as_are_saved_and_kept(run: dict[str, int], expected: int) -> None:
    assert f" each, {expected} of them at most; " in outline._checkpoints(job(steps=9, **run), 1)


def test_the_room_is_that_of_the_disk_where_the_run_is_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {tmp_path: 3 * 2**30}
    monkeypatch.setattr(outline.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    there = job(dir=tmp_path / "not" / "there", steps=2, save_every=1, keep_last=1)
    assert outline._checkpoints(there, 1).endswith("; 3 GiB are free there")
    assert outline._checkpoints(there, 2**27).endswith("1.5 GiB each, 2 of them at most; 3 GiB are free there")
    assert outline._checkpoints(there, 2**27 + 1).endswith("; 3 GiB are free there, which is not enough")
    free[there.config.run.dir] = 2 * 2**30
    for step, said in ((1, "2 GiB are free there"), (2, "2 GiB are free there")):  # one more must fit; none
        (there.config.run.dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        assert outline._checkpoints(there, 2**27 + 1).endswith(said)


def test_a_run_that_is_beyond_its_steps_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)
    for steps, said in ((8, "nothing to do: "), (9, "nothing to do: "), (10, "goes on from ")):
        assert outline._beginning(job(dir=tmp_path, steps=steps)).startswith(f"run          {said}")


def test_a_new_run_says_whose_weights_it_begins_with(tmp_path: Path) -> None:
    for weights, given in (("untrained weights", {}), ("the weights of other", {"init_from": "other"})):
        expected = f"run          begins anew in {tmp_path} with {weights}"
        assert outline._beginning(job(dir=tmp_path, **given)) == expected


def test_changes_are_those_since_the_newest_checkpoint_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_state(path: Path) -> dict[str, object]:
        if path.name == "step_00000009":
            raise DataError("damaged")
        return {"run": {"model": {}, "run": {"steps": int(path.name[5:])}}}

    monkeypatch.setattr(outline, "read_state", read_state)
    this = SimpleNamespace(**vars(job(dir=tmp_path)), identity={"model": {}, "run": {"steps": 7}})
    assert outline._changes(this) == []
    for step in (9, 4, 3):
        (tmp_path / "checkpoints" / f"step_0000000{step}").mkdir(parents=True)
    assert outline._changes(this) == ["note: run.steps was 4 and is 7 now"]
