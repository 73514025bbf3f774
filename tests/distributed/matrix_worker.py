"""One rank of the gradient parity matrix: every case given, one after the other, through the trainer's own functions.

    python tests/distributed/matrix_worker.py CASES RENDEZVOUS OUTPUT RANK

CASES and OUTPUT are files of torch.save; a case that fails is an error's text in OUTPUT, and the others go on.
"""

import gc
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_profiler import PartitionedParameterProfiler
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from workers import join_ranks
from zero_matrix import (
    BATCH,
    LR_FACTORS,
    OPTIMIZERS,
    RANKS,
    SEQ_LEN,
    VOCAB,
    Case,
    Outcome,
    deepspeed_config,
    run_config,
    samples,
)

from data_pipeline.order import shares
from trainer.batches import Batch, collate, part_of
from trainer.check import StoreFacts, check
from trainer.distributed import all_sum
from trainer.engine import backward, build_engine, forward, optimizer_step, set_learning_rate
from trainer.sequence_parallel import Place

CPU = torch.device("cpu")
FETCHED: Counter[str] = Counter()
"""Elements of parameters by what ZeRO-3 did to get them."""


def run(case: Case, folder: Path) -> dict[str, Any]:
    """A case's outcome, and what else of it is looked at."""
    engine = build_engine(run_config(case), deepspeed_config(case, folder))
    try:
        calls = count_gradients(engine.module)
        FETCHED.clear()
        seen = [masters(engine)]
        losses, norms = [], []
        for step in range(len(LR_FACTORS)):
            set_learning_rate(engine, OPTIMIZERS[case.optimizer]["lr"] * LR_FACTORS[step])
            loss, norm = train_step(engine, read(engine, step, case.n_parts), step)
            losses.append(loss)
            norms.append(norm)
            seen.append(masters(engine))
        updates = [{name: after[name] - before[name] for name in before} for before, after in pairwise(seen)]
        return {
            "outcome": Outcome(losses, norms, seen[:-1], updates),
            "masters": seen[-1],
            "weights": weights(engine),
            "gradient_calls": dict(calls),
            "fetched": dict(FETCHED),
            "bytes_on_drive": bytes_on_drive(folder),
        }
    finally:
        engine.destroy()


def train_step(engine: deepspeed.DeepSpeedEngine, batches: list[Batch], step: int) -> tuple[float, float]:
    """Loss and gradient norm of one update, as Trainer.step computes them."""
    (n_tokens,) = all_sum([sum(batch.n_tokens for batch in batches)], CPU)
    nll, result = 0.0, None
    for batch in batches:
        loss = forward(engine, batch, step)
        nll += loss.item() * batch.n_tokens
        backward(engine, loss, batch.n_tokens, n_tokens)
        result = optimizer_step(engine)
    assert result is not None and not result.skipped
    return all_sum([nll], CPU)[0] / n_tokens, result.norm


@cache
def places(n_parts: int) -> Place:
    """This rank's, with a group of processes that all cases share."""
    return Place.of(dist.get_rank(), RANKS, n_parts).joined()


def read(engine: deepspeed.DeepSpeedEngine, step: int, n_parts: int = 1) -> list[Batch]:
    """This rank's micro-batches."""
    place = places(n_parts)
    rows, token_bytes = samples(step), torch.ones(VOCAB, dtype=torch.int64)
    return [
        collate([part_of(rows[i], place.sequence) for i in ids], ids, token_bytes, CPU, place.sequence)
        for ids in shares(BATCH, engine.train_micro_batch_size_per_gpu(), place.replica, place.n_replicas)
    ]


def count_gradients(module: torch.nn.Module) -> Counter[str]:
    """How often each parameter's gradient is handed over to whoever listens for it, as DeepSpeed does."""
    calls: Counter[str] = Counter()
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    return calls


def bytes_on_drive(folder: Path) -> Counter[str]:
    """What ZeRO-Infinity has put there, by kind."""
    sizes: Counter[str] = Counter()
    for file in folder.glob("zero_stage_3/*/**/*.swp"):
        kind = file.relative_to(folder).parts[1]
        sizes["optimizer" if kind == "optimizer" else "parameters"] += file.stat().st_size
    return sizes


def masters(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The fp32 parameters that the optimizer updates, whole, wherever their parts are."""
    named = list(engine.module.named_parameters())
    if engine.zero_optimization():
        return {name: safe_get_full_fp32_param(parameter).detach().clone().cpu() for name, parameter in named}
    own = {parameter: parameter for _, parameter in named}
    if engine.bfloat16_enabled():
        groups = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        own = {weight: master for pair in groups for weight, master in zip(*pair, strict=True)}
    return {name: own[parameter].detach().clone() for name, parameter in named}


def weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """The parameters that the next forward on this rank would use."""
    parameters = list(engine.module.parameters()) if engine.zero_optimization_partition_weights() else []
    with deepspeed.zero.GatheredParameters(parameters):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def work_through(cases: list[Case], work: Callable[[Case, Path], Any], rendezvous: str, output: str, rank: str) -> None:
    """Join the other ranks, and save what comes of each case: the text of an error, if there is one."""
    join_ranks(rendezvous, int(rank), RANKS)
    results: dict[Case, Any] = {}
    for case in cases:
        try:
            results[case] = work(case, Path(output).parent)
        except Exception:
            results[case] = traceback.format_exc()
        gc.collect()
        gc.freeze()  # DeepSpeed collects garbage whenever it reports memory: all that it imports need not be looked at
    torch.save(results, output)
    dist.destroy_process_group()


def main(cases_file: str, rendezvous: str, output: str, rank: str) -> None:
    cases = torch.load(cases_file, weights_only=False)
    for case in cases:  # as a run does, before the processes join each other
        config = run_config(case)
        facts = StoreFacts(SEQ_LEN, config.model.vocab_size, {"train": BATCH, "val": BATCH}, "", "")
        check(config, deepspeed_config(case, Path(output).parent), {"": facts}, RANKS)
    PartitionedParameterProfiler.stop_event = lambda _, name, n_elements: FETCHED.update({name: n_elements})
    work_through(cases, run, rendezvous, output, rank)


if __name__ == "__main__":
    main(*sys.argv[1:])
