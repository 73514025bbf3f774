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

    The sources of a mixture count as often as it draws them. Of each, rows of at most MOST_TOKENS are read, drawn at
    random. Raises DataError when a split is missing or a row is damaged.
    """
    counts = np.ones(store.vocab_size)
    held_out = HeldOutRows(store, data.eval_split, n_rows)
    for train, often in _training_rows(store, data):
        numbers = drawn(len(train), max(MOST_TOKENS // store.seq_len, 1))
        for row in numbers:
            counts += often * len(train) / len(numbers) * _label_counts(train, row, store.vocab_size)
    nats = np.log(counts.sum()) - np.log(counts)
    targets = np.zeros(store.vocab_size, dtype=np.int64)
    for row in range(len(held_out)):
        targets += _label_counts(held_out, row, store.vocab_size)
    return Score(
        nll=float(targets @ nats), n_tokens=float(targets.sum()), n_bytes=float(targets @ store.token_bytes.astype(int))
    )


def _training_rows(store: Store, data: DataConfig) -> list[tuple[RowDataset, float]]:
    """What is trained on, and how often a row of it is drawn, 1 on average."""
    if not data.mixture:
        return [(RowDataset(store, data.train_split), 1.0)]
    stores, shares = open_sources(data), block_counts({name: one.weight for name, one in data.mixture.items()})
    rows = {name: RowDataset(stores[name], one.split or data.train_split) for name, one in data.mixture.items()}
    n_rows = sum(map(len, rows.values()))
    return [(rows[name], shares[name] / BLOCK_SAMPLES * n_rows / len(rows[name])) for name in rows]


def _label_counts(rows: Rows, row: int, vocab_size: int) -> np.ndarray:
    labels = rows[row].labels.numpy()
    return np.bincount(labels[labels != IGNORED_LABEL], minlength=vocab_size)
