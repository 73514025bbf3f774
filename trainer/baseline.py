"""The least that a model must beat: a unigram model of the same tokens, scored on the same held-out labels."""

import numpy as np

from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.mixture import BLOCK_SAMPLES, block_counts
from data_pipeline.store import Store
from trainer.batches import HeldOutRows, Rows, drawn, open_sources
from trainer.config import DataConfig
from trainer.scoring import Score

MOST_TOKENS = 2**24
"""Frequencies of so many change in the fourth digit with more; they take seconds to count, in short rows a minute."""


def unigram_score(store: Store, data: DataConfig, n_rows: int) -> Score:
    """Token frequencies of what is trained on (one added to each), scored on the n_rows rows of evaluations.

    Of a mixture, those of all that it draws or of one of its sources, whichever predict these rows best: to know which
    source one reads is not much yet. Of each, rows of at most MOST_TOKENS are read, drawn at random.

    Raises DataError when a split is missing or a row is damaged.
    """
    held_out = HeldOutRows(store, data.eval_split, n_rows)
    targets = np.zeros(store.vocab_size, dtype=np.int64)
    for row in range(len(held_out)):
        targets += _label_counts(held_out, row, store.vocab_size)
    sources = [(_frequencies(train), often) for train, often in _training_rows(store, data)]
    mix = np.sum([often * counts for counts, often in sources], axis=0)
    nll = min(_nll(targets, counts) for counts in (mix, *(counts for counts, _ in sources)))
    return Score(nll, n_tokens=float(targets.sum()), n_bytes=float(targets @ store.token_bytes.astype(int)))


def _frequencies(rows: RowDataset) -> np.ndarray:
    """How often each token is a label in all of these rows, by those that are read."""
    counts, numbers = np.zeros(rows.store.vocab_size), drawn(len(rows), max(MOST_TOKENS // rows.store.seq_len, 1))
    for row in numbers:
        counts += _label_counts(rows, row, rows.store.vocab_size)
    return counts * len(rows) / max(len(numbers), 1)


def _nll(targets: np.ndarray, counts: np.ndarray) -> float:
    """Nats for all targets, by the frequency of each token with one added."""
    return float(targets @ (np.log(counts.sum() + len(counts)) - np.log(counts + 1)))


def _training_rows(store: Store, data: DataConfig) -> list[tuple[RowDataset, float]]:
    """What is trained on, and how often a row of it is drawn, 1 on average."""
    if not data.mixture:
        return [(RowDataset(store, data.train_split), 1.0)]
    stores, shares = open_sources(data), block_counts(data.weights)
    rows = {name: RowDataset(stores[name], split) for name, split in data.train_splits.items()}
    n_rows = sum(map(len, rows.values()))
    return [(rows[name], shares[name] / BLOCK_SAMPLES * n_rows / len(rows[name])) for name in rows]


def _label_counts(rows: Rows, row: int, vocab_size: int) -> np.ndarray:
    labels = rows[row].labels.numpy()
    return np.bincount(labels[labels != IGNORED_LABEL], minlength=vocab_size)
