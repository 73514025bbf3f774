"""Rows as torch tensors, in stored order or in the endless shuffled order of training.

The order is a pure function of (seed, position): see `order.py`. A data set holds no state, so resuming means asking
for the next position. A row can be had in equal parts, one for each rank of a sequence-parallel group: labels are made
from one token more than a part has, so the parts end to end are the whole row, labels included.
"""

import operator
import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.errors import DataError
from data_pipeline.order import permute
from data_pipeline.store import Store

IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out by default."""


class Sample(NamedTuple):
    """A row of T = seq_len tokens, or an n-th of it."""

    tokens: Tensor
    """int64 [T]; padding is EOS."""
    labels: Tensor
    """int64 [T]: the token that follows in the same stretch of a document, or -100 where none does."""
    segment_ids: Tensor
    """int32 [T]: 1, 2, ... for the stretches of documents in the row, 0 for padding."""


class Samples(Protocol):
    """An endless sequence of samples that is a pure function of the position: one store's rows, or a mixture."""

    @property
    def form(self) -> Mapping[str, str | int]:
        """What samples that are mixed must have alike: their length and their tokens' meaning."""

    @property
    def identity(self) -> Mapping[str, str | int]:
        """What the sequence follows from: equal for two that give the same samples."""

    def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
        """Part number `part` of `n_parts` equal parts of the sample at a position >= 0."""

    def blank_of(self, position: int, part: int, n_parts: int) -> Sample:
        """In the place of a sample that cannot be read: of the same shape, with nothing to predict."""


class RowDataset(Dataset[Sample]):
    """The rows of one split of a store.

    Cheap to make and to pickle; rows are opened in the process that reads them. Raises DataError when the store has
    no such split, and when a row that is read is damaged.
    """

    def __init__(self, store: Store, split: str = "train", seed: int = 0) -> None:
        if isinstance(store, str | os.PathLike):
            raise TypeError(f"store is {store!r}: give Store.open(path)")
        self.store = store
        self.split = split
        self.seed = operator.index(seed)
        self._ranges = store.split_rows(split)

    def __len__(self) -> int:
        """Rows in the split."""
        return sum(stop - start for start, stop in self._ranges)

    def __getitem__(self, index: int) -> Sample:
        """The split's row number `index` in stored order. Raises IndexError past the end."""
        return self._read(self._row(index), 0, 1)

    def segments_of(self, index: int) -> np.ndarray:
        """int64 [n, 4]: (start, length, document, document_start) of segments 1, 2, … of the split's row `index`."""
        return self.store.segments_of(self._row(index))

    @property
    def form(self) -> dict[str, str | int]:
        """The length of the rows, and the tokenizer: see `Samples`."""
        manifest = self.store.manifest
        return {name: getattr(manifest, name) for name in ("seq_len", "vocab_size", "tokenizer_sha256")}

    @property
    def identity(self) -> dict[str, str | int]:
        """What the order of training follows from: see `Samples`."""
        return {"store": self.store.manifest.fingerprint, "split": self.split, "seed": self.seed}

    def slice_of(self, position: int, part: int, n_parts: int) -> Sample:
        """Part number `part` of `n_parts` equal parts of the sample at a position >= 0 of training.

        Each epoch goes through all rows once, in an order of its own. A part is T = seq_len / n_parts tokens; segments
        are numbered as in the whole row. Only the chunks of the row that hold the part and the token after it are
        decoded: of a row that is one chunk (up to 65,536 tokens) that is all of it. Raises DataError where n_parts
        does not divide seq_len.
        """
        return self._read(self._row_at(position), part, n_parts)

    def blank_of(self, position: int, part: int, n_parts: int) -> Sample:
        """What stands in for `slice_of` where the row cannot be read: all EOS, segments as in the row, no labels."""
        start, stop = part_bounds(self.store.seq_len, part, n_parts)
        edges = _segment_edges(self.store.lengths_of(self._row_at(position)), start, stop)
        segment_ids = _segment_ids(edges, stop - start)
        tokens = torch.full((stop - start,), self.store.manifest.eos_id)
        return Sample(tokens, torch.full_like(tokens, IGNORED_LABEL), torch.from_numpy(segment_ids))

    def _read(self, row: int, part: int, n_parts: int) -> Sample:
        start, stop = part_bounds(self.store.seq_len, part, n_parts)
        tokens = self.store.read_row(row, start, min(stop + 1, self.store.seq_len))
        return make_sample(tokens, self.store.lengths_of(row), start, stop)

    def _row_at(self, position: int) -> int:
        if (position := operator.index(position)) < 0:
            raise IndexError(f"position {position} is negative")
        if not len(self):
            raise DataError(f"the split {self.split!r} of {self.store.path} has no rows: name one that has")
        epoch, index = divmod(position, len(self))
        return self._row(permute(index, len(self), self.seed, epoch))

    def _row(self, index: int) -> int:
        left = operator.index(index)  # which a number out of torch.randperm has, and what is none has not
        for start, stop in self._ranges:
            if 0 <= left < stop - start:
                return start + left
            left -= stop - start
        raise IndexError(f"index {index} is outside a split of {len(self)} rows")


def part_bounds(seq_len: int, part: int, n_parts: int) -> tuple[int, int]:
    """Where a part of a row begins and ends. Raises DataError where the parts would not be equal."""
    part, n_parts = operator.index(part), operator.index(n_parts)
    if n_parts < 1 or seq_len % n_parts:
        raise DataError(
            f"rows of {seq_len} tokens cannot be cut into {n_parts} equal parts: choose a number that divides {seq_len}"
        )
    if not 0 <= part < n_parts:
        raise IndexError(f"part {part} is outside a row of {n_parts} parts")
    n_tokens = seq_len // n_parts
    return part * n_tokens, (part + 1) * n_tokens


def make_sample(tokens: np.ndarray, lengths: np.ndarray, start: int = 0, stop: int | None = None) -> Sample:
    """The sample of tokens [start:stop] of a row.

    `tokens` are those from `start` on, with one more after `stop` unless the row ends there; `lengths` [n] those of the
    row's segments, as `Store.lengths_of` gives them.
    """
    n_tokens = len(tokens) if stop is None else stop - start
    edges = _segment_edges(lengths, start, start + len(tokens))
    tokens = tokens.astype(np.int64)
    labels = np.full(n_tokens, IGNORED_LABEL)
    n_labels = max(edges[-1] - 1, 0)
    labels[:n_labels] = tokens[1 : n_labels + 1]
    last = edges[1:] - 1
    labels[last[(last >= 0) & (last < n_labels)]] = IGNORED_LABEL
    segment_ids = _segment_ids(edges, n_tokens)
    return Sample(torch.from_numpy(tokens[:n_tokens]), torch.from_numpy(labels), torch.from_numpy(segment_ids))


def _segment_edges(lengths: np.ndarray, start: int, stop: int) -> np.ndarray:
    """int64 [n + 1]: where the segments of a row begin and the last one ends, within its tokens [start:stop]."""
    return np.clip(np.concatenate([[0], lengths.cumsum(dtype=np.int64)]), start, stop) - start


def _segment_ids(edges: np.ndarray, n_tokens: int) -> np.ndarray:
    """int32 [n_tokens]: the number of each token's segment, from 1 on; 0 for padding."""
    lengths = np.diff(np.minimum(edges, n_tokens))
    segment_ids = np.zeros(n_tokens, np.int32)
    segment_ids[: lengths.sum()] = np.repeat(np.arange(1, len(edges), dtype=np.int32), lengths)
    return segment_ids
