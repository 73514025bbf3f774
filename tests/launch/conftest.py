"""A tokenizer of text and exported models, which the tests of several commands have."""

import sys
from pathlib import Path

import generate
import pytest
from small_exports import tokenizer_record, write_export

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.training import TrainingSettings, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, text = tmp_path_factory.mktemp("tokenizer") / "small.model", Path(__file__).with_name("test_generate.py")
    train_tokenizer(TrainingSettings((str(text),), output, vocab_size=400))
    return output


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_export(tmp_path / "exported", 258, tokenizer_record())


@pytest.fixture
def pieces(tmp_path: Path, tokenizer_file: Path) -> Path:
    """An export of a model of SentencePiece tokens."""
    tokenizer = load_tokenizer(str(tokenizer_file))
    facts = tokenizer_record(kind="sentencepiece", vocab_size=tokenizer.vocab_size, sha256=tokenizer.sha256)
    others = {**facts, "tokenizer.model": tokenizer_file.read_bytes()}
    return write_export(tmp_path / "pieces", tokenizer.vocab_size, others, ends=(tokenizer.bos_id, tokenizer.eos_id))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """launch/generate.py: its exit code, standard output and standard error."""

    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", str(folder), *arguments, "--device", "cpu"])
        code = generate.main()
        return (code, *capfd.readouterr())

    return run
