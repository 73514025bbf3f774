"""The benchmark measures what it says, leaves out what would take too much, and names what it cannot measure."""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import benchmark_plot
import pytest
import torch
from bench import peers, plot, prediction, process
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]

TINY = benchmark.Sizes(seq_len=256, d_model=32, n_layers=1, n_heads=2, n_hashes=2, chunk_len=16)
TINY_OPTIONS = "--d-model 32 --n-layers 1 --n-heads 2 --n-hashes 2 --chunk-len 16 --threads 1"


def arguments_of(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", *map(str, words)])
    return benchmark.parse_arguments()


def result(seq_len: int, peer: str = "ours", **values: Any) -> dict[str, Any]:
    measured = {"seconds": 1.0, "peak_gib": 1.0, "imports_gib": 0.25}
    return {"seq_len": seq_len, "peer": peer, **(values if {"error", "left_out"} & set(values) else measured | values)}


@pytest.mark.parametrize(("what", "dtype"), [("model", "float32"), ("attention", "bfloat16")])
def test_a_run_from_the_command_line_to_the_picture(
    what: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--seq-len", "256", "--peers", "ours", "dense", "--rounds", "1", *TINY_OPTIONS.split()]
    options += ["--dtype", dtype]
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", what, *options, "--json", str(file)])
    benchmark.main()  # which starts a process for each measurement
    record = json.loads(file.read_text())
    assert [one["peer"] for one in record["results"]] == ["ours", "dense"]
    for one in record["results"]:
        first, *counted = one["step_s"]
        assert len(counted) == benchmark.REPEAT_STEPS and min(first, *counted) > 0
        assert min(counted) <= one["seconds"] <= max(counted) and one["wall_s"] > sum(counted)
        assert one["peak_gib"] >= one["imports_gib"] > 0.05 and one["threads"] == 1
    assert record["command"].startswith(f"python launch/benchmark.py {what} --seq-len 256 --peers ours dense")
    assert record["what"] == what and record["sizes"]["d_model"] == 32 and record["threads"] == 1
    assert record["dtype"] == dtype
    assert record["cores"] >= 1 and record["ram_gib"] > 0.5 and record["cpu"]
    assert {"date", "git_commit"} <= set(record) and {"torch", "python"} <= set(record["versions"])
    header, ours, dense = capsys.readouterr().out.splitlines()
    assert header == benchmark.HEADER and ours.split()[:2] == ["256", "ours"] and dense.split()[:2] == ["256", "dense"]
    assert ours.split()[-3:] == ["1.00", "1.00", "-"]
    monkeypatch.setattr(sys, "argv", ["launch/benchmark_plot.py", str(file), "--output", str(picture)])
    assert benchmark_plot.main() == 0 and picture.read_bytes().startswith(b"\x89PNG\r\n")


class SeenDtypes(TorchDispatchMode):
    """The dtypes of what operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.dtypes |= {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("what", "name"), [(what, name) for what, of in benchmark.PEERS.items() for name in of])
def test_steps_run_in_the_dtype_that_was_asked_for(what: str, name: str) -> None:
    peer = benchmark.PEERS[what][name]
    if process.missing(peer):
        pytest.skip(f"{peer.package} is not installed")
    for dtype in benchmark.DTYPES.values():
        step = peers.step_on(peer, TINY, torch.device("cpu"), dtype)
        with SeenDtypes() as seen:
            step()
        assert (torch.bfloat16 in seen.dtypes) == (dtype == torch.bfloat16), seen.dtypes
    assert torch.get_default_dtype() == torch.float32


def test_what_fails_and_what_takes_too_long_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(monkeypatch, "model", *TINY_OPTIONS.split())
    failed = benchmark.measure(arguments, "ours", replace(TINY, n_heads=3))
    assert "d_model=32 is not divisible by n_heads=3" in failed["error"] and "final" not in failed
    arguments.budget_s = 1  # and a step of 65,536 tokens takes longer
    stopped = benchmark.measure(arguments, "ours", benchmark.Sizes())
    assert stopped == {"error": "stopped after 1 s, the budget", "final": True}


def test_a_process_that_the_system_ends_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(monkeypatch, "model")
    monkeypatch.setattr(process.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=-9))
    ended = benchmark.measure(arguments, "ours", TINY)
    assert ended == {"error": "ended by SIGKILL, out of memory?", "final": True}


def test_steps_are_repeated_and_long_ones_are_not() -> None:
    assert not benchmark.enough([], budget_s=600)
    assert not benchmark.enough([5.0], budget_s=600)  # the first does not count
    assert not benchmark.enough([5.0, 2.0], budget_s=600)
    assert benchmark.enough([5.0, 2.0, 2.0], budget_s=600)
    assert benchmark.enough([1e-3] * 11, budget_s=600) and not benchmark.enough([1e-3] * 10, budget_s=600)
    assert benchmark.enough([21.0], budget_s=600)
    assert benchmark.enough([5.0], budget_s=10)  # two more would not fit


def test_predictions_grow_by_4_to_16_for_four_times_the_length() -> None:
    predict = prediction.predict
    assert predict([(1024, 2.0)], 4096) == pytest.approx(8.0)
    assert predict([(1024, 2.0), (4096, 2.5)], 16_384) == pytest.approx(10.0)  # held at linear
    assert predict([(1024, 2.0), (4096, 16.0)], 16_384) == pytest.approx(128.0)  # as measured
    assert predict([(1024, 2.0), (4096, 99.0)], 16_384) == pytest.approx(99.0 * 16)  # held at quadratic
    assert predict([(256, 9.0), (1024, 2.0), (4096, 8.0)], 65_536) == pytest.approx(128.0)  # the last two
    assert predict([(3000, 3.0)], 1000) == pytest.approx(1.0)
    assert predict([(1024, 2.0)], 4096, power=2.0) == pytest.approx(32.0)  # one point, said to grow with the square


def test_what_would_take_too_much_is_left_out_and_says_so() -> None:
    limits = process.Limits
    dense = [result(16_384, seconds=10.0), result(65_536, seconds=143.0), result(65_536, seconds=145.0)]
    assert benchmark.left_out(dense, 262_144, limits(2400, 24)) is None
    out = benchmark.left_out(dense, 262_144, limits(600, 24))
    assert out is not None and out["left_out"] == "predicted 2,074 s: over the budget of 600 s"
    assert out["predicted_s"] == pytest.approx(144.0 * 14.4)
    assert out["predicted_gib"] == pytest.approx(0.25 + 4 * 0.75)  # imports do not grow
    large = [result(16_384, peak_gib=2.25), result(65_536, peak_gib=8.25)]
    assert benchmark.left_out(large, 131_072, limits(600, 24)) is None  # 16.25 GiB
    out = benchmark.left_out(large, 262_144, limits(600, 24))
    assert out is not None and out["left_out"] == "predicted 32.2 GiB: over the 24.0 GiB that it may take here"


def test_what_is_known_before_decides_only_where_it_must() -> None:
    little, much = process.Limits(1, 1), process.Limits(600, 24)
    assert benchmark.left_out([], 4096, little) is None
    assert benchmark.left_out([result(1000, error="not a multiple of 64")], 1024, little) is None
    stopped = [result(1024), result(4096, error="stopped after 600 s, the budget", final=True)]
    out = benchmark.left_out(stopped, 16_384, much)
    assert out == {"left_out": "stopped after 600 s, the budget at 4,096 tokens"}


def test_peers_take_turns_within_the_budget_and_failures_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []
    takes = {"ours": 10.0, "dense": 50.0, "lucidrains": 1.0}

    def measure(_: argparse.Namespace, name: str, sizes: benchmark.Sizes) -> dict[str, Any]:
        asked.append(name)
        now[0] += takes[name]
        return {"error": "no"} if name == "lucidrains" else {"seconds": takes[name], "peak_gib": 1, "imports_gib": 0}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "missing", lambda peer: None)
    monkeypatch.setattr(process.time, "perf_counter", lambda: now[0])
    arguments = arguments_of(monkeypatch, "model", "--budget-s", "100", "--rounds", "3")
    results = benchmark.measure_length(arguments, ["ours", "lucidrains", "dense"], 1024, [], budget_gib=24)
    assert asked == ["ours", "lucidrains", "dense", "ours", "dense", "ours"]  # three times 50 s would be beyond 100 s
    assert [one["peer"] for one in results] == asked and results[2]["wall_s"] == 50.0


def test_peers_that_are_not_installed_are_named_and_the_others_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(benchmark.PEERS["model"]["huggingface"], module="no_such_package.module")
    monkeypatch.setitem(benchmark.PEERS["model"], "huggingface", absent)
    monkeypatch.setattr(benchmark, "measure", lambda *_: result(1024))
    file = tmp_path / "result.json"
    benchmark.run(arguments_of(monkeypatch, "model", "--seq-len", "1024", "--peers", "huggingface", "ours"))
    rows = capsys.readouterr().out.splitlines()
    assert rows[1] == "    1,024  huggingface     transformers is not installed: pip install -e '.[bench]'"
    assert rows[2].split()[:3] == ["1,024", "ours", "1.00"]
    assert not file.exists()


def test_the_file_is_written_after_every_length(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(_: argparse.Namespace, name: str, sizes: benchmark.Sizes) -> dict[str, Any]:
        if sizes.seq_len == 4096:
            raise KeyboardInterrupt
        return result(sizes.seq_len)

    monkeypatch.setattr(benchmark, "measure", measure)
    file = tmp_path / "result.json"
    options = ["--seq-len", "4096", "1024", "256", "--peers", "ours", "--rounds", "1", "--json", file]
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(arguments_of(monkeypatch, "model", *options))
    assert [one["seq_len"] for one in json.loads(file.read_text())["results"]] == [256, 1024]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_the_table_compares_with_ours_and_shows_the_growth() -> None:
    results = [
        result(1024, seconds=1.0),
        result(1024, "dense", seconds=3.0),
        *(result(4096, seconds=seconds, peak_gib=1.5) for seconds in (4.0, 4.5, 9.0)),
        result(4096, "dense", seconds=45.0, peak_gib=3.0),
        result(4096, "lucidrains", left_out="predicted 2,300 s: over the budget of 600 s"),
        result(4096, "huggingface", error="a bug"),
    ]
    ours, dense, lucidrains, huggingface = benchmark.table(results, 4096).splitlines()
    assert ours.split() == ["4,096", "ours", "4.50", "(4.00..9.00)", "1.50", "(0.25)", "1.00", "1.00", "4.50"]
    assert dense.split()[2:] == ["45.00", "(45.00..45.00)", "3.00", "(0.25)", "10.00", "2.00", "15.00"]
    assert lucidrains.endswith("lucidrains      predicted 2,300 s: over the budget of 600 s")
    assert huggingface.endswith("huggingface     error: a bug")
    alone = benchmark.table([one for one in results if one["peer"] == "dense"], 1024)
    assert alone.split()[-3:] == ["-", "-", "-"]
    assert benchmark.growth((1000, 1.0), (2000, 2.0)) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--peers", "flash"],
            "error: no peer flash: choose from ours, ours-dense, huggingface, lucidrains, dense, or all",
        ),
        (["--peers", "all", "flash"], "error: no peer flash: choose from ours"),
        (["--json", "no/such/folder/x.json"], "error: cannot write no/such/folder/x.json: "),
        (["--rounds", "0"], "argument --rounds: 0 is not a whole number of at least 1"),
        (["--memory-share", "85"], "argument --memory-share: 85 is not a number above 0 and up to 1"),
        (["--seq-len", "64K"], "argument --seq-len: 64K is not a whole number of at least 1"),
    ],
)
def test_bad_options_are_named(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "attention", *words])
    try:
        code = benchmark.main()
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["model", "attention"])
@pytest.mark.parametrize("name", ["huggingface", "lucidrains"])
def test_installed_peers_take_a_step(what: str, name: str) -> None:
    peer = benchmark.PEERS[what][name]
    pytest.importorskip(peer.module)
    peer.build(TINY)()


def test_our_dense_attention_takes_a_step() -> None:
    benchmark.PEERS["attention"]["ours-dense"].build(TINY)()


def test_the_dense_model_learns_from_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[nn.Module] = []
    build = peers.DenseModel
    monkeypatch.setattr(peers, "DenseModel", lambda sizes: models.append(build(sizes)) or models[-1])
    benchmark.PEERS["model"]["dense"].build(replace(TINY, chunk_tokens=100))()
    missing = [name for name, p in models[0].named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def record(tmp_path: Path, name: str, **changes: Any) -> Path:
    results = [result(1024), result(1024, seconds=3.0), result(4096), result(1024, "dense")]
    results += [result(4096, "dense", left_out="no", predicted_s=70.0, predicted_gib=2.0)]
    results += [result(16_384, "dense", left_out="no", predicted_s=999.0, predicted_gib=9.0)]
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_hashes": 2, "chunk_len": 16, "vocab_size": 256}
    whole = {"what": "model", "sizes": sizes, "cpu": "a CPU", "threads": 2, "results": results} | changes
    (tmp_path / name).write_text(json.dumps(whole))
    return tmp_path / name


def test_lines_have_medians_and_end_in_the_first_prediction(tmp_path: Path) -> None:
    both = benchmark_plot.read([record(tmp_path, "a"), record(tmp_path, "b", results=[result(65_536, seconds=9.0)])])
    lines = plot.lines(both["results"], "seconds", "predicted_s")
    assert lines["ours"].values == {1024: 2.0, 4096: 1.0, 65_536: 9.0} and lines["ours"].end == (65_536, 9.0)
    assert lines["dense"].values == {1024: 1.0} and lines["dense"].end == (4096, 70.0)
    benchmark_plot.draw(both, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_labels_keep_their_order_and_their_distance() -> None:
    assert plot.apart([0.5, 0.1], 0.05) == [0.5, 0.1]
    assert plot.apart([0.5, 0.48, 0.1], 0.06) == pytest.approx([0.52, 0.46, 0.1])
    crowded = plot.apart([0.5, 0.5, 0.5, 0.57], 0.1)
    assert sorted(crowded) == crowded
    assert [b - a for a, b in itertools.pairwise(crowded)] == pytest.approx([0.1] * 3)


MIXED = "part depth was measured at 96 and 192 tokens, which do not belong in one line"


def memory_record(tmp_path: Path, name: str, part: str, seq_len: int) -> Path:
    """Of one part of the benchmark of memory, at two depths."""
    results = [result(seq_len, part=part, n_layers=n_layers) for n_layers in (2, 4)]
    return record(tmp_path, name, what="memory", results=results)


def test_what_cannot_be_drawn_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fine = record(tmp_path, "a")
    (tmp_path / "folder.png").mkdir()
    for files, output, message in [
        ([tmp_path / "none"], "x.png", "cannot read"),
        ([ROOT / "ds_config.json"], "x.png", "was not written by launch/benchmark.py --json: KeyError('what')"),
        ([fine, record(tmp_path, "b", threads=64)], "x.png", "their threads are 2 and 64"),
        ([record(tmp_path, "c", results=[])], "x.png", "no measurement"),
        ([fine], "x.mp3", "cannot draw"),
        ([fine], "none/x.png", "cannot draw"),
        ([fine], "folder.png", "Is a directory"),
        ([memory_record(tmp_path, "d", "depth", 96), memory_record(tmp_path, "e", "depth", 192)], "x.png", MIXED),
        ([memory_record(tmp_path, "f", "recompute", 96)], "x.png", "there is nothing to draw: a picture shows length"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["plot", *map(str, files), "--output", str(tmp_path / output)])
            assert benchmark_plot.main() == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x.png").exists()


def test_all_peers_may_be_named_among_others() -> None:
    assert benchmark.chosen(["ours", "all"], ["dense", "ours"]) == ["dense", "ours"]
    assert benchmark.chosen(["ours", "dense", "ours"], ["dense", "ours"]) == ["ours", "dense"]


def test_a_run_that_measured_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "model", "--seq-len", "64"])
    for result, code in (({"error": "why"}, 1), ({"left_out": "why"}, 1), ({"seconds": 1.0}, 0)):
        monkeypatch.setattr(benchmark, "run", lambda arguments, result=result: [result])
        assert benchmark.main() == code
