"""Rows as torch tensors, in stored order or in the endless shuffled order of training.

The only file of the package that imports PyTorch. The order is a pure function of (seed, position): see `order.py`.
A data set holds no state, so resuming means asking for the next position.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.order import permute
from data_pipeline.store import Store

IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out by default."""


class Sample(NamedTuple):
    """A row of T = seq_len tokens."""

    tokens: Tensor
    """int64 [T]; padding is EOS."""
    labels: Tensor
    """int64 [T]: the token that follows in the same stretch of a document, or -100 where none does."""
    segment_ids: Tensor
    """int32 [T]: 1, 2, ... for the stretches of documents in the row, 0 for padding."""


class RowDataset(Dataset[Sample]):
    """The rows of one split of a store.

    Cheap to make and to pickle; rows are opened in the process that reads them. Raises DataError when the store has
    no such split, and when a row that is read is damaged.
    """

    def __init__(self, store: Store, split: str = "train", seed: int = 0) -> None:
        self.store = store
        self.seed = seed
        self._ranges = store.split_rows(split)

    def __len__(self) -> int:
        """Rows in the split."""
        return sum(stop - start for start, stop in self._ranges)

    def __getitem__(self, index: int) -> Sample:
        """The split's row number `index` in stored order. Raises IndexError past the end."""
        row = self._row(index)
        return make_sample(self.store.read_row(row), self.store.segments_of(row))

    def at(self, position: int) -> Sample:
        """The sample at a position >= 0 of training: each epoch goes through all rows once, in an order of its own."""
        if position < 0:
            raise IndexError(f"position {position} is negative")
        epoch, index = divmod(position, len(self))
        return self[permute(index, len(self), self.seed, epoch)]

    def _row(self, index: int) -> int:
        left = index
        for start, stop in self._ranges:
            if 0 <= left < stop - start:
                return start + left
            left -= stop - start
        raise IndexError(f"index {index} is outside a split of {len(self)} rows")


def make_sample(tokens: np.ndarray, segments: np.ndarray) -> Sample:
    """The sample of a row: its tokens [T], and its segments [n, 4] as `Store.segments_of` gives them."""
    segment_ids = np.zeros(len(tokens), np.int32)
    lengths = segments[:, 1]
    segment_ids[: lengths.sum()] = np.repeat(np.arange(1, len(segments) + 1), lengths)
    tokens = tokens.astype(np.int64)
    labels = np.full_like(tokens, IGNORED_LABEL)
    follows = (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] != 0)
    labels[:-1][follows] = tokens[1:][follows]
    return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(segment_ids))
