"""One rank that trains, saves and goes on, case by case, through the trainer's own functions.

    python tests/distributed/state_worker.py PLAN RENDEZVOUS OUTPUT RANK RANKS

PLAN: JSON, a list of {case: fields of zero_matrix.Case, load: folder or null, weights: folder or null (of a checkpoint
whose weights alone to take), first: step, steps: number, save: folder or null}. OUTPUT of rank 0: JSON, a list of the
losses and norms of each, or of the text of an error.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matrix_worker import bytes_on_drive, train_step
from workers import join_ranks
from zero_matrix import BATCH, LR_FACTORS, VOCAB, Case, deepspeed_config, run_config, samples

from data_pipeline.order import shares
from trainer import checkpoint
from trainer.batches import collate
from trainer.distributed import Launch, all_sum
from trainer.engine import build_engine, set_learning_rate
from trainer.state import local_square_sum, set_weights

CPU = torch.device("cpu")
PEAK_LR = 0.02


def run(task: dict[str, Any], launch: Launch, folder: Path) -> list[list[float]]:
    case = Case(**task["case"])
    config, deepspeed = run_config(case), deepspeed_config(case, folder)
    engine = build_engine(config, deepspeed)
    try:
        if task["load"]:
            checkpoint.load(engine, checkpoint.Checkpoint(Path(task["load"]), task["first"]))
        if task["weights"]:
            set_weights(engine, checkpoint.read_weights(Path(task["weights"])))
        seen = [step_of(engine, step, launch) for step in range(task["first"], task["first"] + task["steps"])]
        assert not case.variant.startswith("nvme") or bytes_on_drive(folder), "nothing is on the drive"
        if task["save"]:
            plan = config.run.model_copy(update={"dir": Path(task["save"])})
            done = task["first"] + task["steps"]
            checkpoint.save(engine, plan, done, {"deepspeed": deepspeed}, {}, launch, CPU)
        return seen
    finally:
        engine.destroy()


def step_of(engine: Any, step: int, launch: Launch) -> list[float]:
    """Loss and gradient norm of one update, and the norm of the weights after it."""
    rows, token_bytes = samples(step), torch.ones(VOCAB, dtype=torch.int64)
    micro = engine.train_micro_batch_size_per_gpu()
    batches = [
        collate([rows[i] for i in ids], ids, token_bytes, CPU)
        for ids in shares(BATCH, micro, launch.rank, launch.world_size)
    ]
    set_learning_rate(engine, PEAK_LR * LR_FACTORS[min(step, len(LR_FACTORS) - 1)])
    return [*train_step(engine, batches, step), all_sum([local_square_sum(engine)], CPU)[0] ** 0.5]


def main(plan: str, rendezvous: str, output: str, rank: str, ranks: str) -> None:
    launch = Launch("test", int(rank), int(ranks), int(rank), int(ranks))
    join_ranks(rendezvous, launch.rank, launch.world_size)
    results: list[Any] = []
    for task in json.loads(Path(plan).read_text()):
        try:
            results.append(run(task, launch, Path(output).parent))
        except Exception:
            results.append(traceback.format_exc())
        gc.collect()
        gc.freeze()  # DeepSpeed collects garbage whenever it reports memory
    if launch.rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
