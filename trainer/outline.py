"""What a run would be, in a few lines, for people who are about to queue it: `launch/train.py --check RANKS`."""

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.mixture import BLOCK_SAMPLES, block_counts
from data_pipeline.output import counted
from reformer.weights import skeleton
from trainer.check import StoreFacts
from trainer.checkpoint import published, read_state
from trainer.deepspeed_settings import global_batch_size, micro_batch_size, table
from trainer.flops import training_flops
from trainer.job import Job
from trainer.resume import changes
from trainer.run_lock import holder


def outline(job: Job) -> str:
    """Its model, data, step and checkpoints in numbers, where it would begin, and what would change there.

    job: with the identity that `resume.refuse_another_run` returns.
    """
    n_parameters = sum(parameter.numel() for parameter in skeleton(job.config.model).parameters())
    lines = [_model(job, n_parameters), *_data(job), _step(job), _checkpoints(job, n_parameters), _beginning(job)]
    lines += _changes(job)
    return "\n".join(lines)


def _batch_size(job: Job) -> int:
    return global_batch_size(job.deepspeed, job.launch.world_size, job.config.run.sequence_parallel)


def _model(job: Job, n_parameters: int) -> str:
    model = job.config.model
    kinds = [model.attention_kind(layer) for layer in range(model.n_layers)]
    layers = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    n_layers = counted(len(kinds), "layer")
    return f"model        {n_parameters:,} parameters in {n_layers} ({layers}), {job.precision}"


def _data(job: Job) -> Iterator[str]:
    """A line for each store that is trained on."""
    data, n_samples = job.config.data, job.config.run.steps * _batch_size(job)
    for name, count in block_counts(data.weights).items():
        store, split = job.stores[name], data.trained[name].split
        n_rows = StoreFacts.of(store).rows[split]
        share = f"{count / BLOCK_SAMPLES:.1%} of all samples: " if name else ""
        yield (
            f"data         {share}{n_rows:,} rows of {store.seq_len:,} tokens from {split} of {store.path}, "
            f"{n_samples * count / BLOCK_SAMPLES / n_rows:,.2f} times in {counted(job.config.run.steps, 'step')}"
        )


def _step(job: Job) -> str:
    n_ranks, n_parts, size = job.launch.world_size, job.config.run.sequence_parallel, _batch_size(job)
    at_once = micro_batch_size(job.deepspeed, n_ranks, n_parts)
    times = size // (at_once * (n_ranks // n_parts))
    who = "rank" if n_parts == 1 else f"group of {n_parts}"
    flops = training_flops(job.config.model, job.store.seq_len) * size
    return (
        f"step         {counted(size, 'row')}, {size * job.store.seq_len:,} tokens, {flops:.2e} FLOPs; of "
        f"{counted(n_ranks, 'rank')} each {who} takes {counted(at_once, 'row')} at a time, {counted(times, 'time')}"
    )


def _checkpoints(job: Job, n_parameters: int) -> str:
    """Weights and moments as DeepSpeed keeps them; of Adafactor's there are few. Signals may add to the number."""
    run, optimizer = job.config.run, job.deepspeed["optimizer"]
    n_moments = (
        0 if optimizer["type"].lower() == "adafactor" else 3 if optimizer.get("params", {}).get("amsgrad") else 2
    )
    n_saves = -(-run.steps // run.save_every) if run.save_every else 1
    often = math.lcm(run.save_every or run.steps, run.keep_every)
    n_kept = run.keep_last + 1 + run.keep_best + (run.steps // often if often else 0)
    n_bytes = 2 if table(job.deepspeed, "bf16").get("bf16_master_weights_and_grads") else 4
    each, most = n_parameters * n_bytes * (1 + n_moments), min(n_saves, n_kept)
    free = shutil.disk_usage(_existing(run.dir)).free
    there = published(run.dir)
    n_more = 0 if there and there[-1].step >= run.steps else max(0, most - len(there))
    too_few = ", which is not enough" if n_more * each > free else ""
    about, left = (f"{size / 2**30:,.3g} GiB" for size in (each, free))
    return f"checkpoints  about {about} each, {most} of them at most; {left} are free there{too_few}"


def _existing(folder: Path) -> Path:
    """It, or the folder that it would be made in."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _beginning(job: Job) -> str:
    run, saved = job.config.run, published(job.config.run.dir)
    who = holder(run.dir)
    at_work = f"; at this moment it is trained by {who}" if who else ""
    if saved and saved[-1].step >= run.steps:
        return f"run          nothing to do: {run.dir} is at step {saved[-1].step}, run.steps={run.steps}{at_work}"
    if saved:
        return f"run          goes on from {saved[-1].path}, if that is sound, to step {run.steps:,}{at_work}"
    weights = f"the weights of {run.init_from}" if run.init_from else "untrained weights"
    return f"run          begins anew in {run.dir} with {weights}{at_work}"


def _changes(job: Job) -> list[str]:
    """What is not as it was in the newest checkpoint that can be read: what a start would say."""
    for saved in published(job.config.run.dir)[::-1]:
        with suppress(DataError):  # a damaged one, which is not continued from
            before = read_state(saved.path)["run"]
            return [f"note: {name} {what}" for name, what in changes(before, job.identity).items()]
    return []
