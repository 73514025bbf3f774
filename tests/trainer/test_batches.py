"""What a run trains on, and that every row of an evaluation goes to exactly one rank, in plain integers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_stores import write_store

from data_pipeline.dataset import IGNORED_LABEL, RowDataset, Sample
from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.batches import (
    HeldOutRows,
    blank,
    collate,
    drawn,
    evaluation_shares,
    held_out_rows,
    open_stores,
    training_samples,
)
from trainer.config import DataConfig


@pytest.mark.parametrize("n_rows", [1, 4, 5, 7])
@pytest.mark.parametrize(("micro", "world_size"), [(1, 1), (1, 2), (2, 2), (3, 4)])
def test_evaluation_uses_every_row_once_and_all_ranks_equally(n_rows: int, micro: int, world_size: int) -> None:
    parts = [evaluation_shares(n_rows, micro, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert {len(share) for part in parts for share in part} == {micro}
    rows = [row for part in parts for share in part for row in share]
    assert sorted(row for row in rows if row is not None) == list(range(n_rows))
    assert len(rows) - n_rows < micro * world_size


def fake_store(name: str) -> Any:
    alike = {"seq_len": 8, "vocab_size": 10, "tokenizer_sha256": "of all"}
    manifest = SimpleNamespace(fingerprint=f"hash of {name}", packing="bestfit", **alike)
    return SimpleNamespace(manifest=manifest, split_rows=lambda _: [(0, 5)])


def test_rows_are_drawn_anywhere_and_always_the_same() -> None:
    assert drawn(100, 10) == drawn(100, 10) == drawn(100, 11)[:10] != list(range(10))
    assert len(set(drawn(100, 99))) == 99 and set(drawn(100, 99)) < set(range(100))
    assert sorted(drawn(5, 9)) == [0, 1, 2, 3, 4]


def test_evaluations_do_not_read_the_beginning_of_a_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of a chromosome would be its end, which is all N."""
    monkeypatch.setattr(RowDataset, "__len__", lambda _: 1000)
    monkeypatch.setattr(RowDataset, "__getitem__", lambda _, index: index)
    rows: Any = HeldOutRows(fake_store("a"), "val", 64)
    read = [rows[index] for index in range(len(rows))]
    assert read == drawn(1000, 64)
    assert min(read) < 100 and max(read) > 900 and len(set(read)) == 64


def test_a_token_of_windows_that_overlap_is_evaluated_once(tmp_path: Path) -> None:
    texts = {str(number): bytes(range(97, 97 + number)) for number in (3, 9, 20, 26)}
    for stride in (1, 3, 8):
        write_store(tmp_path / f"{stride}", texts, val=["9", "20", "26"], seq_len=8, packing="book", stride=stride)
        rows = HeldOutRows(Store.open(tmp_path / f"{stride}"), "val", 1000)
        of_rows = (rows[index].labels for index in range(len(rows)))
        labels = [each[each != IGNORED_LABEL] for each in of_rows]
        assert rows.identity.endswith(", each token once") == (stride < 8)
        if stride < 8:  # else the first token of a window is to be predicted in none
            assert sum(map(len, labels)) == 9 + 20 + 26 + 3 and sorted(torch.cat(labels).tolist()) == sorted(
                [*b"".join(list(texts.values())[1:]), 257, 257, 257]
            )


def test_what_is_evaluated_and_that_nothing_is_without_evaluations() -> None:
    stores = {"": fake_store("a"), "books": fake_store("b"), "web": fake_store("w")}
    mixture = {"books": {"store": "b", "weight": 3, "eval_split": "val"}, "web": {"store": "w", "weight": 1}}
    data = DataConfig(store="a", mixture=mixture, eval_split="test")
    run = SimpleNamespace(eval_every=5, eval_rows=3)
    config: Any = SimpleNamespace(data=data, run=run)
    assert {name: rows.identity for name, rows in held_out_rows(stores, config).items()} == {
        "": "3 rows drawn from test of hash of a",
        "books": "3 rows drawn from val of hash of b",
    }
    run.eval_every = 0
    assert held_out_rows(stores, config) == {}


def test_one_store_is_trained_on_as_it_is() -> None:
    samples = training_samples(DataConfig(store="a"), {"": fake_store("a")}, seed=3)
    assert samples.identity == {"store": "hash of a", "split": "train", "seed": 3}


def test_a_mixture_takes_the_place_of_the_store() -> None:
    mixture = {"books": {"store": "b", "weight": 3}, "web": {"store": "w", "weight": 1, "split": "all"}}
    data = DataConfig(store="a", mixture=mixture, train_split="most")
    samples = training_samples(data, {"books": fake_store("b"), "web": fake_store("w")}, seed=3)
    assert samples.identity == {
        "seed": 3,
        "order": 2,
        "books.store": "hash of b",
        "books.split": "most",
        "books.seed": 3,
        "books.per_thousand": 750,
        "web.store": "hash of w",
        "web.split": "all",
        "web.seed": 3,
        "web.per_thousand": 250,
    }


def test_a_store_of_a_mixture_that_is_missing_is_named_by_its_key(tmp_path: Path) -> None:
    write_store(tmp_path / "a", {"a": b"text"})
    data = DataConfig(store=tmp_path / "a", mixture={"web": {"store": tmp_path / "nowhere", "weight": 1}})
    with pytest.raises(DataError, match=f"^data.mixture.web.store: {tmp_path / 'nowhere'} does not exist"):
        open_stores(data)


def test_collate_counts_what_is_to_be_predicted() -> None:
    token_bytes = torch.tensor([0, 1, 3, 2])
    sample = Sample(
        torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, IGNORED_LABEL, IGNORED_LABEL]), torch.tensor([1, 1, 1, 0])
    )
    batch = collate([sample, blank(sample)], [4, 5], token_bytes, torch.device("cpu"))
    assert (batch.n_tokens, batch.n_bytes) == (2, 5)
    assert batch.tokens.shape == batch.labels.shape == batch.segment_ids.shape == (2, 4)
    assert list(batch.sample_ids) == [4, 5]
    assert (batch.labels[1] == IGNORED_LABEL).all()
