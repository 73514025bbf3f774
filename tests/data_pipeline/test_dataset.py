"""Rows as tensors: no label crosses a document or is made up."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_pipeline.dataset import IGNORED_LABEL, RowDataset, make_sample
from data_pipeline.errors import DataError
from data_pipeline.store import Store


def test_labels_and_segments_by_hand() -> None:
    tokens = np.array([1, 10, 11, 2, 1, 20, 2, 2, 2], np.uint16)
    segments = np.array([[0, 4, 7, 0], [4, 3, 9, 0]])
    sample = make_sample(tokens, segments)
    x = IGNORED_LABEL
    assert sample.tokens.tolist() == [1, 10, 11, 2, 1, 20, 2, 2, 2]
    assert sample.labels.tolist() == [10, 11, 2, x, 20, 2, x, x, x]
    assert sample.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert [tensor.dtype for tensor in sample] == [torch.int64, torch.int64, torch.int32]


def test_a_full_row_has_no_label_at_its_end() -> None:
    sample = make_sample(np.array([5, 6, 7], np.uint16), np.array([[0, 3, 0, 100]]))
    assert sample.labels.tolist() == [6, 7, IGNORED_LABEL]


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_rows_follow_their_documents(make_store: Callable[..., Store], packing: str) -> None:
    store = make_store(packing=packing)
    for split in ("train", "val"):
        dataset = RowDataset(store, split)
        ((first, stop),) = store.split_rows(split)
        assert len(dataset) == stop - first
        for index, sample in enumerate(dataset[i] for i in range(len(dataset))):
            n_segments = len(store.segments_of(first + index))
            valid = int(store.valid_tokens[first + index])
            assert sample.segment_ids.max() == n_segments
            assert (sample.segment_ids[valid:] == 0).all()
            assert (sample.tokens[valid:] == store.manifest.eos_id).all()
            assert (sample.labels != IGNORED_LABEL).sum() == valid - n_segments
            for _, _, document, _ in store.segments_of(first + index).tolist():
                assert store.documents[document].split == split


def test_at_goes_through_epochs(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store(), seed=5)
    n = len(dataset)
    stored = sorted(dataset[i].tokens.tolist() for i in range(n))
    first, second = ([dataset.at(epoch * n + i).tokens.tolist() for i in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == stored
    assert first != second
    assert [RowDataset(dataset.store, seed=6).at(i).tokens.tolist() for i in range(n)] != first
    with pytest.raises(IndexError):
        dataset.at(-1)


@pytest.mark.parametrize("index", [-1, 10_000])
def test_outside_is_an_error(make_store: Callable[..., Store], index: int) -> None:
    with pytest.raises(IndexError):
        RowDataset(make_store())[index]


def test_unknown_split(make_store: Callable[..., Store]) -> None:
    with pytest.raises(DataError, match="has no split 'test', only train, val"):
        RowDataset(make_store(), "test")


def test_it_travels_after_it_was_read(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store())
    first = dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 50_000
    assert torch.equal(copy[0].tokens, first.tokens)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_loader_workers_read_the_same(make_store: Callable[..., Store], start_method: str) -> None:
    dataset = RowDataset(make_store())
    here = torch.stack([dataset[i].tokens for i in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context=start_method, timeout=60)
    there = torch.cat([batch.tokens for batch in loader])
    assert torch.equal(here, there)
