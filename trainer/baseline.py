"""The least that a model must beat: a unigram model of the same tokens, scored on the same held-out labels."""

import numpy as np

from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.store import Store
from trainer.config import DataConfig
from trainer.evaluate import Score


def unigram_score(store: Store, data: DataConfig, n_rows: int) -> Score:
    """Token frequencies of the training split (one added to each), scored on the first n_rows held-out rows.

    Reads all of the training split once. Raises DataError when a split is missing or a row is damaged.
    """
    counts = np.ones(store.vocab_size, dtype=np.int64)
    train, held_out = RowDataset(store, data.train_split), RowDataset(store, data.eval_split)
    for row in range(len(train)):
        counts += _label_counts(train, row, store.vocab_size)
    nats = np.log(counts.sum()) - np.log(counts)
    targets = np.zeros_like(counts)
    for row in range(min(n_rows, len(held_out))):
        targets += _label_counts(held_out, row, store.vocab_size)
    return Score(
        nll=float(targets @ nats), n_tokens=float(targets.sum()), n_bytes=float(targets @ store.token_bytes.astype(int))
    )


def _label_counts(rows: RowDataset, row: int, vocab_size: int) -> np.ndarray:
    labels = rows[row].labels.numpy()
    return np.bincount(labels[labels != IGNORED_LABEL], minlength=vocab_size)
