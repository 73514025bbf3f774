"""A small corpus with all that text files hold in practice, a tokenizer for it, and stores; files in memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipeline import stages
from data_pipeline.build import build
from data_pipeline.config import BuildSettings
from data_pipeline.store import Store
from data_pipeline.training import TrainingSettings, train_tokenizer

PROSE = "The quick brown fox jumps over the lazy dog, and then, being a fox, it does so again. "
ODD_DOCUMENTS = {
    "plain.txt": (PROSE * 40 + "\n") * 5,
    "crlf.txt": "one\r\ntwo\r\n\r\nthree\r four\n",
    "bom.txt": "\ufeffA byte order mark at the start.\n",
    "nul.txt": "zero\0bytes\0\0inside",
    "tabs.txt": "def f(x):\n\tif x:\n\t\treturn 1\n        return    2   \n\n\n",
    "meta_symbol.txt": "\u2581a\u2581\u2581b \u2581 c\u2581",
    "emoji.txt": "\U0001f642\U0001f469\u200d\U0001f4bb e\u0301 \ufb01 \u00a0 \u3000 \u2028\u2029\u0085",
    "korean.txt": "태초에 하나님이 천지를 창조하시니라\n" * 20,
    "chinese.txt": "道可道,非常道。名可名,非常名。" * 30,
    "controls.txt": "".join(map(chr, range(256))) + "<s></s><unk><0x41>",
    "no_newline.txt": "no newline at the end",
    "empty.txt": "",
    "newlines.txt": "\n\n\n",
    "one_line.txt": PROSE * 400,
    "deep/er/nested.txt": PROSE + "\n",
}


@pytest.fixture(scope="session")
def odd_documents() -> dict[str, bytes]:
    return {name: text.encode() for name, text in ODD_DOCUMENTS.items()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, odd_documents: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for name, content in odd_documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".hidden.txt").write_text("not a document")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("not a document")
    (folder / "readme.md").write_text("not a document either")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(TrainingSettings(inputs=(str(corpus),), output=output, vocab_size=540))
    return output


@pytest.fixture
def make_store(tmp_path: Path, corpus: Path, tokenizer_file: Path) -> Callable[..., Store]:
    """Builds the corpus at 256 tokens a row, or whatever else is asked for."""

    def make(**changes: object) -> Store:
        settings = {
            "inputs": (str(corpus),),
            "tokenizer": str(tokenizer_file),
            "output": tmp_path / "store.zarr",
            "seq_len": 256,
            "rows_per_shard": 8,
            "split": {"val": 0.2},
        }
        return build(BuildSettings(**{**settings, **changes})).store  # type: ignore[arg-type]

    return make


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty file system behind memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Three tasks: a good one, one with an invalid byte, a good one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_bytes(f"line {number}\n".encode() * 150_000)
    with (folder / "1.txt").open("ab") as file:
        file.write(b"\xff\n")
    return folder


@pytest.fixture
def make(tmp_path: Path, books: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Store]:
    monkeypatch.setattr(stages, "TASK_BYTES", (1 << 20, 1 << 20))
    settings = {
        "inputs": (str(books),),
        "tokenizer": str(tokenizer_file),
        "output": tmp_path / "store",
        "seq_len": 1 << 15,
        "rows_per_shard": 8,
        "policies": {"encoding": "replace"},
    }

    def make_store(**changes: Any) -> Store:
        return build(BuildSettings(**{**settings, **changes})).store

    return make_store
