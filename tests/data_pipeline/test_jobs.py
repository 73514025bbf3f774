"""Work shared through a directory: every task is done, mostly once, whoever dies; and one job at a time."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from data_pipeline import jobs
from data_pipeline.errors import DataError
from data_pipeline.jobs import membership, record_name, run_stage
from data_pipeline.staging import publishing
from data_pipeline.team import default_workers, find_team


def finish(records: Path, task: int, log: list[int] | None = None) -> None:
    if log is not None:
        log.append(task)
    with publishing(records / f"{record_name(task)}.json") as file:
        file.write(str(task).encode())


def test_every_task_is_done_once_by_many(tmp_path: Path) -> None:
    records, log = tmp_path / "stage", []

    def do(task: int) -> None:
        time.sleep(0.001)
        finish(records, task, log)

    workers = [threading.Thread(target=run_stage, args=(records, ".json", range(200), do)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(log) == list(range(200))
    assert sorted(path.name for path in records.iterdir()) == [f"{task:08d}.json" for task in range(200)]


def test_what_has_a_record_is_not_done_again(tmp_path: Path) -> None:
    records, log = tmp_path / "stage", []
    run_stage(records, ".json", range(5), lambda task: finish(records, task, log))
    (records / "00000002.json").unlink()
    run_stage(records, ".json", range(5), lambda task: finish(records, task, log))
    assert log == [0, 1, 2, 3, 4, 2]


def test_an_error_frees_the_task(tmp_path: Path) -> None:
    records, log = tmp_path / "stage", []

    def fail(task: int) -> None:
        raise DataError("bad")

    with pytest.raises(DataError):
        run_stage(records, ".json", [0], fail)
    run_stage(records, ".json", [0], lambda task: finish(records, task, log))
    assert log == [0]


def test_a_claim_of_one_who_died_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BEAT_S", 0.05)
    records, log, begun, other_is_done = tmp_path / "stage", [], threading.Event(), threading.Event()
    records.mkdir()
    dead, living = (records / f"{record_name(task)}.claim" for task in (1, 0))
    dead.touch()
    os.utime(dead, (0, 0))

    def do(task: int) -> None:
        if task == 0:
            begun.set()
            other_is_done.wait(60)
        finish(records, task, log)
        other_is_done.set()

    slow = threading.Thread(target=run_stage, args=(records, ".json", [0], do))
    slow.start()
    assert begun.wait(60)
    os.utime(living, (0, 0))  # as if it were held for longer than the expiry: who lives touches it
    while not living.stat().st_mtime:
        time.sleep(0.01)
    run_stage(records, ".json", range(2), do)
    slow.join()
    assert log == [1, 0]


def test_it_stops_when_asked(tmp_path: Path) -> None:
    log: list[int] = []
    run_stage(tmp_path / "s", ".json", range(9), lambda task: finish(tmp_path / "s", task, log), lambda: len(log) == 3)
    assert log == [0, 1, 2]


def test_what_is_published_is_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publishing(tmp_path / "a") as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with publishing(tmp_path / "a") as file:
        file.write(b"whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_one_job_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PATIENCE_S", 0.1)
    work, what = tmp_path / "work", tmp_path / "store"
    with membership(work, "one", what, keep=lambda: True):
        with membership(work, "one", what, keep=lambda: True):  # another process of the same job
            pass
        with (
            pytest.raises(DataError, match="store is being built by another process"),
            membership(work, "two", what, keep=lambda: True),
        ):
            pass
    (work / "tokens").mkdir()
    (work / "tokens" / "00000003.claim").touch()
    (work / "tokens" / "x.partial").touch()
    (work / "job.json.1.partial").touch()  # a shard that was being written lies there, too
    for leftover in ("tokens.1.gone", "content.1"):
        (work / leftover / "c").mkdir(parents=True)
    (work / "content").mkdir()
    with membership(work, "two", what, keep=lambda: False):
        assert list((work / "tokens").iterdir()) == [], "what the dead have left is removed"
        assert {path.name for path in work.iterdir()} == {"content", "door", "job", "members", "tokens"}
    assert not work.exists()


def test_what_was_killed_while_it_removed_the_work_is_finished(tmp_path: Path) -> None:
    for name in ("[work].1f.gone", "[work].2.gone", "w.1.gone", "[work].gone", "[work].x"):
        (tmp_path / name / "tokens").mkdir(parents=True)
    jobs.remove_gone(tmp_path / "[work]")
    assert {path.name for path in tmp_path.iterdir()} == {"w.1.gone", "[work].gone", "[work].x"}


def test_the_last_to_leave_removes_the_work(tmp_path: Path) -> None:
    work, what = tmp_path / "work", tmp_path / "store"
    with membership(work, "one", what, keep=lambda: False):
        with membership(work, "one", what, keep=lambda: False):
            pass
        assert work.exists()
    assert not work.exists()


def test_coming_while_the_last_one_leaves(tmp_path: Path) -> None:
    work, failures = tmp_path / "work", []

    def come_and_go() -> None:
        try:
            for _ in range(100):
                with membership(work, "one", work, keep=lambda: False):
                    pass
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["link/work", "file/work", "link"])
def test_where_there_can_be_no_folder_nobody_waits_for_one(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    come = membership(tmp_path / place, "one", tmp_path / "store", keep=lambda: True)
    with pytest.raises(DataError, match=r"cannot write to --output .*store: .* is not a folder: choose another"), come:
        pass


def hold(work: Path, ready: str) -> None:
    with membership(work, "one", work, keep=lambda: True):
        Path(ready).touch()
        time.sleep(60)


def test_a_killed_job_lets_the_next_one_in(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "work", str(tmp_path / "in")))
    process.start()
    while not (tmp_path / "in").exists():
        time.sleep(0.01)
    process.kill()
    with membership(tmp_path / "work", "two", tmp_path, keep=lambda: True):  # waits for it to disappear
        assert (tmp_path / "work" / "job").read_text() == "two"


ARRAY = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, ("slurm-array-5", 0, 3, "SLURM array")),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "SLURM_PROCID": "0"}, ("slurm-array-5", 2, 3, "SLURM array")),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "1", "OMPI_COMM_WORLD_RANK": "1"}, ("slurm-array-5", 1, 3, "SLURM array")),
        (STEP, ("slurm-7.2.0", 3, 4, "srun")),
        ({**STEP, "SLURM_RESTART_COUNT": "1"}, ("slurm-7.2.1", 3, 4, "srun")),
        ({**STEP, "PMI_SIZE": "4"}, ("slurm-7.2.0", 3, 4, "srun")),
        ({**STEP, "OMPI_COMM_WORLD_SIZE": ""}, ("slurm-7.2.0", 3, 4, "srun")),
    ],
)
def test_teams_under_slurm(environ: dict[str, str], expected: tuple) -> None:
    assert find_team(environ) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script of a job of several tasks
        {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_ID": "0"},
    ],
)
def test_alone(environ: dict[str, str]) -> None:
    one, other = find_team(environ), find_team(environ)
    assert one[1:] == (0, 1, "this process")
    assert one.job != other.job


def test_an_mpi_that_mpi4py_does_not_see() -> None:
    with pytest.raises(DataError, match="mpirun started 2 processes, but mpi4py sees 1"):
        find_team({"OMPI_COMM_WORLD_SIZE": "2"})
    with pytest.raises(DataError, match="mpirun started 3 processes, but mpi4py sees 1"):
        find_team({"MV2_COMM_WORLD_SIZE": "3"})


def test_variables_that_are_no_numbers() -> None:
    """A rank that is missing is not rank 0, as all of them would be."""
    for environ in ({**STEP, "SLURM_PROCID": ""}, ARRAY):
        with pytest.raises(
            DataError, match=r"(SLURM_PROCID|SLURM_ARRAY_TASK_ID)='' in the environment should be a num"
        ):
            find_team(environ)
    message = "SLURM_STEP_NUM_TASKS='four' in the environment should be a number: unset it, or correct it"
    for find in (find_team, default_workers):
        with pytest.raises(DataError, match=message):
            find({**STEP, "SLURM_STEP_NUM_TASKS": "four"})


def test_default_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_workers({}) == cores
    assert default_workers({"OMPI_COMM_WORLD_SIZE": "4"}) == 1
    assert default_workers({"SLURM_CPUS_PER_TASK": ""}) == cores
    assert default_workers({"SLURM_STEP_NUM_TASKS": "4"}) == 1
    assert default_workers({"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "1"}) == 1
    assert default_workers({"SLURM_CPUS_PER_TASK": "1000"}) == cores
