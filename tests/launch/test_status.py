"""What a run is doing, from outside: running, ended in every way, half-written, damaged, or no run at all."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import status

import trainer.status
from trainer import ranks, run_files
from trainer.ranks import RankState
from trainer.run_files import LOCK

ROOT = Path(__file__).parents[2]

STATE = RankState(0, 2, "n1", 100, 7, 3, "backward", 1.0, 30.0, "trainer/loop.py:12 in step", True, 1e9)
SPEED = {"speed/tokens_per_s": 12_345.0, "speed/step_s": 4.0, "train/skipped_steps": 3.0, "train/spikes": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def make_run(folder: Path) -> Path:
    """Two ranks after 6 of 100 steps, one of them further back."""
    (folder / "ranks").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"run": {"steps": 100}}}))
    say(folder, STATE)
    say(folder, replace(STATE, rank=1, pid=101, turn=1, phase="data", waiting=False))
    lines = [{"step": step, "train/loss": 8.0 - step, "train/bits_per_byte": 9.0, **SPEED} for step in range(1, 7)]
    lines[2]["train/loss"] = None  # type: ignore[assignment]
    lines.insert(0, {"step": 0, "eval/loss": 5.5, "eval/bits_per_byte": 7.25})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "tra')
    return folder


def say(run: Path, state: RankState) -> None:
    ranks.write_state(run, state)


def end(run: Path, *endings: str | None) -> None:
    for rank, ended in enumerate(endings):
        say(run, replace(STATE, rank=rank, ended=ended))


def checkpoint(run: Path, step: int) -> Path:
    """One that is sound by its checksums."""
    path = run / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in ("rank_00000.safetensors", "state.json"):
        (path / name).write_text(f"{name} of {step}")
    sums = subprocess.run(
        ["sha256sum", "rank_00000.safetensors", "state.json"], cwd=path, capture_output=True, check=True
    )
    (path / "SHA256SUMS").write_bytes(sums.stdout)
    return path


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Somebody trains there."""
    with (run / LOCK).open("w") as file:
        json.dump({"host": "n1", "pid": 100, "job": "77", "started": "2026-11-24T10:00:00+00:00"}, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lines_of(run: Path) -> dict[str, str]:
    """The text by the word at the begin of each line."""
    return {line[:12].strip(): line[12:] for line in status.text(status.facts(run)).splitlines()}


def test_a_run_at_work(run: Path) -> None:
    newest = checkpoint(run, 5)
    with held(run):
        lines = lines_of(run)
    assert lines["state"] == "training"
    assert lines["by"] == "pid 100 on n1, SLURM job 77, since 2026-11-24T10:00:00+00:00"
    assert lines["step"] == "6 of 100 (6.0%), 0:06:16 left without evaluations and checkpoints"
    assert lines["ranks"].startswith("2 on 1 host, last sign of life ")
    assert lines["last"] == "rank 1 (pid 101 on n1): 1.0 s in 'data' of step 7, at trainer/loop.py:12 in step"
    assert lines["speed"] == "12,345 tokens/s, 4 s a step"
    assert lines["train loss"] == "2.0000 at step 6, 9.0000 bits per byte  █▇ ▄▂▁"
    assert lines["held out"].startswith("5.5000 at step 0, 7.2500 bits per byte")
    assert lines["trouble"] == "steps skipped: 3, spikes of the loss: 1, by step 6"
    assert lines["checkpoint"] == f"{newest}, sound"
    assert not {"damaged", "hang", "quiet", "missing", "ended"} & lines.keys()


def test_a_run_that_was_stopped_between_two_lines_of_its_metrics(run: Path) -> None:
    """Its last step is in the checkpoint alone, and each figure says which step it is of."""
    end(run, "preempted", "preempted")
    checkpoint(run, 8)
    lines = lines_of(run)
    assert lines["step"] == "8 of 100 (8.0%)"
    assert lines["train loss"].startswith("2.0000 at step 6, ")
    assert lines["trouble"].endswith(", by step 6")
    assert lines["held out"].startswith("5.5000 at step 0, ")


def test_a_run_that_goes_on_and_has_not_come_to_a_step_yet(run: Path) -> None:
    """Its metrics are those of the start before."""
    for rank in range(2):
        say(run, replace(STATE, rank=rank, step=0, phase="start"))
    with held(run):
        lines = lines_of(run)
    assert lines["state"] == "starting: no step is done since it began"
    assert lines["step"] == "6 of 100 (6.0%)"
    say(run, replace(STATE, rank=0, step=7, phase="forward"))
    with held(run):
        assert status.facts(run)["state"] == "starting", "rank 1 is loading yet"


def test_a_run_that_has_just_begun(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    ranks.state_path(run, 1).unlink()
    (run / "run.json").write_text('{"config": {"ru')
    with held(run):
        lines = lines_of(run)
    assert lines["state"].startswith("starting") and lines["step"] == "0"
    assert lines["missing"] == "nothing was heard yet of rank 1"
    (run / "run.json").write_text('{"config": null}')
    assert lines_of(run)["step"] == "0"
    assert lines["checkpoint"] == "none that is sound"


def test_what_is_no_number_is_no_json(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 6, "train/loss": NaN, "train/spikes": Infinity}\n')
    found = status.facts(run)
    assert json.loads(json.dumps(found, allow_nan=False))["recent"]["train/loss"] == [[6, None]]
    assert "not finite at step 6" in status.text(found)


def test_a_rank_of_which_nothing_is_heard_any_more(run: Path) -> None:
    path = ranks.state_path(run, 1)
    os.utime(path, (path.stat().st_mtime - 100,) * 2)
    with held(run):
        assert lines_of(run)["quiet"].startswith("no sign of life from rank 1 for 30 s")
    assert status.facts(run)["sign_of_life_s"] < 50, "of whoever was heard last"
    path = ranks.state_path(run, 0)
    os.utime(path, (path.stat().st_mtime - 100,) * 2)
    found = status.facts(run)
    assert found["quiet"] == [] and found["sign_of_life_s"] > 50, "it is long ago for both"


def test_a_rank_whose_file_a_new_start_removes_meanwhile(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [STATE, replace(STATE, rank=9)]
    monkeypatch.setattr(trainer.status, "rank_states", lambda _: said)
    assert [state["rank"] for state in status.facts(run)["ranks"]] == [0, 9]


def test_ranks_are_in_their_order(run: Path) -> None:
    for rank in range(24, 1, -1):
        say(run, replace(STATE, rank=rank))
    assert [state["rank"] for state in status.facts(run)["ranks"]] == list(range(25))


@pytest.mark.parametrize(
    ("endings", "state", "ended"),
    [
        (["finished", "finished"], "finished", "ranks 0, 1: finished"),
        (["preempted", "preempted"], "preempted", "ranks 0, 1: preempted"),
        (["failed: exit code 2", "failed: DataError: no"], "failed", "rank 1: failed: DataError: no"),
        (["finished", "failed: DataError: no"], "failed", "rank 1: failed: DataError: no"),
        (["preempted", None], "killed", "rank 1: ended without a word"),
        (["finished", None], "killed", "rank 1: ended without a word, last seen in 'backward' of step 7"),
        (["finished", None], "killed", "rank 0: finished\n"),
    ],
)
def test_what_became_of_a_run(run: Path, endings: list[str | None], state: str, ended: str) -> None:
    end(run, *endings)
    assert status.facts(run)["state"] == state
    assert ended in "\n".join(status.text(status.facts(run)).splitlines())
    assert "left" not in lines_of(run)["step"]


def test_who_ended_without_a_word_comes_before_those_who_lost_a_connection_by_it(run: Path) -> None:
    """Each of these names another port."""
    gloo = "failed: RuntimeError: [pair.cc:547] Connection closed by peer [127.0.0.1]:{}. This is a network error"
    ended = [None if rank == 2 else gloo.format(50_000 + rank) for rank in range(40)]
    end(run, *ended)
    said = [line for line in status.text(status.facts(run)).splitlines() if line.startswith("ended")]
    assert len(said) == 2 and "rank 2: ended without a word, last seen in 'backward' of step 7" in said[0]
    assert said[1].endswith(
        "ranks 0, 1, 3, 4, 5, 6, 7, 8 and 31 more: failed: RuntimeError: [pair.cc:547] Connection closed by peer "
        "another. This is a network error"
    )


def test_of_many_fates_some_are_shown(run: Path) -> None:
    end(run, *(f"failed: DataError: row {rank}" for rank in range(12)))
    said = [line for line in status.text(status.facts(run)).splitlines() if line.startswith("ended")]
    assert len(said) == 9 and said[-1].split(maxsplit=1)[1] == "ranks 8, 9, 10, 11: in 4 other ways"


def test_what_the_watchdog_ended(run: Path) -> None:
    verdict = "the run hangs: the others wait for rank 1\n  rank 1 gives no sign of life"
    (run / "ranks" / "hang.json").write_text(json.dumps({"rank": 0, "verdict": verdict}))
    end(run, "failed: exit code 1", None)
    found = status.facts(run)
    assert found["state"] == "hung" and found["hang"]["verdict"] == verdict
    assert found["stacks"] == str(run / "stacks")
    assert "hang        the run hangs: the others wait for rank 1\n              rank 1 gives no" in status.text(found)


@pytest.mark.parametrize("content", ["", '{"rank": 0, "verd', "[1]"])
def test_what_the_watchdog_is_just_writing_is_not_there_yet(run: Path, content: str) -> None:
    (run / "ranks" / "hang.json").write_text(content)
    found = status.facts(run)
    assert (found["state"], found["hang"]) == ("killed", None)


def test_damaged_checkpoints_are_named_and_the_newest_sound_one_is_found(run: Path) -> None:
    paths = [checkpoint(run, step) for step in (2, 4, 6, 8)]
    (paths[0] / "state.json").unlink()  # older than the newest sound one: not looked at
    (paths[2] / "rank_00000.safetensors").write_text("rank_00000.safetensors of 7")
    (paths[3] / "state.json").unlink()
    (run / "checkpoints" / ".partial-step_00000009").mkdir()
    (run / "checkpoints" / "damaged-step_00000003").mkdir()
    found = status.facts(run)
    assert found["checkpoint"] == {"path": str(paths[1]), "step": 4}
    assert [Path(path).name for path in found["damaged"]] == ["damaged-step_00000003", "step_00000008", "step_00000006"]
    assert found["damaged"][str(paths[3])] == ["state.json is missing"]
    assert "is not what was written" in found["damaged"][str(paths[2])][0]
    assert f"damaged     {paths[3]}: state.json is missing\n" in status.text(found)


def test_only_the_end_of_long_metrics_is_read(run: Path) -> None:
    line = json.dumps({"step": 6, "train/loss": 2.0, **SPEED})
    (run / "metrics.jsonl").write_text(f"{line}\n" * 1000)
    assert len(run_files.read_metrics_tail(run, 10 * len(line))) == 9


def test_of_many_losses_the_last_are_told(run: Path) -> None:
    lines = [json.dumps({"step": step, "train/loss": 2.0}) for step in range(1, 101)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = status.facts(run)
    assert [step for step, _ in found["recent"]["train/loss"]] == list(range(41, 101))
    assert found["newest"] == {"train/loss": 2.0}


def test_json_is_what_programs_get(run: Path) -> None:
    """As a command, while the run writes; the text as well."""
    command = [sys.executable, "launch/status.py", str(run)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["step"], found["steps"], found["left_s"], found["state"]) == (6, 100, 376.0, "killed")
    assert found["furthest_back"] == [1] and found["ranks"][1]["phase"] == "data"
    assert found["recent"]["train/loss"][1:4] == [[2, 6.0], [3, None], [4, 4.0]]
    assert found["newest"]["speed/tokens_per_s"] == 12_345.0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_who_leaves_is_no_error(run: Path, options: list[str]) -> None:
    """More is printed than a pipe holds, so that the reader is gone in the middle of it."""
    say(run, replace(STATE, ended="failed: " + "x" * 2**20))
    command = [sys.executable, "launch/status.py", str(run), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(8)) == 8
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "ranks", "checkpoints"])
def test_whatever_is_left_of_a_run_is_enough(run: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    checkpoint(run, 8)
    alone = tmp_path_factory.mktemp("alone")
    (run / name).rename(alone / name)
    found = status.facts(alone)
    step = {"metrics.jsonl": 6, "checkpoints": 8}.get(name, 0)
    assert (found["step"], found["state"]) == (step, "killed" if name == "ranks" else "idle")


@pytest.mark.parametrize("folder", ["nothing", "empty", "a file"])
def test_what_is_no_run(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    path = tmp_path / folder
    if folder == "empty":
        path.mkdir()
    if folder == "a file":
        path.touch()
    monkeypatch.setattr(sys, "argv", ["status.py", str(path)])
    assert status.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is not the folder of a run: ")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """launch/status.py: its exit code, standard output and standard error."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["status.py", *map(str, words)])
        return (status.main(), *capsys.readouterr())

    return run


def test_several_runs_have_a_line_each(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    runs = [make_run(tmp_path / name) for name in ("at_work", "done", "failed_early")]
    end(runs[1], "finished", "finished")
    checkpoint(runs[1], 99)
    checkpoint(runs[1], 100).joinpath("state.json").unlink()
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 100, "eval/loss": 1.25}\n{"step": 100, "train/loss": 1.5}\n')
    end(runs[2], "failed: exit code 2", "failed: DataError: no")
    (runs[2] / "metrics.jsonl").unlink()
    (runs[2] / "run.json").unlink()
    with held(runs[0]):
        code, out, errors = call(*runs)
    assert (code, errors) == (0, "")
    assert out.splitlines() == [
        f"{runs[0]}       training   step 6 of 100 (6.0%), train loss 2.0000 at step 6, ends in 0:06:16, "
        "by pid 100 on n1, SLURM job 77",
        f"{runs[1]}          finished   step 100 of 100 (100.0%), held out 1.2500 at step 100, damaged checkpoints: 1",
        f"{runs[2]}  failed     step 0",
    ]


def test_of_several_runs_those_that_have_just_begun_or_diverged(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    """None of them says when it ends: that is not known."""
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    for rank in range(2):
        say(runs[0], replace(STATE, rank=rank, step=0, phase="start"))
    (runs[1] / "metrics.jsonl").write_text('{"step": 6, "train/loss": NaN}\n{"step": 3, "eval/loss": 2}\n')
    with held(runs[0]):
        _, out, _ = call(*runs)
    assert out.splitlines() == [
        f"{runs[0]}  starting   step 6 of 100 (6.0%), train loss 2.0000 at step 6, by pid 100 on n1, SLURM job 77",
        f"{runs[1]}  killed     step 6 of 100 (6.0%), train loss not finite at step 6",
    ]


def test_several_runs_for_programs_are_an_object_each(run: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call(run, run, "--json")
    assert code == 0
    for found in map(json.loads, out.splitlines()):
        assert (found["run"], found["state"], found["step"]) == (str(run), "killed", 6)
    assert call(run)[1] == status.text(status.facts(run)) + "\n", "one is told as ever"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_is_no_run_among_several_is_named_after_the_others(
    tmp_path: Path, options: list[str], call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two", "unreadable")]
    original = trainer.status.read_hang

    def read_hang(folder: Path) -> Mapping[str, Any]:
        if folder == runs[2]:
            raise PermissionError(13, "Permission denied", str(folder))
        return original(folder)

    monkeypatch.setattr(trainer.status, "read_hang", read_hang)
    code, out, errors = call(tmp_path / "none", runs[0], runs[2], runs[1], *options)
    assert code == 2
    assert [name in line for name, line in zip(("one", "two"), out.splitlines(), strict=True)] == [True, True]
    no_run, unreadable = errors.splitlines()
    assert no_run.startswith(f"error: {tmp_path / 'none'} is not the folder of a run: ")
    assert unreadable == f"error: [Errno 13] Permission denied: '{runs[2]}'"
