"""What of `make gpu-check` needs no GPU: its budget, its arithmetic, its table, and the whole flow at tiny sizes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from bench_gpu import budget as gpu_budget
from bench_gpu import peers as gpu_peers
from bench_gpu import roofline, testing, timing

from trainer.flops import training_flops

ROOT = Path(__file__).parents[2]

TINY = "--d-model 32 --n-layers 1 --n-heads 2 --n-hashes 2 --chunk-len 16"


def test_roofline_by_hand() -> None:
    """One token, one head of 4 numbers of 2 bytes, 3 rounds of chunks of 8."""
    forward = roofline.forward_work(1, 1, 4, 3, 8, 2)
    assert forward.must_move == 3 * (8 + 8 + 4) + 8
    assert forward.moved - forward.must_move == 2 * 2 * (16 + 8)  # two of three rounds write and two read
    assert forward.operations == 3 * 16 * 4 * 4  # two products with 16 visible keys, two operations each
    backward = roofline.backward_work(1, 1, 4, 3, 8, 2)
    assert backward.operations == 3 * 16 * 4 * 14
    both = forward + backward
    assert both.roofline_s((both.must_move, 1e9)) == pytest.approx(1)
    assert both.roofline_s((1e9, both.operations / 2)) == pytest.approx(2)


def test_peaks_by_name() -> None:
    assert roofline.peaks_of("NVIDIA H200") == (4.8e12, 989.5e12)
    assert roofline.peaks_of("NVIDIA H100 80GB HBM3") == (3.35e12, 989.5e12)
    assert roofline.peaks_of("NVIDIA H100 PCIe") == (2.0e12, 756.5e12)
    assert roofline.peaks_of("NVIDIA H200 NVL") == (4.8e12, 835.5e12)
    assert roofline.peaks_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert roofline.peaks_of("NVIDIA GH200 120GB") is None
    assert roofline.peaks_of("Tesla V100-SXM2-16GB") is None  # no bf16


def test_share_of_the_roofline_only_where_the_peaks_are_known() -> None:
    sizes = timing.Sizes(seq_len=1024)
    known = timing.achieved(sizes, torch.bfloat16, False, 1e-3, (1e12, 1e15))
    work = roofline.forward_work(1024, 4, 64, 4, 64, 2)
    assert known == {"gb_per_s": work.moved / 1e6, "roofline_share": work.must_move / 1e9}
    assert timing.achieved(sizes, torch.bfloat16, True, 1e-3, None).keys() == {"gb_per_s"}


def test_mfu_is_what_a_step_needs_over_what_the_device_could() -> None:
    """Of our model only, and only where the device's peak is known."""
    sizes, peaks = timing.Sizes(seq_len=1024), (1e12, 2e12)
    needed = training_flops(timing.config_of(sizes), 1024)
    for peer in timing.OUR_MODEL:
        found = timing.training_speed(sizes, peer, 0.5, peaks)
        assert found == {"tokens_per_s": 2048, "mfu": pytest.approx(needed / 1e12)}
        assert timing.training_speed(sizes, peer, 0.5, None) == {"tokens_per_s": 2048}
    assert timing.training_speed(sizes, "flash", 0.5, peaks) == {"tokens_per_s": 2048}
    assert set(timing.OUR_MODEL) <= set(gpu_peers.MODEL)


def test_every_length_of_the_model_and_the_longest_have_their_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(build: Any, device: torch.device, once: bool = False) -> Any:
        if build.args[1].seq_len > 1024:
            raise torch.OutOfMemoryError
        return {"seconds": 0.25, "first_s": 0.5, "peak_gib": 1.0}

    monkeypatch.setattr(timing, "measure", fake)
    peers = ["ours", "flash", "ours-chunked"]
    setting = timing.Setting(torch.device("cpu"), torch.float32, gpu_budget.Budget(100, 10), (1e12, 1e12), peers)
    sizes = timing.Sizes(seq_len=256)

    def expected(seq_len: int) -> Any:
        flops = training_flops(timing.config_of(timing.replace(sizes, seq_len=seq_len)), seq_len)
        return {"tokens_per_s": seq_len / 0.25, "mfu": pytest.approx(flops / 0.25e12)}

    models = [x for x in timing.run_items(sizes, setting, ()) if x["what"] == "model fwd+bwd"]
    assert [(x["peer"], "mfu" in x, x["tokens_per_s"]) for x in models] == [
        ("ours", True, 1024),
        ("ours-chunked", True, 1024),
        ("flash", False, 1024),
    ]
    assert {key: models[0][key] for key in ("tokens_per_s", "mfu")} == expected(256)
    kept: list[int] = []
    known = [{"seq_len": 512, "seconds": 0.25, "peak_gib": 1.0}]
    found = timing.find_longest(sizes, known, setting, lambda tried: kept.append(len(tried)))
    assert kept == [1, 2, 3]
    assert found["seq_len"] == 1024
    assert {key: found[key] for key in ("tokens_per_s", "mfu")} == expected(1024)
    assert [x.get("mfu") for x in found["tried"]] == [expected(1024)["mfu"], None, None]
    assert found["limited_by"] == "memory"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"seconds": 0.0123, "peak_gib": 1.5}, "12.300 ms     1.50 GiB"),
        ({"seconds": 1, "peak_gib": 2.0, "tokens_per_s": 65536.4, "mfu": 0.4321}, "65,536 tokens/s  43.2% MFU"),
        (
            {"seconds": 1, "peak_gib": None, "gb_per_s": 2000.0, "roofline_share": 0.42},
            "2000 GB/s    42% of the roofline",
        ),
        ({"seconds": 1, "peak_gib": None, "first_call": True}, "1000.000 ms  (first call)"),
        ({"error": "out of memory"}, "flash            out of memory"),
        ({"left_out": "left out: why"}, "left out: why"),
    ],
)
def test_row(result: dict[str, Any], expected: str) -> None:
    line = timing.row({"seq_len": 65536, "what": "attention forward", "peer": "flash", **result})
    assert line.startswith("   65,536  attention forward ") and line.endswith(expected)


def test_what_goes_wrong_is_a_result() -> None:
    def fails(error: Exception) -> Any:
        raise error

    cpu = torch.device("cpu")
    assert timing.attempt(lambda: fails(torch.OutOfMemoryError("CUDA")), cpu) == {"error": "out of memory"}
    assert timing.attempt(lambda: fails(ImportError("no x\nmore")), cpu) == {"error": "ImportError: no x"}


def test_what_a_lost_gpu_leaves_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an illegal access every call of CUDA fails, those of the other peers too."""
    asked = []

    def fails(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def build(name: str, sizes: Any, *_: object) -> Any:
        asked.append((name, sizes.seq_len))
        if len(asked) == 3:
            monkeypatch.setattr(timing, "_synchronize", fails)
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return lambda: None

    monkeypatch.setattr(timing, "attention_step", build)
    words = f"--device cpu --seq-len 32 64 {TINY} --skip-tests --peers ours flash --json {tmp_path}/x.json"
    monkeypatch.setattr(sys, "argv", ["launch/gpu_check.py", *words.split()])
    monkeypatch.setattr(gpu_check, "disagreement", lambda *_: {"out": 0.0})
    assert gpu_check.main() == 1
    record = json.loads((tmp_path / "x.json").read_text())
    assert asked == [("ours", 32), ("ours", 32), ("flash", 32)]
    assert [x["peer"] for x in record["results"]] == ["ours", "ours"]
    assert record["lost"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert "error: the GPU answers no more after RuntimeError: CUDA error: an ill" in capsys.readouterr().err


def test_a_peer_that_failed_or_is_missing_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build(name: str, *_: object) -> Any:
        asked.append(name)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "attention_step", build)
    monkeypatch.setattr(timing, "model_training_step", build)
    monkeypatch.setattr(timing, "find_spec", lambda name: None)
    peers = [*gpu_peers.ATTENTION, *gpu_peers.MODEL]
    setting = timing.Setting(torch.device("cpu"), torch.float32, gpu_budget.Budget(100, 10), None, peers)
    first = list(timing.run_items(timing.Sizes(seq_len=64), setting, ()))
    assert {x["error"] for x in first if x["peer"] == "huggingface"} == {"transformers is not installed"}
    n_asked = len(asked)
    assert n_asked and "huggingface" not in asked
    second = list(timing.run_items(timing.Sizes(seq_len=128), setting, first))
    assert len(asked) == n_asked and all("error" in x for x in second)


def test_the_longest_is_looked_for_before_other_peers_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[Any] = []

    def run_items(sizes: Any, setting: Any, earlier: Any, reserve_s: float) -> Any:
        done.append((sizes.seq_len, tuple(setting.peers), reserve_s))
        for peer in setting.peers:
            yield {"what": "model fwd+bwd", "peer": peer, "seq_len": sizes.seq_len, "seconds": 1}

    monkeypatch.setattr(gpu_check, "run_items", run_items)
    monkeypatch.setattr(gpu_check, "find_longest", lambda *_: done.append("longest") or {})
    monkeypatch.setattr(gpu_check, "disagreement", lambda *_: {"out": 0.0})
    monkeypatch.setattr(gpu_check, "attempt", lambda function, device: function())
    monkeypatch.setattr(gpu_check, "hardware", lambda *_: {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=140 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    words = f"--seq-len 64 128 --skip-tests --budget-s 100 --peers flex flash ours cudnn --json {tmp_path}/x.json"
    monkeypatch.setattr(sys, "argv", ["launch/gpu_check.py", *words.split()])
    assert gpu_check.main() == 0
    reserve_s = 100 * gpu_check.LONGEST_SHARE
    first, others = ("flash", "ours"), ("flex", "cudnn")
    assert done == [(64, first, reserve_s), (128, first, reserve_s), "longest", (64, others, 0.0), (128, others, 0.0)]


def test_tests_run_in_shares_and_failures_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "test_these.py"
    file.write_text("import pytest\n@pytest.mark.parametrize('n', range(3))\ndef test_it(n):\n    assert n < 2\n")
    monkeypatch.setattr(testing, "KERNEL_TESTS", (str(file),))
    monkeypatch.setattr(testing, "TRAINER_TESTS", (str(tmp_path / "test_others.py"),))
    monkeypatch.setattr(testing, "ROOT", tmp_path)
    monkeypatch.setattr(testing, "TEST_PROCESSES", 2)
    monkeypatch.setattr(testing, "TRAINER_NEEDS", ("a_package_that_is_not_there",))
    found = testing.run_tests()
    assert (found["tests"], found["error"]) == (3, "tests failed") and "test_it[2]" in found["failed"][0]
    assert found["left_out"] == "tests of the trainer, which needs a_package_that_is_not_there"

    (tmp_path / "test_others.py").write_text("def test_that():\n    pass\n")
    file.write_text(file.read_text().replace("n < 2", "True"))
    monkeypatch.setattr(testing, "TRAINER_NEEDS", ("pytest",))
    assert testing.run_tests() == {"tests": 4, "failed": []}
    (tmp_path / "test_others.py").write_text("import a_package_that_is_not_there\n")
    found = testing.run_tests()
    assert (found["tests"], found["error"]) == (3, "tests failed") and "test_others.py" in found["failed"][0]

    monkeypatch.setattr(testing, "find_spec", lambda name: None)
    assert testing.run_tests() == {"error": "pytest is not installed"}


def test_tests_of_the_kernels_need_nothing_of_the_trainers() -> None:
    """Nor does what pytest loads for them: a GPU machine may have PyTorch and Triton alone."""
    program = f"""import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {testing.TRAINER_NEEDS}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", *{testing.KERNEL_TESTS}]))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_tests_end_with_who_runs_them(tmp_path: Path, sent: signal.Signals) -> None:
    """And what they have started: in a session of its own, which a signal of the terminal does not reach."""
    (tmp_path / "test_long.py").write_text(
        "import pathlib, subprocess, sys, time\ndef test_it():\n"
        "    other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        "    pathlib.Path('pid').write_text(str(other.pid))\n    time.sleep(100)\n"
    )
    program = (
        "import signal, sys; from pathlib import Path; from bench_gpu import testing\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs ignore
        f"testing.ROOT, testing.KERNEL_TESTS = Path({str(tmp_path)!r}), ('test_long.py',)\n"
        "testing.TRAINER_NEEDS = ('no',)\n"
        "testing.run_tests()"
    )
    search = {**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}{os.pathsep}{ROOT}"}
    with subprocess.Popen([sys.executable, "-c", program], env=search, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait(60) != 0
    other = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30  # it was killed a moment ago, and may not have noticed yet
    while is_alive(other):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_models_are_built_in_the_dtype_asked_for_and_the_default_is_restored() -> None:
    sizes = timing.Sizes(seq_len=64, d_model=32, n_layers=1, n_heads=2, chunk_len=16)
    for name in ("ours", "flash"):
        gpu_peers.model_training_step(name, sizes, torch.device("cpu"), torch.bfloat16)()
    assert torch.get_default_dtype() == torch.float32


def test_the_whole_flow_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = f"--device cpu --seq-len 32 64 {TINY} --skip-tests --budget-s 60 --json {file}".split()
    words += ["--peers", "ours", "flash", "ours-attention"]
    done = subprocess.run(
        [sys.executable, "launch/gpu_check.py", *words], capture_output=True, text=True, cwd=ROOT, check=True
    )
    record = json.loads(file.read_text())
    assert record["command"][2:] == words
    ran = {(x["what"], x["peer"]) for x in record["results"] if "seconds" in x}
    assert {("model fwd+bwd", "ours"), ("model fwd+bwd", "flash"), ("attention fwd+bwd", "ours-attention")} <= ran
    assert "longest" not in record  # not on a CPU
    models = [x for x in record["results"] if x["what"] == "model fwd+bwd" and "seconds" in x]
    assert all(x["tokens_per_s"] == x["seq_len"] / x["seconds"] for x in models)
    assert not any("mfu" in x for x in record["results"])  # its peak is not known
    assert record["fused_against_chunked"]["agrees"] and record["fused_against_chunked_packed"]["agrees"]
    assert "model fwd+bwd     ours" in done.stdout


def test_paths_that_disagree_are_told() -> None:
    good = gpu_check.judged({"out": 0.01, "d_qk": 0.02}, torch.bfloat16)
    assert good == {"out": 0.01, "d_qk": 0.02, "tolerance": 0.05, "agrees": True}
    for errors in ({"out": 0.5}, {"out": float("nan")}, {"error": "out of memory"}):
        found = gpu_check.judged(errors, torch.bfloat16)
        assert not found["agrees"]
        json.dumps(found, allow_nan=False)


def test_disagreement_is_that_of_two_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = timing.Sizes(seq_len=64, d_model=32, n_heads=2, chunk_len=16)
    attend = gpu_peers.attention_in_chunks
    calls = []

    def other(*arguments: Any) -> Any:
        calls.append(arguments[-1])
        return attend(*arguments) * (1.5 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(gpu_peers, "attention_in_chunks", other)
    for n_documents in (1, 5):
        calls.clear()
        found = gpu_peers.disagreement(sizes, n_documents, torch.device("cpu"), torch.float32)
        assert len(calls) == 2 and all(error == pytest.approx(0.5, rel=1e-4) for error in found.values())


def test_packed_rows_have_as_many_documents() -> None:
    segments = gpu_peers.segments_of(1000, 7, torch.device("cpu"))
    assert segments.unique().tolist() in (list(range(7)), list(range(1, 8)), list(range(6)))  # one may begin at 0
    assert (segments.diff() >= 0).all()
    q = torch.zeros(1, 4, 1000, 64)
    assert gpu_peers.packed_layout_of(timing.Sizes(seq_len=1000), q, 7).segment_ids_GT.shape == (4, 1000)


def test_on_a_gpu_ours_is_the_fused_path_or_an_error() -> None:
    assert gpu_peers.fused(torch.device("cuda")) == "triton"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seq-len 0", "0 is not a whole number"),
        ("--d-model 64 --n-heads 3", "d_model=64 is not divisible by n_heads=3"),
        ("--seq-len 64 --d-model 32 --n-heads 2 --json /nowhere/x.json", "cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/gpu_check.py", "--device", "cpu", *words.split()])
    monkeypatch.setattr(gpu_check, "run_tests", lambda: pytest.fail("began"))
    try:
        code = gpu_check.main()
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


def test_what_was_written_stays_where_more_cannot_be(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    gpu_check.write(file, {"n": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    (tmp_path / "x.json.partial").mkdir()
    with pytest.raises(gpu_check.DataError, match="cannot be written"):
        gpu_check.write(file, {"n": 2})
    assert json.loads(file.read_text()) == {"n": 1}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch/gpu_check.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_what_is_not_installed_is_named() -> None:
    """Before anything else: a machine with a GPU may have no more than torch."""
    program = "import runpy, sys; sys.modules['pydantic'] = None; runpy.run_path('launch/gpu_check.py')"
    search = {**os.environ, "PYTHONPATH": f"{ROOT / 'launch'}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=search, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pydantic is not installed here: gpu_check.py needs torch, Triton, ")
