"""The samples of a run, which of them go where in an evaluation, and the micro-batches made of them.

The share of every rank is a pure function of plain integers. A step's global batch is the same set of samples on any
number of ranks, so one rank that accumulates and two that do not compute the same update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from data_pipeline.dataset import IGNORED_LABEL, RowDataset, Sample, part_bounds
from data_pipeline.errors import DataError
from data_pipeline.mixture import Mixture
from data_pipeline.order import permute, shares
from data_pipeline.store import Store
from reformer.sequence_part import WHOLE, SequencePart
from trainer.config import DataConfig, RunConfig


def open_stores(data: DataConfig) -> dict[str, Store]:
    """The stores that a run reads: data.store, as "", and those of data.mixture by name.

    Raises DataError for one that is not whole.
    """

    def opened(name: str, path: Path) -> Store:
        try:
            return Store.open(path)
        except DataError as error:
            raise DataError(f"data.mixture.{name}.store: {error}") from error

    return {"": Store.open(data.store)} | {name: opened(name, source.store) for name, source in data.mixture.items()}


def training_samples(data: DataConfig, stores: Mapping[str, Store], seed: int) -> RowDataset | Mixture:
    """What a run trains on, of the stores that `open_stores` returns."""
    rows = {name: RowDataset(stores[name], read.split, seed) for name, read in data.trained.items()}
    return Mixture(rows, data.weights, seed) if data.mixture else rows[""]


class Rows(Protocol):
    """Rows to score."""

    store: Store

    @property
    def identity(self) -> object: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


def repeated_tokens(store: Store) -> int:
    """How many of the first tokens of a row the row before has, where both are windows of one document."""
    return store.seq_len - store.manifest.stride if store.manifest.packing == "book" else 0


def without_repeated(rows: RowDataset, index: int) -> Sample:
    """A split's row number `index` in stored order, without the labels that a row before it has."""
    row, n_repeated = rows[index], repeated_tokens(rows.store)
    if not n_repeated:
        return row
    labels = row.labels.clone()
    for start, _, _, document_start in rows.segments_of(index).tolist():
        if document_start:
            labels[start : start + n_repeated - 1] = IGNORED_LABEL
    return row._replace(labels=labels)


class HeldOutRows:
    """At most `n_rows` rows of a split, drawn at random, the same ones in the same order every time.

    The first rows of a split would be the beginnings of few documents, such as the end of a chromosome. A token that
    several rows have, of windows that overlap, is to be predicted in the first of them alone.
    """

    def __init__(self, store: Store, split: str, n_rows: int) -> None:
        self.store = store
        self._rows = RowDataset(store, split)
        self._numbers = drawn(len(self._rows), n_rows)

    @property
    def identity(self) -> str:
        """Which rows they are."""
        once = ", each token once" if repeated_tokens(self.store) else ""
        return f"{len(self)} rows drawn from {self._rows.split} of {self.store.manifest.fingerprint}{once}"

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        return without_repeated(self._rows, self._numbers[index])


def held_out_rows(stores: Mapping[str, Store], config: RunConfig) -> dict[str, HeldOutRows]:
    """What the evaluations of a run score, by the name of its store, those of data.store ("") first; empty without
    evaluations."""
    evaluated = config.data.evaluated if config.run.eval_every else {}
    return {name: HeldOutRows(stores[name], read.split, config.run.eval_rows) for name, read in evaluated.items()}


def drawn(n_rows: int, n: int) -> list[int]:
    """n different numbers below n_rows, drawn at random, the same in every call; all of them if there are no more."""
    return [permute(index, n_rows, seed=0, epoch=0) for index in range(min(n, n_rows))]


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device, and how much there is to predict in it."""

    tokens: torch.Tensor
    """int64 [B, T]"""
    labels: torch.Tensor
    """int64 [B, T]"""
    segment_ids: torch.Tensor
    """int32 [B, T]"""
    sample_ids: Sequence[int]
    """Index of each sample in the global batch."""
    n_tokens: int
    """Tokens to predict."""
    n_bytes: int
    """Bytes that these tokens stand for."""
    part: SequencePart = WHOLE
    """Which part of the sequences these tokens are."""


def evaluation_shares(n_rows: int, micro_batch_size: int, rank: int, world_size: int) -> list[list[int | None]]:
    """This rank's micro-batches of an evaluation of rows 0 .. n_rows - 1, dealt out in the same way.

    None is a row with nothing to predict: under ZeRO-3 every rank must take part in every forward pass, so all get
    equally many micro-batches of equal size.
    """
    each = micro_batch_size * world_size
    padded = -(-n_rows // each) * each
    return [
        [row if row < n_rows else None for row in share] for share in shares(padded, micro_batch_size, rank, world_size)
    ]


def collate(
    samples: Sequence[Sample],
    sample_ids: Sequence[int],
    token_bytes: torch.Tensor,
    device: torch.device,
    part: SequencePart = WHOLE,
) -> Batch:
    """Stack samples, or the same part of each, into a micro-batch.

    `token_bytes` holds the number of bytes of each token id.
    """
    labels = torch.stack([sample.labels for sample in samples])
    predicted = labels[labels != IGNORED_LABEL]
    return Batch(
        tokens=torch.stack([sample.tokens for sample in samples]).to(device),
        labels=labels.to(device),
        segment_ids=torch.stack([sample.segment_ids for sample in samples]).to(device),
        sample_ids=sample_ids,
        n_tokens=predicted.numel(),
        n_bytes=int(token_bytes[predicted].sum()),
        part=part,
    )


def part_of(sample: Sample, part: SequencePart) -> Sample:
    """One of the equal parts of a whole row. Segments stay numbered as in the row."""
    start, stop = part_bounds(len(sample.tokens), part.index, part.n_parts)
    return Sample(*(x[start:stop] for x in sample))


def blank(sample: Sample) -> Sample:
    """The same row with nothing to predict."""
    return Sample(sample.tokens, torch.full_like(sample.labels, IGNORED_LABEL), sample.segment_ids)
