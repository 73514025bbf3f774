"""The pipeline's benchmark: every part at toy size, what it concludes, and what it says where something is missing."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import benchmark
import numpy as np
import pytest
from bench_pipeline import common, faults, figures, kills, parts, scale, tokenizing, workers

BUDGET_S = 300
SIZES = """--rounds 1 --vocab-size 400 --seq-len 256 --documents 30 --steps 2 --scale-documents 50 --tokenize-mb 0.05
    --document-mb 0.05 --scale-tb 0.0001"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Novels of sorts: words drawn at random, some of them with accents."""
    folder = tmp_path_factory.mktemp("novels")
    words = [
        "wind",
        "water",
        "été",
        "moon",
        "river",
        "stone",
        "ran",
        "slept",
        "over",
        "under",
        "the",
        "a",
        "cold",
        "old",
    ]
    draws = np.random.default_rng(0)
    for number in range(3):
        lines = (" ".join(draws.choice(words, 9)) + f" {draws.integers(10**6)}.\n" for _ in range(200))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def main(monkeypatch: pytest.MonkeyPatch, work: Path, *words: str | Path) -> int:
    command = ["launch/benchmark.py", "pipeline", *SIZES.split(), "--work", str(work), *map(str, words)]
    monkeypatch.setattr(sys, "argv", command)
    return benchmark.main()


def of(record: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [result for result in record["results"] if all(result.get(key) == value for key, value in values.items())]


def test_speed_size_and_reading(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, nowhere = tmp_path / "result.json", tmp_path / "no-such-python"
    monkeypatch.setattr(tokenizing, "find_spec", lambda name: None)
    options: list[str | Path] = ["--parts", "tokenize", "size", "read", "--corpus", corpus, "--workers", "1", "2"]
    assert main(monkeypatch, tmp_path / "work", *options, "--mds-python", nowhere, "--json", file) == 0
    record = json.loads(file.read_text())
    assert record["what"] == "pipeline" and {"numpy", "sentencepiece", "zarr"} <= set(record["versions"])
    n_bytes = sum(path.stat().st_size for path in corpus.iterdir())
    repeated = n_bytes * -(-50_000 // n_bytes)
    for peer in ("raw-numpy", "raw-list", "ours"):
        one, two = of(record, part="tokenize", peer=peer)
        assert (one["workers"], two["workers"]) == (1, 2) and one["bytes"] == two["bytes"] == repeated
        assert one["tokens"] == two["tokens"] > repeated / 8 and one["stage_s"] >= 0
    for built in of(record, part="tokenize", peer="ours"):
        assert built["seconds"] >= built["stage_s"] and 0.03 < built["peak_gib"] < 2
    (size,) = of(record, part="size")
    assert size["text_bytes"] == n_bytes and size["store_bytes"] > size["tokens_bytes"] > size["tokens"] / 4
    assert size["bytes_per_token"] == size["tokens_bytes"] / size["tokens"] and size["vocab_size"] == 400
    for peer in ("ours", "ours-sample", "memmap"):
        warm, cold = of(record, part="read", peer=peer)
        assert (warm["temperature"], cold["temperature"]) == ("warm", "cold")
        assert warm["rows"] == cold["rows"] == size["rows"] and warm["resident_before"] == 1 and cold["rows_per_s"] > 0
    assert of(record, peer="memmap")[0]["bytes"] == size["rows"] * 256 * 2
    out = capsys.readouterr().out
    assert "tokenize datatrove 1: left out: datatrove is not installed: pip install -e '.[bench]'" in out
    assert f"read mds: left out: mosaicml-streaming is not installed in {nowhere}" in out
    assert not list((tmp_path / "work").iterdir())  # nothing stays


def test_memory_stall_and_scale(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    options: list[str | Path] = [
        "--parts",
        "memory",
        "stall",
        "scale",
        "--corpus",
        corpus,
        "--workers",
        "1",
        "--json",
        file,
    ]
    assert main(monkeypatch, tmp_path / "work", *options) == 0
    record = json.loads(file.read_text())
    assert [(result["corpus"], result["command"]) for result in of(record, part="memory")] == [
        ("one document", "tokenizer"),
        ("one document", "build"),
        ("tiny documents", "tokenizer"),
        ("tiny documents", "build"),
    ]
    assert [result["documents"] for result in of(record, part="memory")] == [1, 1, 30, 30]
    assert all(0.03 < result["peak_gib"] < 2 for result in of(record, part="memory"))
    assert of(record, part="memory")[0]["bytes"] >= 50_000
    (stall,) = of(record, part="stall")
    assert 0 <= stall["data_stall"] <= 1 and len(stall["steps"]) == 1 and stall["step_s"] > 0
    plan, permutation = of(record, part="scale")
    assert plan["documents"] == 50 and 1e8 <= plan["bytes"] <= 1e8 + 50 and plan["planning_s"] > 0
    assert plan["rows"] >= plan["tokens"] / 65_536 and plan["shard_tasks"] == -(-plan["rows"] // 256)
    by_length = permutation["by_length"]
    assert by_length["1e12"]["peak_bytes"] < 2 * by_length["1e3"]["peak_bytes"] + 1000
    out = capsys.readouterr().out
    assert "memory one document (1, 0 MB), build:" in out and "scale: a permutation of 1e12:" in out


def test_what_fails_is_a_result_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "words.txt").write_text("far too little text for a vocabulary\n")
    file = tmp_path / "result.json"
    options: list[str | Path] = ["--parts", "size", "scale", "--corpus", tmp_path / "few", "--json", file]
    assert main(monkeypatch, tmp_path / "work", *options) == 1
    record = json.loads(file.read_text())
    (failed,) = of(record, part="size")
    assert failed["error"].startswith("error: SentencePiece cannot train 400 pieces")
    assert len(of(record, part="scale")) == 2 and "size: error: error: SentencePiece" in capsys.readouterr().out


def test_a_corpus_without_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(monkeypatch, tmp_path / "work", "--corpus", tmp_path / "empty") == 2
    assert f"error: no text in {tmp_path / 'empty'}: name a folder with .txt files" in capsys.readouterr().err


def test_the_memory_of_a_command_is_that_of_its_largest_process() -> None:
    child = "import sys; kept = bytearray(200 << 20)"
    waited = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    for program in (waited, orphan):
        assert 0.2 < common.run([sys.executable, "-c", program], BUDGET_S)["peak_gib"] < 0.25
    assert common.run([sys.executable, "-c", "pass"], BUDGET_S)["peak_gib"] < 0.05


def test_commands_that_fail_or_take_too_long_say_so() -> None:
    with pytest.raises(common.FailedError, match="ValueError: so it is"):
        common.run([sys.executable, "-c", "raise ValueError('so it is')"], BUDGET_S)
    sleeping = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep({BUDGET_S})'])"
    with pytest.raises(common.FailedError, match="stopped after 1 s, the budget"):
        common.run([sys.executable, "-c", sleeping], 1)


def test_the_log_of_a_build_tells_its_stages() -> None:
    log = "a note\ntokenize: 73,000,000 bytes, 18,500,000 tokens, 4.5 s\nwrite: 1 bytes, 2 tokens, 1,000.0 s\n"
    assert common.stages(log) == {
        "tokenize": {"bytes": 73_000_000, "tokens": 18_500_000, "seconds": 4.5},
        "write": {"bytes": 1, "tokens": 2, "seconds": 1000.0},
    }
    assert common.stages("tokenize: 3 of 4, 5 s left") == {}


def test_pages_are_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "pages"
    file.write_bytes(bytes(1 << 20))
    assert workers.resident_share([file]) == 1
    workers.drop_pages([file])
    assert workers.resident_share([file]) in (0, 1)  # 1 where files live in memory only
    with file.open("rb") as opened:
        opened.read()
    assert workers.resident_share([file]) == 1


def test_figures_compare_with_raw_at_as_many_workers() -> None:
    def result(peer: str, workers: int, stage_s: float, **more: float) -> dict[str, Any]:
        return {"part": "tokenize", "peer": peer, "workers": workers, "bytes": 10**6, "stage_s": stage_s, **more}

    raw = [result("raw-numpy", 1, 1.0), result("raw-numpy", 1, 0.5), result("raw-numpy", 1, 2.0)]
    raw += [result("raw-numpy", 2, 0.625), result("raw-list", 2, 0.8)]
    ours = result("ours", 2, 0.78125, seconds=2.0, peak_gib=0.5)
    failed = {"part": "tokenize", "peer": "ours", "workers": 1, "error": "no"}
    one, two, _, figure = figures.tokenize([*raw, ours, failed])
    assert (one["mb_s"], one["slowest"], one["fastest"], one["rounds"]) == (1.0, 0.5, 2.0, 3) and two["mb_s"] == 1.6
    assert figure["mb_s"] == pytest.approx(1.28) and figure["whole_mb_s"] == 0.5 and figure["peak_gib"] == 0.5
    assert figure["of_raw"] == pytest.approx(0.8) and figure["of_raw_times_workers"] == pytest.approx(0.64)
    assert figure["of_raw_list"] == pytest.approx(1.28 / 1.25)
    lines = figures.lines_of("tokenize", [*raw, ours, failed])
    assert "0.800" in lines[4] and lines[-1] == "tokenize ours 1: error: no"


def test_a_scaled_corpus_is_what_the_tokenize_stage_would_have_found(tmp_path: Path) -> None:
    work = scale.write_files(tmp_path, 40, 10**9)
    sizes = [file.n_bytes for file in work.files]
    assert len(sizes) == 40 and abs(sum(sizes) - 10**9) <= 40 and max(sizes) > 4 * min(sizes)
    columns = scale.made_columns(work.tasks)
    assert columns.first.sum() == 40 and columns.n_bytes.sum() == sum(sizes)
    assert len(columns.file) == sum(map(len, work.tasks)) > 40  # large ones are cut
    totals = np.bincount(columns.file, weights=columns.n_bytes)
    assert totals.tolist() == sizes


def test_corpora_are_what_was_asked_for(corpus: Path, tmp_path: Path) -> None:
    whole = b"".join(path.read_bytes() for path in sorted(corpus.iterdir()))
    tiny = common.texts_of(common.tiny_documents(corpus, tmp_path / "tiny", 1002))
    assert len(tiny) == 1002 and all(path.read_bytes().count(b"\n") == 4 for path in tiny)
    assert b"".join(path.read_bytes() for path in tiny)[: len(whole)] == whole
    (one,) = common.texts_of(common.one_document(corpus, tmp_path / "one", 2 * len(whole) + 1))
    assert one.stat().st_size > 2 * len(whole) and one.read_bytes().startswith(whole + whole)
    twice = common.repeated(corpus, tmp_path / "twice", len(whole) + 1)
    assert common.size_of(twice) == 2 * len(whole)


def test_the_tokenizer_that_datatrove_gets_gives_the_same_ids(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    arguments = argparse.Namespace(vocab_size=400, budget_s=BUDGET_S)
    bench = common.Bench(arguments, tmp_path, [corpus], lambda result: None)
    compared = tokenizing.convert(bench.tokenizer(corpus), tmp_path / "tokenizer.json", corpus)
    assert compared == {"compared_lines": 600, "same_lines": 600}
    assert bench.tokenizer(corpus) == tmp_path / "tokenizer-0"  # trained once


def test_rows_that_differ_are_noticed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = argparse.Namespace(
        vocab_size=400, seq_len=256, budget_s=BUDGET_S, rounds=1, mds_python=tmp_path / "none"
    )
    bench = common.Bench(arguments, tmp_path, [corpus], lambda result: None)
    monkeypatch.setattr(parts, "write_raw", lambda store, folder: -1)
    with pytest.raises(common.FailedError, match="ours read other tokens: their sum is"):
        parts.read(bench)


def test_faults_of_the_pipeline_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    words = ["pipeline-faults", "flips", "--times", "3", "--seed", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", *words])
    assert benchmark.main() == 0
    record = json.loads(file.read_text())
    assert record["command"].startswith("python launch/benchmark.py pipeline-faults flips --times 3")
    assert len(record["results"]) == 3 and all(one["verify"] == "named" for one in record["results"])
    assert capsys.readouterr().out.endswith("3 flips: 0 not found by verify, 0 gave wrong values\n")
    # Of kills, what they come to: tests/data_pipeline/test_parallel_runs.py kills.
    failed = kills.Trial("serial", [kills.Kill(1.0, "all", "tokens", 1, 0, 2, "was killed")])
    monkeypatch.setattr(faults, "kills", lambda times, seed, n_bytes: [failed])
    monkeypatch.setattr(sys, "argv", ["launch/benchmark.py", "pipeline-faults", "kills"])
    assert benchmark.main() == 1
    assert capsys.readouterr().out == "1 kill in 1 build, 1 of which did not come out as if undisturbed\n"
