"""The unigram model that a run is measured by."""

import math
from collections import Counter
from pathlib import Path

import pytest
from small_stores import HELD_OUT, TRAIN, cabbage_store

from data_pipeline.cli import main as data_pipeline
from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
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
    score = unigram_score(Store.open(store), DataConfig(store=store), n_rows=5)
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
        found = unigram_score(rows.store, DataConfig(store=tmp_path / "big"), n_rows=5)
        assert found.nll == pytest.approx(sum(nats), rel=1e-12)


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
    found = unigram_score(Store.open(store), DataConfig(store=store, mixture=mixture), n_rows=5).nll
    each = {
        "mixture": nats((0.25 * 3 / 1, [TRAIN]), (0.75 * 3 / 2, others)),
        "one": nats((1, [TRAIN])),
        "two": nats((1, others)),
    }
    assert min(each, key=lambda name: each[name]) == best
    assert found == pytest.approx(each[best], rel=1e-12)
