"""The memory benchmark: what it measures, what it predicts from the configuration, and what it concludes."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark
import pytest
import torch
from bench import peers, plot, prediction, process
from bench_memory import command, figures
from parity import assert_parity, gradients

TINY = peers.Sizes(seq_len=96, d_model=16, n_layers=2, n_heads=2, n_hashes=2, chunk_len=16, vocab_size=20)
OPTIONS = {"d_model": 16, "n_heads": 2, "n_hashes": 2, "chunk_len": 16, "vocab_size": 20, "threads": 1}
TINY_OPTIONS = [word for key, value in OPTIONS.items() for word in (process.option(key), str(value))]
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_hashes": 2, "chunk_len": 16, "vocab_size": 20}
SIZES |= {"chunk_tokens": 4096}
GIB = 2**30
RESULT_KEYS = {"part", "peer", "seq_len", "n_layers", "vocab_size", "seconds", "step_s", "wall_s", "threads"}
RESULT_KEYS |= {"peak_gib", "imports_gib", "parameters", "gradients", "optimizer"}


def main(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "memory", *map(str, words)])
    return benchmark.main()


def arguments_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "memory", *words])
    return benchmark.parse_arguments()


def result(part: str, peer: str = "ours", **values: Any) -> dict[str, Any]:
    """A measurement of 1 GiB, half of it libraries, with a sixteenth of state."""
    state = {"parameters": GIB // 64, "gradients": GIB // 64, "optimizer": GIB // 32}
    measured = {"seconds": 1.0, "peak_gib": 1.0, "imports_gib": 0.5, **state}
    point = {"part": part, "peer": peer, "seq_len": 64, "n_layers": 2, "vocab_size": 20}
    return point | (values if {"error", "left_out"} & set(values) else measured | values)


def answering(answer: Callable[[str, peers.Sizes], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """In place of a measurement, what this function says."""
    return lambda arguments, name, sizes, part: answer(name, sizes)


def measured(**values: Any) -> dict[str, Any]:
    """What a worker says."""
    point = {"part", "peer", *figures.VARIED}
    return {key: value for key, value in result("", **values).items() if key not in point}


def test_a_run_from_the_command_line_to_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    options = ["--parts", "depth", "--depths", "2", "--depth-tokens", "96", "--peers", "ours", *TINY_OPTIONS]
    assert main(monkeypatch, *options, "--json", file, "--plot", picture) == 0  # which starts a process
    record = json.loads(file.read_text())
    assert record["what"] == "memory" and record["sizes"] == SIZES and record["threads"] == 1
    assert record["command"].startswith("python launch/benchmark.py memory --parts depth") and record["ram_gib"] > 0.5
    (one,) = record["results"]
    assert set(one) == RESULT_KEYS and (one["part"], one["peer"], one["n_layers"]) == ("depth", "ours", 2)
    assert len(one["step_s"]) == command.STEPS and one["seconds"] == one["step_s"][1] > 0
    assert one["peak_gib"] > one["imports_gib"] > 0.05
    assert one["parameters"] == one["gradients"] == figures.predicted_bytes(TINY)["parameters"]
    header, row, drew = capsys.readouterr().out.splitlines()
    assert header == command.HEADER and row.split()[:5] == ["depth", "96", "2", "20", "ours"]
    assert row.split()[5] == f"{one['peak_gib']:.3f}" and drew == f"drew {picture}"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_what_is_predicted_is_what_the_configuration_says() -> None:
    # A layer: two norms, qk, value, out; in, out and their biases. A head: norm of both streams, weight, bias.
    layer = 2 * 2 * 16 + 3 * 16 * 16 + 2 * 16 * 64 + 64 + 16
    rest = 20 * 16 + (8 * 4 + 12 * 12) + 2 * 32 + 20 * 32 + 20  # 96 = 8 * 12 positions, a quarter of the width by rows
    predicted = figures.predicted_bytes(TINY)
    parameters = 4 * (2 * layer + rest)
    buckets = 2 * (2 * 2 * 96 * 2)  # layers * H * R * T * int16
    expected = {"parameters": parameters, "gradients": parameters, "optimizer": 2 * parameters, "buckets": buckets}
    assert predicted == expected
    # 2^20 tokens in chunks of 16 have 2^17 buckets, beyond int16
    assert figures.bucket_bytes(peers.config_of(TINY), 2**20) == 2 * 2 * 2**20 * 4


@pytest.mark.parametrize("name", ["ours", "ours-autograd", "dense"])
def test_a_measurement_holds_parameters_gradients_and_moments_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, seen = command.MEMORY_PEERS[name], []

    def build(sizes: peers.Sizes) -> peers.Model:
        model, loss_of = peer.build(sizes)

        def watched(tokens: torch.Tensor) -> torch.Tensor:
            kept = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert all(not gradient.any() for gradient in kept)
            seen.append(sum(gradient.nbytes for gradient in kept))
            return loss_of(tokens)

        return model, watched

    here = command.measure_here(peers.Peer(build), TINY, steps=3, threads=1)
    parameters = here["parameters"]
    n_scalars = len(list(peer.build(TINY)[0].parameters()))  # how many steps each was updated
    assert seen == [0, parameters, parameters] and here["gradients"] == parameters
    assert here["optimizer"] == 2 * parameters + 4 * n_scalars
    assert here["seconds"] == pytest.approx(sum(here["step_s"][1:]) / 2)
    if name != "dense":
        assert parameters == figures.predicted_bytes(TINY)["parameters"]


def test_plain_autograd_is_the_same_model() -> None:
    """Loss and gradients in float64; the second with the buckets and rotations of the first."""
    found = []
    for build in (peers.ours, peers.ours_by_autograd):
        torch.manual_seed(0)
        model, loss_of = build(TINY)
        model.double().train()
        loss = loss_of(torch.randint(0, 20, (1, 96), generator=torch.Generator().manual_seed(1)))
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
    assert_parity(*found, tolerance=1e-9)


def test_plain_autograd_keeps_what_every_block_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison is one: what autograd saves grows with depth, and with reversible layers it does not."""

    def saved_bytes(name: str, n_layers: int) -> int:
        sizes = replace(TINY, n_layers=n_layers)
        model, loss_of = command.MEMORY_PEERS[name].build(sizes)
        known, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in known:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(torch.zeros(1, 96, dtype=torch.int64))
        assert loss.requires_grad
        return sum(saved.values())

    stream = 96 * 16 * 4
    assert saved_bytes("ours-autograd", 4) - saved_bytes("ours-autograd", 2) > 2 * 5 * stream
    assert saved_bytes("ours", 4) - saved_bytes("ours", 2) < stream


def test_every_part_is_measured_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--seq-len", "64", "32", "--depths", "3", "1", "--vocab-sizes", "30", "20", "--n-layers", "4"]
    options += ["--depth-tokens", "48", "--layer-tokens", "80", "--recompute-layers", "5", "--rounds", "2"]
    parts = {part.name: part for part in command.parts_of(arguments_of(monkeypatch, *options))}
    points = {
        name: [(sizes.seq_len, sizes.n_layers, sizes.vocab_size) for sizes in part.points]
        for name, part in parts.items()
    }
    assert points == {
        "length": [(32, 4, 256), (64, 4, 256)],
        "depth": [(48, 1, 256), (48, 3, 256)],
        "layer": [(80, 1, 256), (80, 3, 256)],
        "vocabulary": [(80, 4, 20), (80, 4, 30)],
        "recompute": [(48, 5, 256)],
    }
    assert parts["length"].peers == parts["depth"].peers == ["ours", "huggingface", "lucidrains", "dense"]
    assert parts["layer"].peers == parts["vocabulary"].peers == ["ours"]
    assert parts["recompute"].peers == ["ours", "ours-autograd"] and parts["recompute"].rounds == 2
    assert {name for name, part in parts.items() if part.environ == command.MALLOC} == {"layer", "vocabulary"}


def test_malloc_gives_back_what_is_freed_where_bytes_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> argparse.Namespace:
        asked.append((command[command.index("--worker") + 1], env.get("MALLOC_MMAP_THRESHOLD_")))
        return argparse.Namespace(returncode=0, stdout=json.dumps(measured()), stderr="")

    monkeypatch.setattr(process, "machine", lambda: {"ram_gib": 24.0})  # which would run git
    monkeypatch.setattr(process.subprocess, "run", run)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    options = ["--parts", "layer", "recompute", "--depths", "1", "2", "--rounds", "2", *TINY_OPTIONS]
    command.run(arguments_of(monkeypatch, *options))
    turns = [("ours", None), ("ours-autograd", None)]
    assert asked == [("ours", "131072"), ("ours", "131072"), *turns, *turns]


def test_bytes_per_layer() -> None:
    predicted = sum(figures.predicted_bytes(TINY).values())
    more = sum(figures.predicted_bytes(replace(TINY, n_layers=12)).values())
    per_layer = (more - predicted) / 10
    results = [result("layer", n_layers=12, seq_len=96, peak_gib=1.0 + 11 * per_layer / GIB)]
    results += [result("layer", n_layers=2, seq_len=96), result("depth", n_layers=24, seq_len=96)]
    results += [result("layer", n_layers=3, seq_len=96, peak_gib=1.0 + 2 * per_layer / GIB)]  # one of them only once
    figure = figures.layer_figure("layer", results, SIZES)
    assert figure is not None and figure["n_layers"] == [2, 12] and figure["ratio"] == pytest.approx(1.1)
    assert sum(figure["predicted_bytes"].values()) == pytest.approx(per_layer)
    assert figure["predicted_bytes"]["buckets"] == 2 * 2 * 96 * 2
    assert [one["n_layers"] for one in figure["between"]] == [[2, 3], [3, 12]]
    assert [one["ratio"] for one in figure["between"]] == pytest.approx([2.0, 1.0])
    assert ", 1.100 times (target: within 10%)" in figures.layer_line("target: within 10%", figure)
    assert figures.layer_figure("layer", results[:1], SIZES) is None


def test_what_a_vocabulary_takes() -> None:
    extra = 4 * 4 * (1000 - 20) * (16 + 32 + 1) / GIB  # embedding, output weight and bias, all four times
    results = [result("vocabulary"), result("vocabulary", vocab_size=1000, peak_gib=1.2 * (1.0 + extra))]
    figure = figures.vocabulary_figure(results, SIZES)
    assert figure is not None and figure["predicted_gib"] == pytest.approx(extra)
    assert figure["ratio"] == pytest.approx(1.2) and figure["measured_gib"] == pytest.approx(0.2 + 1.2 * extra)
    assert "1.200 times the small one's" in figures.vocabulary_line(figure)
    assert figures.vocabulary_figure(results[:1], SIZES) is None


def test_what_reversibility_costs_and_saves() -> None:
    ours = [result("recompute", seconds=seconds) for seconds in (1.0, 1.2, 1.6)]
    plain = [result("recompute", "ours-autograd", seconds=seconds, peak_gib=4.0) for seconds in (1.0, 1.0, 0.8)]
    figure = figures.recompute_figure([*ours, *plain], SIZES)
    assert figure is not None and figure["times"] == pytest.approx(1.2)
    assert figure["times_by_round"] == pytest.approx([1.0, 1.2, 2.0])
    assert figure["activations_gib"] == pytest.approx([1.0 - 0.5 - 1 / 16, 4.0 - 0.5 - 1 / 16])
    line = figures.recompute_line(figure)
    assert "1.20 (1.00..2.00) times the time of plain autograd" in line and "0.127 of them" in line
    assert figures.recompute_figure(ours, SIZES) is None


def test_what_would_take_too_much_is_left_out_reported_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(name: str, sizes: peers.Sizes) -> dict[str, Any]:
        slow = 10 if name == "dense" else 1
        return measured(seconds=slow * sizes.seq_len * sizes.n_layers / 64, peak_gib=0.5 + sizes.seq_len / 640)

    monkeypatch.setattr(command, "measure", answering(answer))
    options = ["--parts", "length", "depth", "layer", "--seq-len", "64", "256", "--depths", "1", "8", *TINY_OPTIONS]
    options += ["--depth-tokens", "64", "--layer-tokens", "64", "--budget-s", "100", "--peers", "ours", "dense"]
    picture, file = tmp_path / "x.svg", tmp_path / "x.json"
    assert main(monkeypatch, *options, "--json", file, "--plot", picture) == 0
    out = capsys.readouterr().out
    assert "dense           predicted 160 s: over the budget of 100 s" in out  # 8 times a step of 10 s, two steps
    record = json.loads(file.read_text())
    left_out = [one for one in record["results"] if "left_out" in one]
    assert [(one["part"], one["peer"], one["seq_len"], one["n_layers"]) for one in left_out] == [
        ("length", "dense", 256, 2),
        ("depth", "dense", 64, 8),
    ]
    of_depth = [one for one in record["results"] if one["part"] == "depth"]
    lines = plot.lines(of_depth, "peak_gib", "predicted_gib", "n_layers")
    assert list(lines["ours"].values) == [1, 8] and list(lines["dense"].predicted) == [8]
    text = picture.read_text()
    assert "Peak memory by length, 2 layers" in text and "Peak memory by depth, 64 tokens" in text


def test_a_picture_of_one_part_has_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure", answering(lambda name, sizes: measured()))
    for part, drawn, other in (
        ("length", "length", "depth"),
        ("depth", "depth", "length"),
        ("layer", "depth", "length"),
    ):
        picture = tmp_path / f"{part}.svg"
        assert main(monkeypatch, "--parts", part, "--peers", "ours", *TINY_OPTIONS, "--plot", picture) == 0
        assert f"memory by {drawn}" in picture.read_text() and f"memory by {other}" not in picture.read_text()


def test_that_there_is_nothing_to_draw_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", answering(lambda name, sizes: measured()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # which is not needed then
    assert main(monkeypatch, "--parts", "recompute", "vocabulary", *TINY_OPTIONS, "--plot", tmp_path / "x.png") == 0
    assert capsys.readouterr().out.endswith("drew nothing: none of length, depth, layer was measured\n")
    assert not list(tmp_path.iterdir())


def test_a_run_that_measured_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", answering(lambda name, sizes: {"error": "no memory"}))
    assert main(monkeypatch, *TINY_OPTIONS, "--plot", tmp_path / "x.png") == 1
    assert "ours            error: no memory" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_peers_that_are_not_installed_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = replace(command.MEMORY_PEERS["huggingface"], module="no_such_package.module")
    monkeypatch.setitem(command.MEMORY_PEERS, "huggingface", absent)
    assert main(monkeypatch, "--parts", "depth", "--peers", "huggingface", "--plot", tmp_path / "x.png") == 1
    assert "huggingface     transformers is not installed: pip install -e '.[bench]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--peers", "ours-autograd"],
            "error: no peer ours-autograd: choose from ours, huggingface, lucidrains, dense",
        ),
        (["--parts", "width"], "argument --parts: invalid choice: 'width' (choose from"),
        (["--depths", "0"], "argument --depths: 0 is not a whole number of at least 1"),
        (["--plot", "no/such/x.png"], "error: cannot draw no/such/x.png: there is no folder no/such"),
        (["--plot", "x.mp3"], "error: cannot draw x.mp3: its name must end in one of .png, .svg, .pdf"),
        (["--json", "no/such/x.json"], "error: cannot write no/such/x.json: "),
        (["--parts", "layer", "--plot", "folder.png"], "error: cannot draw folder.png: Is a directory"),
        (["--plot", "/proc/x.png"], "error: cannot draw /proc/x.png: "),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("measured"))
    try:
        code = main(monkeypatch, *words)
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["huggingface", "lucidrains"])
def test_installed_peers_are_trained(name: str) -> None:
    peer = command.MEMORY_PEERS[name]
    pytest.importorskip(peer.module)
    here = command.measure_here(peer, replace(TINY, seq_len=128), steps=1, threads=1)
    # Hugging Face's has one that takes no part.
    assert 0.9 * here["parameters"] < here["gradients"] <= here["parameters"] < here["optimizer"]


def test_depth_is_predicted_by_layer() -> None:
    """Memory that does not grow with depth must not be predicted to double with it."""
    assert prediction.predict_depth([(2, 1.0), (6, 1.2)], 24) == pytest.approx(2.1)
    assert prediction.predict_depth([(2, 1.0), (6, 0.9)], 24) == 0.9  # noise does not shrink a model
    assert prediction.predict_depth([(2, 1.0)], 6) == 3.0
