"""A tokenizer of text that the tests of several commands have."""

from pathlib import Path

import pytest

from data_pipeline.training import TrainingSettings, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, text = tmp_path_factory.mktemp("tokenizer") / "small.model", Path(__file__).with_name("test_generate.py")
    train_tokenizer(TrainingSettings((str(text),), output, vocab_size=400))
    return output
