"""What a run reports, and that curves stay continuous: nothing doubled, nothing lost, wherever it was killed."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import metrics_writer
import numpy as np
import pytest
import torch
from event_readers import Server, curves, events, notebook, scalars, texts
from matplotlib.figure import Figure
from metrics_writer import value

from trainer.metrics import Metrics, _append, keep_former

STEPS = 60


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[int]:
    return [int(line["step"]) for line in lines(run_dir)]


def write(run_dir: Path, first: int, until: int) -> None:
    metrics = Metrics(run_dir, first)
    for step in range(metrics.first_step, until + 1):
        metrics.write(step, {"train/loss": first + step / 3})
    metrics.close()


def fp32(number: float) -> float:
    """As TensorBoard keeps a scalar."""
    return struct.unpack("f", struct.pack("f", number))[0]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write(tmp_path, 0, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 3, "train\n{"step": 4, "train/lo')  # by power cuts, and by a kill
    write(tmp_path, 5, 9)
    assert steps(tmp_path) == list(range(10))
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(10))
    assert lines(tmp_path)[-1]["train/loss"] == 5 + 9 / 3


def test_a_run_begun_anew_forgets_the_one_before(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.hparams({"model.d_model": 8})
    metrics.text(0, "run/config", "the one before")
    metrics.close()
    write(tmp_path, 0, 7)
    write(tmp_path, 0, 2)
    assert steps(tmp_path) == [0, 1, 2]
    found = events(tmp_path)
    assert [step for step, _ in curves(found)["train/loss"]] == [0, 1, 2]
    assert list(found.AllSummaryMetadata()) == ["train/loss"]


def test_the_curves_of_a_run_without_checkpoints_are_kept(tmp_path: Path) -> None:
    """Of one that has come to no step there is nothing to keep."""
    for begun, kept in ((0, None), (2, None), (0, tmp_path / "before" / "0001"), (0, tmp_path / "before" / "0002")):
        metrics = Metrics(tmp_path, begun)
        assert metrics.kept == kept
        metrics.write(0 if begun == 0 and kept is None else 3, {"train/loss": float(begun)})
        (tmp_path / "run.json").write_text(str(kept))
        metrics.close()
    first, second = (tmp_path / "before" / number for number in ("0001", "0002"))
    assert [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 0, "train/loss": 0.0},
        {"step": 3, "train/loss": 2.0},
    ]
    assert (first / "run.json").read_text() == "None" and (second / "run.json").read_text() == str(first)
    assert curves(events(first))["train/loss"] == [(0, 0.0), (3, 2.0)]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    (tmp_path / "before" / "0003" / "tensorboard").mkdir(parents=True)  # of a start that was killed in it
    assert keep_former(tmp_path) == tmp_path / "before" / "0004" and not (tmp_path / "metrics.jsonl").exists()
    assert keep_former(tmp_path) is None


def test_a_run_that_goes_on_is_a_row_of_the_table_already(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 5)
    metrics.hparams({"model.d_model": 8})
    metrics.close()
    assert list(events(tmp_path).AllSummaryMetadata()) == []


def test_numbers_in_full_precision_and_null_for_what_is_none(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(3, {"train/loss": 0.1 + 0.2, "train/grad_norm": float("nan"), "train/spikes": 2})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "train/loss": 0.30000000000000004, "train/grad_norm": null, "train/spikes": 2}\n'
    )
    assert scalars(tmp_path)["train/spikes"] == [(3, 2.0)]
    assert np.isnan(scalars(tmp_path)["train/grad_norm"][0][1])


def expected_curves(last: int) -> dict[str, list[tuple[int, float]]]:
    return {
        "eval/loss": [(step, fp32(value(step))) for step in range(0, last + 1, 4)],
        "train/loss": [(step, fp32(value(step))) for step in range(1, last + 1)],
        "train/lr": [(step, float(step)) for step in range(1, last + 1)],
    }


def expected_lines(last: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{"step": 0, "eval/loss": value(0)}]
    for step in range(1, last + 1):
        found.append({"step": step, "train/loss": value(step), "train/lr": float(step)})
        found += [{"step": step, "eval/loss": value(step)}] if step % 4 == 0 else []
    return found


def start(run_dir: Path, kills: int, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, metrics_writer.__file__, str(run_dir), str(STEPS), str(kills)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environ})


def test_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    """TensorBoard was looking on, or comes later; with its data server, or in Python."""
    (tmp_path / "tensorboard").mkdir()
    looking_on, in_python = Server(tmp_path), events(tmp_path)
    process = start(tmp_path, kills=10)
    assert process.stdout is not None
    for _ in process.stdout:
        in_python.Reload()
    assert process.wait(timeout=60) == 0

    expected = expected_curves(STEPS)
    assert lines(tmp_path) == expected_lines(STEPS)
    for found in (in_python.Reload(), events(tmp_path)):
        assert curves(found) == expected
        assert texts(found, "sample") == [(step, f"text of step {step}") for step in range(4, STEPS + 1, 4)]
        assert [event.step for event in found.Tensors("gradients/w")] == list(range(4, STEPS + 1, 4))
        starts = [step for step, _ in texts(found, "run/config")]
        assert starts == sorted(set(starts)), "the text of a start that was taken back is still there"
    assert scalars(tmp_path) == expected
    coming_later = Server(tmp_path)
    for server in (looking_on, coming_later):
        assert server.wait_for(expected) == expected
        server.close()


def test_a_kill_between_the_two_files_and_at_any_byte_of_a_record(tmp_path: Path) -> None:
    """A step is in the events and not in the lines, or its record is cut short; the checkpoint is of an earlier one."""
    for cut in [0, 1, *range(2, 90, 8)]:
        run_dir = tmp_path / str(cut)
        write(run_dir, 0, 6)
        jsonl = run_dir / "metrics.jsonl"
        jsonl.write_text("".join(jsonl.read_text().splitlines(keepends=True)[:-1]))
        (file,) = (run_dir / "tensorboard").iterdir()
        os.truncate(file, file.stat().st_size - cut)
        write(run_dir, 4, 8)
        assert steps(run_dir) == list(range(9))
        assert [step for step, _ in scalars(run_dir)["train/loss"]] == list(range(9)), cut


@pytest.mark.parametrize("seconds", [0.0, -3600.0])
def test_a_restart_within_the_second_or_where_the_clock_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the time."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(os, "getpid", lambda: 99_999)
    write(tmp_path, 0, 7)
    monkeypatch.setattr(time, "time", lambda: now + seconds)
    monkeypatch.setattr(os, "getpid", lambda: 100_000)  # as text it comes before the other
    write(tmp_path, 5, 9)
    write(tmp_path, 8, 12)
    assert scalars(tmp_path)["train/loss"] == [
        *((step, fp32(step / 3)) for step in range(6)),
        *((step, fp32(5 + step / 3)) for step in range(6, 9)),
        *((step, fp32(8 + step / 3)) for step in range(9, 13)),
    ]


def test_a_full_disk_costs_what_found_no_room_and_nothing_else(tmp_path: Path) -> None:
    process = start(tmp_path, kills=0, SMALL_DISK="3000")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    failed = {int(step) for step in re.findall(r"step (\d+): .*File too large", output)}
    assert failed and max(failed) < STEPS // 2
    assert [line for line in lines(tmp_path) if line["step"] not in failed] == [
        line for line in expected_lines(STEPS) if line["step"] not in failed
    ]
    found = dict(scalars(tmp_path)["train/loss"])
    assert found == {step: fp32(value(step)) for step in found}
    assert set(range(STEPS // 2 + 1, STEPS + 1)) <= found.keys()


def test_a_line_that_finds_no_room_leaves_no_part_of_it(tmp_path: Path) -> None:
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    _append(path, "x" * 60 + "\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            _append(path, "y" * 60 + "\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _append(path, "z\n")
    assert path.read_text() == "x" * 60 + "\nz\n"


def test_a_step_is_with_the_system_when_it_was_written(tmp_path: Path) -> None:
    """So that a kill right behind it loses nothing."""
    metrics = Metrics(tmp_path, 0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    sizes = []
    for step in range(100):
        metrics.write(step, {"train/loss": 1.0})
        sizes.append((file.stat().st_size, (tmp_path / "metrics.jsonl").stat().st_size))
    metrics.close()
    assert all(before[0] < after[0] and before[1] < after[1] for before, after in pairwise(sizes))
    assert sizes[-1][0] == file.stat().st_size


def test_what_was_written_is_on_the_disk_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    metrics = Metrics(tmp_path, 0)
    metrics.write(0, {"train/loss": 1.0})
    metrics.sync()
    metrics.close()
    assert sorted(name.split(".")[0] for name in synced) == ["events", "metrics"]


def test_texts_and_figures(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.text(2, "sample", "*once*")
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1], [0, 1])
    metrics.figure(2, "eval/loss_by_position", figure)
    metrics.close()
    assert texts(events(tmp_path), "sample") == [(2, "*once*")]
    (image,) = notebook(tmp_path).Images("eval/loss_by_position")
    assert (image.step, image.width, image.height) == (2, 100, 50)
    assert image.encoded_image_string.startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_histograms_are_of_all_elements(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(50, 201) * torch.logspace(-15, 3, 201)).to(dtype)
    metrics = Metrics(tmp_path, 0)
    metrics.histogram(7, "gradients/w", tensor)
    metrics.close()
    (event,) = notebook(tmp_path).Histograms("gradients/w")
    found, x = event.histogram_value, tensor.double().numpy().ravel()
    assert (event.step, found.num, found.min, found.max) == (7, x.size, x.min(), x.max())
    assert found.sum == pytest.approx(x.sum(), rel=1e-9)
    assert sum(found.bucket) == x.size


def test_histograms_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.histogram(1, "gradients/some", torch.tensor([1.0, float("nan"), float("inf"), -1e30, 3e38]))
    metrics.histogram(1, "gradients/none", torch.tensor([float("nan")]))
    metrics.histogram(1, "gradients/empty", torch.zeros(0))
    metrics.histogram(1, "gradients/zero", torch.zeros(5))
    metrics.close()
    found = notebook(tmp_path)
    assert sorted(found.Tags()["histograms"]) == ["gradients/some", "gradients/zero"]
    (some,) = found.Histograms("gradients/some")
    assert (some.histogram_value.num, some.histogram_value.min) == (3, pytest.approx(-1e30))
    (zero,) = found.Histograms("gradients/zero")
    assert sum(zero.histogram_value.bucket) == 5
