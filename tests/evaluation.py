"""What tests of evaluations share: a store of unequal rows, a run's configuration, a model in the engine's place."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from small_stores import write_store
from torch import Tensor

from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
from reformer import Reformer
from trainer.batches import HeldOutRows
from trainer.config import RunConfig
from trainer.distributed import Launch
from trainer.held_out_evaluation import Evaluator, HeldOut
from trainer.sequence_parallel import Place

CPU = torch.device("cpu")


def make_store(folder: Path) -> Store:
    """Documents of bytes in rows of 256, of which some hold two: one row to train on and 7 held out."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(999)]
    lengths = [200, 250, 130, 180, 100, 140, 200, 90, 150, 230]
    documents = {str(i): " ".join(rng.choices(words, k=99)).encode()[:length] for i, length in enumerate(lengths)}
    write_store(folder / "store", documents, val=list(documents)[1:], seq_len=256)
    store = Store.open(folder / "store")
    assert len(RowDataset(store, "val")) == 7
    return store


def config(store: Store | None = None, run: Mapping[str, Any] | None = None, **model: object) -> RunConfig:
    """Of a tiny model for the store, or for rows of 64 of 20 tokens."""
    vocab_size, seq_len = (store.vocab_size, store.seq_len) if store else (20, 64)
    shape = {"vocab_size": vocab_size, "max_seq_len": seq_len, "d_model": 16, "n_layers": 2, "n_heads": 2}
    chunks = {"lsh_chunk_len": 8, "local_chunk_len": 8, "n_hashes": 2}
    return RunConfig(
        model={**shape, **chunks, **model},
        data={"store": store.path if store else "store"},
        run={"dir": "run", "deepspeed_config": "ds.json", "steps": 1, "sample_tokens": 8, **(run or {})},
    )


class PlainEngine:
    """What an evaluation uses of DeepSpeed's engine."""

    def __init__(self, model: Reformer, micro_batch_size: int) -> None:
        self.module, self.micro_batch_size, self.n_passes = model, micro_batch_size, 0

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        self.n_passes += 1
        return self.module(*inputs, **options)

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.micro_batch_size

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


def report(engine: Any, plan: RunConfig, store: Store, launch: Launch) -> HeldOut:
    """All that is reported on the store's held-out rows; what it trains on, and the same rows, stand for sources."""
    token_bytes = torch.from_numpy(store.token_bytes.astype("int64"))
    place = Place.of(launch.rank, launch.world_size, plan.run.sequence_parallel).joined()
    evaluator = Evaluator(engine, plan, launch, place, CPU, token_bytes)
    rows = {split: HeldOutRows(store, split, plan.run.eval_rows) for split in ("train", "val")}
    return evaluator.held_out({"": rows["val"], "other": rows["train"], "same": rows["val"]})
