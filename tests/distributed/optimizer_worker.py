"""One rank that takes steps with Adafactor, or on nothing to learn, through the trainer's own functions.

    python tests/distributed/optimizer_worker.py JOBS RENDEZVOUS OUTPUT RANK

JOBS and OUTPUT are files of torch.save: a list of (case, whether there are labels), and what came of each.
"""

import gc
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matrix_worker import masters, read, train_step
from workers import join_ranks
from zero_matrix import LR_FACTORS, OPTIMIZERS, RANKS, Case, Outcome, deepspeed_config, run_config

from trainer.engine import backward, build_engine, forward, optimizer_step, set_learning_rate


def run(case: Case, has_labels: bool, folder: Path) -> Outcome:
    """As many steps as there are factors of the learning rate."""
    engine = build_engine(run_config(case), deepspeed_config(case, folder))
    try:
        assert type(engine.basic_optimizer).__name__ == case.optimizer
        seen, scores = [masters(engine)], []
        for step in range(len(LR_FACTORS)):
            set_learning_rate(engine, OPTIMIZERS[case.optimizer]["lr"] * LR_FACTORS[step])
            scores.append(train_step(engine, read(engine, step), step) if has_labels else idle_step(engine, step))
            seen.append(masters(engine))
    finally:
        engine.destroy()
    updates = [{name: after[name] - before[name] for name in before} for before, after in pairwise(seen)]
    losses, norms = (list(column) for column in zip(*scores, strict=True))
    return Outcome(losses, norms, seen, updates)


def idle_step(engine: Any, step: int) -> tuple[float, float]:
    """A step in which no token is to be predicted: all gradients are zero."""
    for batch in read(engine, step):
        batch.labels.fill_(-100)
        backward(engine, forward(engine, batch, step), 0, 0.0)
        optimizer_step(engine)
    return 0.0, 0.0


def main(jobs_file: str, rendezvous: str, output: str, rank: str) -> None:
    jobs = torch.load(jobs_file, weights_only=False)
    join_ranks(rendezvous, int(rank), RANKS)
    results = []
    for job in jobs:
        results.append(run(*job, Path(output).parent))
        gc.collect()
    torch.save(results, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
