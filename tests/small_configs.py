"""A configuration that is sound, to be changed, and what there is to know of its store."""

from typing import Any

from trainer.check import StoreFacts
from trainer.config import RunConfig

ROWS = {"train": 10, "val": 2, "empty": 0}
STORE = StoreFacts(seq_len=256, vocab_size=258, rows=ROWS, tokenizer_sha256="abc", fingerprint="of data/store")
STORES = {"": STORE}
DEEPSPEED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}


def make_config(**changes: Any) -> RunConfig:
    tables: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 258, "max_seq_len": 256},
        "data": {"store": "data/store"},
        "run": {"dir": "runs/x", "deepspeed_config": "x.json", "steps": 10},
    }
    for name, value in changes.items():
        table, _, key = name.partition("_")
        tables[table][key] = value
    return RunConfig(**tables)
