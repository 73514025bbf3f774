"""One rank that looks at the gradients of two steps under every case given, through the trainer's own functions.

    python tests/distributed/gradients_worker.py CASES RENDEZVOUS OUTPUT RANK

CASES and OUTPUT are files of torch.save. The learning rate is zero, so both steps start from the initial weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matrix_worker import CPU, read
from workers import join_ranks
from zero_matrix import RANKS, Case, deepspeed_config, run_config

from trainer.distributed import all_sum
from trainer.engine import backward, build_engine, forward, optimizer_step, set_learning_rate
from trainer.gradients import gradients


def run(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Of each step the gradients by name, and the norm that the trainer reports."""
    engine = build_engine(run_config(case), deepspeed_config(case, folder))
    set_learning_rate(engine, 0.0)
    seen = []
    for step in (0, 1):
        batches = read(engine, step)
        (n_tokens,) = all_sum([sum(batch.n_tokens for batch in batches)], CPU)
        for batch in batches:
            backward(engine, forward(engine, batch, step), batch.n_tokens, n_tokens)
            if batch is batches[-1]:
                found = {name: gradient.float().clone() for name, gradient in gradients(engine)}
            result = optimizer_step(engine)
        seen.append({"gradients": found, "norm": result.norm})
    engine.destroy()
    return seen


def main(cases_file: str, rendezvous: str, output: str, rank: str) -> None:
    cases = torch.load(cases_file, weights_only=False)
    join_ranks(rendezvous, int(rank), RANKS)
    torch.save({case: run(case, Path(output).parent) for case in cases}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
