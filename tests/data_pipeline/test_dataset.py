"""Rows as tensors, whole or in parts: no label crosses a document or is made up."""

import errno
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from on_disk import flip
from torch.utils.data import DataLoader

from data_pipeline.dataset import IGNORED_LABEL, RowDataset, make_sample, part_bounds
from data_pipeline.errors import DataError, Exhausted
from data_pipeline.store import Store


def test_labels_and_segments_by_hand() -> None:
    tokens = np.array([1, 10, 11, 2, 1, 20, 2, 2, 2], np.uint16)
    sample = make_sample(tokens, np.array([4, 3], np.uint32))
    x = IGNORED_LABEL
    assert sample.tokens.tolist() == [1, 10, 11, 2, 1, 20, 2, 2, 2]
    assert sample.labels.tolist() == [10, 11, 2, x, 20, 2, x, x, x]
    assert sample.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 2, 0, 0]
    assert [tensor.dtype for tensor in sample] == [torch.int64, torch.int64, torch.int32]


def test_a_full_row_has_no_label_at_its_end() -> None:
    sample = make_sample(np.array([5, 6, 7], np.uint16), np.array([3]))
    assert sample.labels.tolist() == [6, 7, IGNORED_LABEL]


def test_random_rows_token_by_token() -> None:
    """Against the definition, in every equal part: segments of any length, with and without padding."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, rng.integers(2, 14), size=20)
        lengths = lengths[: np.searchsorted(lengths.cumsum(), 24, side="right")]
        tokens = rng.integers(0, 9, size=24).astype(np.uint16)
        ids = [i + 1 for i, length in enumerate(lengths) for _ in range(length)]
        ids += [0] * (24 - len(ids))
        labels = [
            int(tokens[i + 1]) if i < 23 and ids[i] and ids[i] == ids[i + 1] else IGNORED_LABEL for i in range(24)
        ]
        for n_parts in (1, 2, 3, 24):
            for start, stop in (part_bounds(24, part, n_parts) for part in range(n_parts)):
                part = make_sample(tokens[start : stop + 1], lengths, start, stop)
                assert part.tokens.tolist() == tokens[start:stop].tolist()
                assert part.labels.tolist() == labels[start:stop]
                assert part.segment_ids.tolist() == ids[start:stop]


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


def test_positions_go_through_epochs(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store(), seed=5)
    n = len(dataset)
    stored = sorted(dataset[i].tokens.tolist() for i in range(n))
    first, second = ([dataset.slice_of(epoch * n + i, 0, 1).tokens.tolist() for i in range(n)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == stored
    assert first != second
    assert [RowDataset(dataset.store, seed=6).slice_of(i, 0, 1).tokens.tolist() for i in range(n)] != first
    with pytest.raises(IndexError):
        dataset.slice_of(-1, 0, 1)


@pytest.mark.parametrize("index", [-1, 10_000])
@pytest.mark.parametrize("split", ["train", "val"])
def test_outside_is_an_error(make_store: Callable[..., Store], split: str, index: int) -> None:
    """Before the first row of a split that is held out is one that is trained on."""
    with pytest.raises(IndexError):
        RowDataset(make_store(), split)[index]


def test_rows_by_numbers_of_other_types(make_store: Callable[..., Store]) -> None:
    """What is no number is the caller's mistake, and no damage of the row."""
    dataset = RowDataset(make_store(), seed=np.int64(3))  # type: ignore[arg-type]
    for index in (torch.tensor(1), np.int32(1)):
        assert torch.equal(dataset[index].tokens, dataset[1].tokens)  # type: ignore[index]
    with pytest.raises(TypeError):
        dataset[1.5]  # type: ignore[index]
    with pytest.raises(TypeError):
        RowDataset(dataset.store, seed=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_no_more_files_or_memory_are_no_damage(
    make_store: Callable[..., Store], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        def __getitem__(self, _: object) -> None:
            raise OSError(number, "no more")

    store = make_store()
    monkeypatch.setitem(vars(store.parts[0]), "_tokens", Nothing())
    with pytest.raises(Exhausted, match=r"nothing can be read any more: .*no more. Free memory, or raise"):
        RowDataset(store)[0]


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_parts_end_to_end_are_the_row(make_store: Callable[..., Store], packing: str) -> None:
    dataset = RowDataset(make_store(packing=packing), seed=2)
    cases = [(position, n_parts) for n_parts in (2, 8) for position in range(len(dataset))] + [(0, 1), (0, 256)]
    for position, n_parts in cases:
        parts = [dataset.slice_of(position, part, n_parts) for part in range(n_parts)]
        assert {len(tensor) for part in parts for tensor in part} == {256 // n_parts}
        for whole, pieces in zip(dataset.slice_of(position, 0, 1), zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), whole)


def test_a_part_reads_itself_and_one_token_more(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, asked = RowDataset(make_store()), []
    read_row = dataset.store.read_row
    monkeypatch.setattr(dataset.store, "read_row", lambda *where: asked.append(where[1:]) or read_row(*where))
    for part in range(4):
        dataset.slice_of(0, part, 4)
    assert asked == [(0, 65), (64, 129), (128, 193), (192, 256)]


def test_samples_need_no_more_of_the_table_than_lengths(make_store: Callable[..., Store]) -> None:
    """The rest is nine times as large, in every rank that trains."""
    store = make_store()
    expected = list(RowDataset(store))
    assert all(np.array_equal(store.lengths_of(row), store.segments_of(row)[:, 1]) for row in range(store.n_rows))
    for name in ("start", "document", "document_start"):
        flip(store.path / "segments" / name / "c/0", -1)
    rows = RowDataset(Store.open(store.path))
    for found, sample in zip(rows, expected, strict=True):
        assert all(map(torch.equal, found, sample))
    with pytest.raises(DataError, match="segments/start"):
        rows.segments_of(0)


def test_a_blank_has_the_segments_of_its_row_and_nothing_to_predict(make_store: Callable[..., Store]) -> None:
    dataset = RowDataset(make_store())
    for part in (0, 1):
        blank, sample = dataset.blank_of(3, part, 2), dataset.slice_of(3, part, 2)
        assert [(t.shape, t.dtype) for t in blank] == [(t.shape, t.dtype) for t in sample]
        assert torch.equal(blank.segment_ids, sample.segment_ids)
        assert (blank.labels == IGNORED_LABEL).all()
        assert (blank.tokens == dataset.store.manifest.eos_id).all()


def test_parts_must_be_equal_and_exist() -> None:
    assert [part_bounds(12, part, 3) for part in range(3)] == [(0, 4), (4, 8), (8, 12)]
    for n_parts in (5, 0):
        with pytest.raises(DataError, match=f"rows of 12 tokens cannot be cut into {n_parts} equal parts: choose"):
            part_bounds(12, 0, n_parts)
    for part in (-1, 3):
        with pytest.raises(IndexError, match=f"part {part} is outside a row of 3 parts"):
            part_bounds(12, part, 3)


def test_a_split_without_rows(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    monkeypatch.setattr(store, "split_rows", lambda _: [])
    dataset = RowDataset(store)
    assert len(dataset) == 0
    with pytest.raises(DataError, match=r"the split 'train' of .* has no rows"):
        dataset.slice_of(0, 0, 1)


def test_identity_is_what_the_order_follows_from(make_store: Callable[..., Store]) -> None:
    store = make_store()
    assert RowDataset(store, "val", seed=4).identity == {
        "store": store.manifest.fingerprint,
        "split": "val",
        "seed": 4,
    }


def test_a_path_is_no_store() -> None:
    with pytest.raises(TypeError, match=r"store is 'data/own': give Store.open\(path\)"):
        RowDataset("data/own")  # type: ignore[arg-type]


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
