"""The demo without its steps, each of which is a command that has tests of its own: its corpus, and how it ends."""

import subprocess
import sys
from pathlib import Path

import demo
import pytest
from bench import corpora

ROOT = Path(__file__).parents[2]


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    words = ["--corpus", str(tmp_path / "nowhere"), "--output", str(tmp_path / "results")]
    done = subprocess.run([sys.executable, "launch/demo.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    *_, reason, last = done.stderr.splitlines()
    assert reason.startswith("error: ") and str(tmp_path / "nowhere") in reason
    assert last == "error: the demo stopped: that command ended with exit code 2"
    assert done.stdout.count("\n$ ") == 1 and "Traceback" not in done.stderr


def test_a_demo_whose_commands_do_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(demo, "step", lambda *words: commands.append(" ".join(map(str, words))))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--corpus", str(tmp_path), "--output", str(tmp_path / "results")])
    assert demo.main() == 0
    words = ("data_pipeline tokenizer", "data_pipeline build", "verify", "inspect", "launch/train.py", "report.py")
    assert all(word in command for word, command in zip(words, commands, strict=True))


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "results")])
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    assert demo.main() == 2
    assert capsys.readouterr().err == (
        f"error: no Python sources in {tmp_path / 'none'}: name a folder of .txt files, make demo CORPUS=path\n"
    )


def test_the_corpus_is_the_standard_library_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, content in {
        "lib/a.py": b"a = 1",
        "lib/test/latin1.py": b"\xe9",
        "lib/site-packages/b.py": b"b = 2",
        "lib/data.txt": b"c",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    for said in ("1 files of Python's standard library, 0.0 MB (1 left out: not UTF-8)", "is already there"):
        corpora.write_standard_library(tmp_path / "corpus")
        assert said in capsys.readouterr().out
        assert [path.name for path in (tmp_path / "corpus").rglob("*")] == ["a.py.txt"]
