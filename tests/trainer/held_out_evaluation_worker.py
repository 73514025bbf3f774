"""One of two ranks that evaluate a new model under ZeRO 0 to 3, all through the trainer's own functions.

    python tests/trainer/held_out_evaluation_worker.py STORE FOLDER RANK

It leaves FOLDER/rankRANK.json, by stage.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from evaluation import config, report
from workers import join_ranks

from data_pipeline.store import Store
from trainer.distributed import Launch
from trainer.engine import build_engine

RANKS = 2


def main(store_path: str, folder: str, rank: str) -> None:
    join_ranks(f"{folder}/rendezvous", int(rank), RANKS)
    launch = Launch("this test", int(rank), RANKS, int(rank), RANKS)
    store, found = Store.open(store_path), {}
    for stage in range(4):
        deepspeed_config = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 1,
            # As large parameters of ZeRO-3 are treated: there only while their module is called.
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        }
        engine = build_engine(config(store), deepspeed_config)
        found[stage] = asdict(report(engine, config(store), store, launch))
        engine.destroy()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
