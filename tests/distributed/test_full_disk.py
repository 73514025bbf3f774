"""A disk that fills up while a run goes on: a real one, of memory, which takes the rights of root to mount.

What is special: how large a checkpoint is, and which losses are right, is what an undisturbed run says.
"""

import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from on_disk import resize

from trainer import checkpoint

EVERY_STEP = ("run.save_every=1", "run.eval_every=0", "run.keep_last=9", "deepspeed.zero_optimization.stage=1")
STEPS = [f"step_{step:08d}" for step in (1, 2, 3, 4)]

Disk = Callable[[int], Path]


@pytest.fixture
def disk(small_disk: Path) -> Disk:
    """disk(n_bytes): a folder with so much room; called again, it has another size."""

    def sized(n_bytes: int) -> Path:
        resize(small_disk, n_bytes)
        return small_disk

    return sized


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory: pytest.TempPathFactory):
    run = train(2, tmp_path_factory.mktemp("undisturbed") / "run", *EVERY_STEP)
    assert run.code == 0, run.errors
    return run


def n_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def room_for(n_checkpoints: float, undisturbed) -> int:
    """Bytes of a disk on which so many checkpoints find room, besides the run's other files."""
    one = n_bytes(undisturbed.dir / "checkpoints" / STEPS[0])
    others = n_bytes(undisturbed.dir) - len(STEPS) * one
    return int(n_checkpoints * one) + others + checkpoint.SPARE_BYTES


def sound(run_dir: Path) -> list[str]:
    """The names of what is in the folder of checkpoints, each of which must be one that is whole."""
    for each in checkpoint.published(run_dir):
        assert checkpoint.problems(each.path) == []
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(train, undisturbed, disk: Disk) -> None:
    run_dir = disk(room_for(2.5, undisturbed)) / "run"
    run = train(2, run_dir, *EVERY_STEP)
    assert run.code == 2
    assert sound(run_dir) == STEPS[:2]
    (error,) = [line for line in run.errors.splitlines() if line.startswith("error: ")]
    assert STEPS[2] in error and "bytes left" in error and "are needed" in error and "untouched" in error
    assert "Traceback" not in run.errors

    disk(room_for(5, undisturbed))
    again = train(2, run_dir, *EVERY_STEP)
    assert again.code == 0, again.errors
    assert f"continuing from {run_dir / 'checkpoints' / STEPS[1]}, after step 2" in again.output
    assert sound(run_dir) == STEPS
    assert again.column("train/loss") == undisturbed.column("train/loss")


def test_a_run_goes_on_without_a_checkpoint_that_found_no_room(train, undisturbed, disk: Disk) -> None:
    run_dir = disk(room_for(1.5, undisturbed)) / "run"
    run = train(1, run_dir, *EVERY_STEP, "run.on_full_disk=continue")
    assert run.output.count("going on without it") == 2
    assert run.column("step") == [1, 2, 3, 4]
    # There is nothing to go on with after the last step: its checkpoint is what the run was for.
    assert run.code == 2
    assert f"cannot save {run_dir / 'checkpoints' / STEPS[3]}" in run.errors
    assert sound(run_dir) == STEPS[:1]


def test_a_rank_that_cannot_write_holds_up_no_other(
    train_by_srun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets rank 1 write no file beyond a size: what finds room at first fails in the middle."""
    start, ranks = subprocess.Popen, []

    def limited(*arguments, **options):
        ranks.append(start(*arguments, **options))
        if len(ranks) == 2:
            resource.prlimit(ranks[1].pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
        return ranks[-1]

    monkeypatch.setattr(subprocess, "Popen", limited)
    run = train_by_srun(2, tmp_path / "run", *EVERY_STEP)
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "File too large" in run.errors
    assert f"cannot save {run.dir / 'checkpoints' / STEPS[0]}" in run.errors
    assert sound(run.dir) == []


def test_reports_that_find_no_room_stop_the_run_or_are_left_out(train, disk: Disk) -> None:
    """A step's line takes less than a kilobyte: sixty of them do not fit, beside what the run begins with."""
    run_dir = disk(64 * 1024) / "run"
    reports = ("run.eval_every=0", "run.save_every=0", "run.steps=60")
    run = train(1, run_dir, *reports)
    assert run.code == 2
    assert f"error: cannot write the reports in {run_dir}: No space left on device: make room; " in run.errors
    written = run.column("step")
    assert written == list(range(1, len(written) + 1)) and 0 < len(written) < 60

    run = train(1, run_dir, *reports, "run.on_full_disk=continue")
    assert "Going on without (run.on_full_disk='continue')" in run.output
    assert "cannot save" in run.errors, "it did not come to the checkpoint of the last step"


def test_a_profile_that_cannot_be_written_is_a_report_that_cannot(train, tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("not a folder")
    profiled = ("run.profile_steps=1..2", "run.eval_every=0")
    run = train(2, run_dir, *profiled)
    assert run.code == 2
    assert f"error: cannot write the reports in {run_dir}: File exists: make room; " in run.errors
    run = train(2, run_dir, *profiled, "run.on_full_disk=continue")
    assert run.code == 0, run.errors
    assert "File exists: make room; there is no checkpoint yet to go on from. Going on without (run.on" in run.output
    assert run.column("step") == [1, 2, 3, 4]
