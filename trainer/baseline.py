"""The least that a model must beat: a unigram model of the same tokens, scored on the same held-out labels."""

from collections.abc import Mapping

import numpy as np

from data_pipeline.bar import Bar
from data_pipeline.dataset import IGNORED_LABEL, RowDataset
from data_pipeline.mixture import BLOCK_SAMPLES, block_counts
from data_pipeline.part import StorePart
from data_pipeline.store import Store
from trainer.batches import HeldOutRows, drawn, open_stores
from trainer.config import DataConfig
from trainer.scoring import Score

MOST_TOKENS = 2**24
"""Frequencies of so many change in the fourth digit with more; they take a second to count, 15 in rows of 256."""
BATCH_TOKENS = 2**20
"""Read at a time. Rows of 256 tokens are read four times as fast as one by one, and more at a time gains nothing."""


def unigram_score(data: DataConfig, n_rows: int) -> Score:
    """Token frequencies of what is trained on (one added to each), scored on the n_rows rows of evaluations.

    Of a mixture, those of all that it draws or of one of its sources, whichever predict these rows best: to know which
    source one reads is not much yet. At most MOST_TOKENS are read, as many of each source, in rows drawn at random.

    Raises DataError when a store or a split is missing or a row is damaged.
    """
    stores = open_stores(data)
    store = stores[""]
    held_out = HeldOutRows(store, data.eval_split, n_rows)
    targets = np.zeros(store.vocab_size, dtype=np.int64)
    for row in range(len(held_out)):
        labels = held_out[row].labels.numpy()
        targets += np.bincount(labels[labels != IGNORED_LABEL], minlength=store.vocab_size)
    training = _training_rows(stores, data)
    most = MOST_TOKENS // len(training)
    sources = [(_frequencies(source, split, most), often) for source, split, often in training]
    mix = np.sum([often * counts for counts, often in sources], axis=0)
    nll = min(_nll(targets, counts) for counts in (mix, *(counts for counts, _ in sources)))
    return Score(nll, n_tokens=float(targets.sum()), n_bytes=float(targets @ store.token_bytes.astype(int)))


def _frequencies(store: Store, split: str, most_tokens: int) -> np.ndarray:
    """float64 [vocab_size]: how often each token is a label in all rows of a split, by those that are read."""
    rows = store.rows_of(split)
    chosen = np.sort(rows[drawn(len(rows), max(most_tokens // store.seq_len, 1))])
    counts, at_once = np.zeros(store.vocab_size), max(BATCH_TOKENS // store.seq_len, 1)
    what = f"unigram model of {store.path.name}"
    with Bar(total=len(chosen), desc=what, unit="row", leave=False) as bar:
        for part in store.parts:
            ours = chosen[(chosen >= part.first_row) & (chosen < part.stop_row)]
            for start in range(0, len(ours), at_once):
                batch = ours[start : start + at_once]
                counts += np.bincount(_labels(part, batch), minlength=store.vocab_size)
                bar.update(len(batch))
    return counts * len(rows) / max(len(chosen), 1)


def _labels(part: StorePart, rows: np.ndarray) -> np.ndarray:
    """All labels of sorted rows of a part: every token but padding and the first of each stretch of a document."""
    tokens, segments = part.read_chosen(rows), part.segments
    is_label = np.arange(part.manifest.seq_len) < part.valid_tokens[rows - part.first_row, None]
    between = slice(*np.searchsorted(segments.row, [rows[0], rows[-1] + 1]))
    row, start = segments.row[between], segments.start[between]
    place = np.searchsorted(rows, row)
    is_read = rows[place] == row
    is_label[place[is_read], start[is_read]] = False
    return tokens[is_label]


def _nll(targets: np.ndarray, counts: np.ndarray) -> float:
    """Nats for all targets, by the frequency of each token with one added."""
    return float(targets @ (np.log(counts.sum() + len(counts)) - np.log(counts + 1)))


def _training_rows(stores: Mapping[str, Store], data: DataConfig) -> list[tuple[Store, str, float]]:
    """The stores and splits that are trained on, and how often a row of each is drawn, 1 on average."""
    shares = block_counts(data.weights)
    n_rows = {name: len(RowDataset(stores[name], read.split)) for name, read in data.trained.items()}
    often = {name: shares[name] / BLOCK_SAMPLES * sum(n_rows.values()) / n for name, n in n_rows.items()}
    return [(stores[name], read.split, often[name]) for name, read in data.trained.items()]
