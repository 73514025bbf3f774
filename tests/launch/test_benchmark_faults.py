"""The benchmark of faults: every part at toy size, and what it says of a run that was not survived."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import benchmark
import pytest
from bench_faults import command, damage, jobs, kills, overhead, runs, signals
from torch.utils.tensorboard import SummaryWriter

TAGS = ("train/loss", "train/lr", "train/grad_norm")
POINTS = [(tag, step, 1 / (step + len(tag))) for tag in TAGS for step in (1, 2, 3)]


def main(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "faults", *map(str, words)])
    return benchmark.main()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> runs.Bench:
    return runs.Bench(tmp_path_factory.mktemp("bench") / "runs", steps=7)


def test_a_run_that_is_killed_and_one_that_gets_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    sizes = ["--modes", "process", "--steps", "8", "--kills", "1", "--signals", "1"]
    assert main(monkeypatch, "--part", "kills", "signals", *sizes, "--seed", "1", "--json", file) == 0
    record = json.loads(file.read_text())
    assert record["what"] == "faults" and record["cores"] >= 1
    killed, signalled = record["results"]
    assert (killed["part"], killed["mode"], killed["survived"], killed["error"]) == ("kills", "process", True, "")
    (kill,) = killed["kills"]
    assert kill["code"] == -9 and kill["victim"] == "all" and kill["saved"] <= kill["step"] <= 8
    (delivery,) = signalled["deliveries"]
    assert signalled["survived"] and delivery["code"] == 75 and delivery["saved"] == delivery["step"] < 8
    out = capsys.readouterr().out
    assert "kills: 1 in 1 runs (process 1; " in out and "signals: 1 in 1 runs (process 1; SIG" in out
    assert out.count("identical") == 2 and out.count("0 runs failed") == 2


@pytest.fixture
def finished(bench: runs.Bench, monkeypatch: pytest.MonkeyPatch) -> runs.Undisturbed:
    """A run of one process, to damage."""
    monkeypatch.setattr(damage, "MODE", "process")
    monkeypatch.setattr(damage, "RUN_EVERY", 100)
    return bench.undisturbed("process", damage.VARIANT)


def test_every_damage_is_recovered_from(bench: runs.Bench, finished: runs.Undisturbed) -> None:
    found = list(damage.damages(bench, 25, seed=0))
    assert [each.passed for each in found] == [True] * 25, damage.table(found)
    assert len({(each.file, each.what) for each in found}) == 24 == 3 * len(damage.WAYS)
    assert [each.ended for each in found].count("identical") == 1 and {each.checkpoints for each in found} == {1, 2}
    assert {each.expected for each in found} == {3, 6} and "FAILED" not in damage.table(found)


def test_damage_that_goes_unnoticed_is_a_failure(
    bench: runs.Bench, finished: runs.Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage.checkpoint, "sound_start", lambda run_dir, *_: SimpleNamespace(step=7))
    monkeypatch.setattr(damage, "RUN_EVERY", 1000)
    monkeypatch.setattr(damage, "start", choose_only)
    blind = list(damage.damages(bench, 2, seed=0))
    assert [each.passed for each in blind] == [False, False]
    assert damage.table(blind).count("FAILED: ") == 2
    assert all(each.said and each.started_from == 7 for each in blind)


def choose_only(found: damage.Damage, run: jobs.Run, *_: Any) -> None:
    damage.choose(found, run)


def write_run(folder: Path, lines: list[tuple[str, int, float | None]], events: list[tuple[str, int, float]]) -> None:
    """The two places where a run's points are, with these."""
    folder.mkdir()
    records = [json.dumps({"step": step, tag: value, "speed/step_s": 1.0}) for tag, step, value in lines]
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for tag, step, value in events:
            writer.add_scalar(tag, value, step)
            writer.add_scalar("speed/step_s", 1.0, step)


def test_curves_are_the_same_to_the_last_bit_or_differ(tmp_path: Path) -> None:
    doubled, shifted = [*POINTS, POINTS[4]], [*POINTS[:-1], (*POINTS[-1][:2], POINTS[-1][2] * (1 + 2**-52))]
    cases: dict[str, tuple[Any, Any]] = {
        "whole": (POINTS, POINTS),
        "doubled": (doubled, POINTS),
        "doubled event": (POINTS, doubled),
        "missing": (POINTS[1:], POINTS),
        "missing event": (POINTS, POINTS[1:]),
        "last bit": (shifted, POINTS),
        "null": ([(*POINTS[0][:2], None), *POINTS[1:]], POINTS),
    }
    curves = {}
    for name, (lines, events) in cases.items():
        write_run(tmp_path / name, lines, events)
        curves[name] = runs.curve(tmp_path / name)
    whole = curves.pop("whole")
    assert len(whole.metrics) == len(whole.events) == 9 and runs.difference(whole, whole) is None
    assert runs.complete(whole, 3) is None and "has not every step's" in str(runs.complete(whole, 4))
    said = {name: runs.difference(whole, curve) or "" for name, curve in curves.items()}
    assert all(said.values()), said
    assert {name for name, text in said.items() if text.startswith("TensorBoard: ")} == {
        "doubled event",
        "missing event",
    }
    assert "unexpected [\"('train/lr', 2, 0.1)\"] (0 and 1 in all)" in said["doubled"]
    assert {name for name in curves if runs.complete(curves[name], 3)} == set(curves) - {"last bit", "null"}


@pytest.mark.parametrize(
    ("log", "newest", "problem"),
    [
        ("starting anew in runs/x\n", 0, None),
        ("continuing from runs/x/step_00000006, after step 6\n", 6, None),
        ("nothing to do: runs/x is at step 8", 8, None),
        ("starting anew in runs/x\n", 3, "started anew beside a checkpoint of step 3"),
        ("continuing from runs/x/step_00000003, after step 3\n", 6, "continued from step 3, not 6"),
    ],
)
def test_a_start_from_elsewhere_is_noticed(tmp_path: Path, log: str, newest: int, problem: str | None) -> None:
    (tmp_path / "log").write_text(log)
    job: Any = SimpleNamespace(log=tmp_path / "log")
    assert kills.wrong_start(job, newest) == problem


@pytest.mark.parametrize(("code", "saved", "right"), [(75, 6, True), (0, 6, False), (-10, 6, False), (75, 3, False)])
def test_a_signal_is_honoured_by_a_checkpoint_of_the_last_step(code: int, saved: int, right: bool) -> None:
    delivery = signals.Delivery("SIGUSR1", "steps", 1.0, 6, saved, code, 2.0)
    assert (signals.dishonoured(delivery) is None) == right
    assert "FAILED: x" in signals.table(signals.Trial("process", "ZeRO-2", [delivery], "x"))


def test_what_was_not_survived_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"survived": True}
        raise runs.FailedError("an undisturbed run ends with 1")

    monkeypatch.setattr(runs, "write_config", lambda *_: Path("none"))
    monkeypatch.setattr(command, "PARTS", {"kills": failing, "damage": lambda *_: iter([{"survived": True}])})
    options = ["--modes", "process", "--json", tmp_path / "result.json"]
    assert main(monkeypatch, *options) == 1
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert [result["survived"] for result in results] == [True, False, True]
    assert "kills: FAILED: an undisturbed run ends with 1" in capsys.readouterr().out
    assert main(monkeypatch, *options, "--part", "damage") == 0


def test_seconds_of_starting_saving_and_of_the_loop(bench: runs.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"threads": 1, "budget_s": 300}
    loop = overhead.in_worker("loop", 256, 2, **budget)
    assert len(loop["step_s"]["trainer"]) == len(loop["step_s"]["bare"]) == 2, loop
    assert loop["overhead"] == pytest.approx(loop["trainer_s"] / loop["bare_s"] - 1) and loop["bare_s"] > 0
    assert "loop, 256 tokens a row: " in overhead.line(loop)
    saved = overhead.in_worker("save", "demo", 1, **budget)
    assert saved["bytes"] > 12 * saved["n_parameters"] > 0, saved  # a weight and two moments, fp32
    assert saved["save_mb_s"] == pytest.approx(saved["bytes"] / 1e6 / saved["save_s"])
    assert "parameters, " in overhead.line(saved)
    assert "loop 7: error: no memory" in overhead.line({"what": "loop", "size": 7, "error": "no memory"})
    assert 0 < overhead.first_step("process", bench.new_run("ZeRO-2"), bench)[0] < 300
    # The others are no other ones.
    started: list[tuple[str, ...]] = []

    def first_step(mode: str, run: jobs.Run, _: runs.Bench) -> tuple[float, float]:
        run.dir.mkdir(parents=True, exist_ok=True)
        started.append(run.changes)
        return float(len(started)), 0.0

    monkeypatch.setattr(overhead, "first_step", first_step)
    resumed, by_launcher = overhead.resume(bench, 1)
    assert (resumed["anew_s"], resumed["resumed_s"], resumed["resume_overhead_s"]) == (2.0, 3.0, 1.0)
    assert [changes[-1] for changes in started] == ["run.steps=3", "run.steps=3", "run.steps=4"] * 2
    assert (resumed["mode"], by_launcher["mode"]) == ("process", "deepspeed")
    assert "resume, process: the first step begins" in overhead.line(resumed)
