"""The unigram model that a run is measured by."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_stores import HELD_OUT, TRAIN, cabbage_store, write_store

from data_pipeline.cli import main as data_pipeline
from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.part import StorePart
from data_pipeline.store import Store, list_part, part_path
from trainer.baseline import unigram_score
from trainer.batches import drawn
from trainer.config import DataConfig


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return cabbage_store(tmp_path)


def test_unigram_score_by_hand(store: Path) -> None:
    eos, vocab_size = 257, 258
    counts = Counter([*TRAIN, eos])  # what a model predicts in a row that starts with BOS
    total = sum(counts.values()) + vocab_size
    nats = [-math.log((counts[token] + 1) / total) for token in [*HELD_OUT, eos]]
    score = unigram_score(DataConfig(store=store), n_rows=5)
    assert score.nll == pytest.approx(sum(nats), rel=1e-12)
    assert (score.n_tokens, score.n_bytes) == (len(HELD_OUT) + 1, len(HELD_OUT))
    assert score.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len(HELD_OUT), rel=1e-12)


def test_a_unigram_of_many_rows_is_of_some_that_stand_for_all(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(8):
        (tmp_path / "many" / f"{number}.txt").write_bytes(bytes([97 + number]) * 98)
    inputs = [
        "--input",
        str(tmp_path / "many"),
        "--val-input",
        str(tmp_path / "val"),
        "--output",
        str(tmp_path / "big"),
    ]
    assert data_pipeline(["build", *inputs, "--tokenizer", "bytes", "--seq-len", "100", "--workers", "1"]) == 0
    rows = RowDataset(Store.open(tmp_path / "big"), "train")
    for most, n_read in ((399, 3), (99, 1)):  # one at least, however long it is
        monkeypatch.setattr("trainer.baseline.MOST_TOKENS", most)
        counts: dict[int, float] = dict.fromkeys(range(258), 1.0)
        for row in drawn(8, n_read):
            for token in rows[row].labels[:99].tolist():
                counts[token] += 8 / n_read
        nats = [-math.log(counts[token] / sum(counts.values())) for token in [*HELD_OUT, 257]]
        found = unigram_score(DataConfig(store=tmp_path / "big"), n_rows=5)
        assert found.nll == pytest.approx(sum(nats), rel=1e-12)


def grown_store(path: Path) -> Path:
    """Of rows that texts share, in two parts, of which both have rows of both splits."""
    texts = {f"{number}.txt": bytes([97 + number]) * (3 * number + 1) for number in range(16)}
    write_store(path, texts, val=["5.txt", "13.txt"])
    write_store(
        part_path(path, "0001"), {f"new_{name}": text.upper() for name, text in texts.items()}, val=["new_9.txt"]
    )
    list_part(path, "0001")
    return path


def counts_of(store: Path, n_rows: int) -> np.ndarray:
    """Of n_rows rows drawn from a training split, read one by one."""
    rows = RowDataset(Store.open(store))
    counts = np.zeros(258)
    for row in drawn(len(rows), n_rows):
        labels = rows[row].labels.numpy()
        counts += np.bincount(labels[labels != IGNORED_LABEL], minlength=258)
    return counts * len(rows) / min(n_rows, len(rows))


def nll_of(store: Path, counts: np.ndarray) -> float:
    """Of the rows held out in a store, by frequencies."""
    rows = RowDataset(Store.open(store), "val")
    labels = np.concatenate([rows[row].labels.numpy() for row in range(len(rows))])
    return -float(np.log((counts + 1) / (counts + 1).sum())[labels[labels != IGNORED_LABEL]].sum())


def test_rows_are_read_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them or some, wherever they lie, as if they were read one by one."""
    store = grown_store(tmp_path / "store")
    n_rows, sizes, read = len(RowDataset(Store.open(store))), list[int](), StorePart.read_chosen
    monkeypatch.setattr(StorePart, "read_chosen", lambda part, rows: sizes.append(len(rows)) or read(part, rows))
    monkeypatch.setattr("trainer.baseline.BATCH_TOKENS", 5 * 16)
    for n_read in (1, 7, 20, n_rows):
        monkeypatch.setattr("trainer.baseline.MOST_TOKENS", 16 * n_read)
        sizes.clear()
        found = unigram_score(DataConfig(store=store), n_rows=100)
        assert found.nll == pytest.approx(nll_of(store, counts_of(store, n_read)), rel=1e-12)
        assert sum(sizes) == n_read and len(sizes) <= n_read / 5 + 2 and max(sizes) <= 5
    assert n_rows > 30


def test_the_sources_of_a_mixture_share_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [grown_store(tmp_path / name) for name in ("one", "two")]
    monkeypatch.setattr("trainer.baseline.MOST_TOKENS", 16 * 20)
    mixture = {store.name: {"store": store, "weight": 1.0, "split": "train"} for store in stores}
    found = unigram_score(DataConfig(store=stores[0], mixture=mixture), n_rows=100)
    each = counts_of(stores[0], 10)
    assert found.nll == pytest.approx(min(nll_of(stores[0], counts) for counts in (each, 2 * each)), rel=1e-12)


@pytest.mark.parametrize(("words", "best"), [((b"cab", b"bag"), "mixture"), ((b"xyz", b"zoo"), "one")])
def test_unigram_score_of_a_mixture_by_hand(store: Path, tmp_path: Path, words: tuple[bytes, bytes], best: str) -> None:
    """Sources count as often as they are drawn, whatever splits the evaluated store has; one alone may do better."""
    (tmp_path / "other").mkdir()
    others = [(word * 33)[:98] for word in words]  # cut so that each fills a row with its BOS and EOS
    for number, text in enumerate(others):
        (tmp_path / "other" / f"{number}.txt").write_bytes(text)
    other = tmp_path / "other_store"
    inputs = ["--input", str(tmp_path / "other"), "--output", str(other)]
    assert data_pipeline(["build", *inputs, "--tokenizer", "bytes", "--seq-len", "100", "--workers", "1"]) == 0
    eos, vocab_size = 257, 258

    def nats(*sources: tuple[float, list[bytes]]) -> float:
        counts = dict.fromkeys(range(vocab_size), 1.0)
        for often, rows in sources:
            for token in (token for row in rows for token in [*row, eos]):
                counts[token] += often
        return sum(-math.log(counts[token] / sum(counts.values())) for token in [*HELD_OUT, eos])

    mixture = {"one": {"store": store, "weight": 1.0, "split": "train"}, "two": {"store": other, "weight": 3.0}}
    found = unigram_score(DataConfig(store=store, mixture=mixture), n_rows=5).nll
    each = {
        "mixture": nats((0.25 * 3 / 1, [TRAIN]), (0.75 * 3 / 2, others)),
        "one": nats((1, [TRAIN])),
        "two": nats((1, others)),
    }
    assert min(each, key=lambda name: each[name]) == best
    assert found == pytest.approx(each[best], rel=1e-12)
