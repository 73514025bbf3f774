"""DeepSpeed's JSON as the trainer reads it: the batch, the precision, the learning rate. Pure functions.

Of a configuration that check_deepspeed.py has found sound, except `table`, which takes any.
"""

from collections.abc import Mapping
from typing import Any

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""The first is the product of the others and the ranks; DeepSpeed works out what is left out."""


def table(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The table `key`; an empty one where there is none, or where the value is no table."""
    value = parent.get(key)
    return value if isinstance(value, Mapping) else {}


def global_batch_size(deepspeed: Mapping[str, Any], world_size: int, n_parts: int) -> int:
    """Sequences in a step, of ranks of which n_parts share each sequence."""
    total, *factors = BATCH_KEYS
    micro, accumulation = (deepspeed.get(key, 1) for key in factors)
    return int(deepspeed.get(total, micro * accumulation * world_size // n_parts))


def micro_batch_size(deepspeed: Mapping[str, Any], world_size: int, n_parts: int) -> int:
    """Sequences that a rank, or each group that shares them, takes at a time: given, or what DeepSpeed takes it for."""
    _, micro, accumulation = BATCH_KEYS
    each = global_batch_size(deepspeed, world_size, n_parts) // (world_size // n_parts)
    return int(deepspeed.get(micro, each // deepspeed.get(accumulation, 1)))


def as_data_parallel(deepspeed: Mapping[str, Any], n_parts: int) -> dict[str, Any]:
    """The configuration as DeepSpeed is to see it, to which the holders of n_parts parts have a sequence each."""
    total = BATCH_KEYS[0]
    return {**deepspeed, total: deepspeed[total] * n_parts} if total in deepspeed else dict(deepspeed)


def is_bf16(deepspeed: Mapping[str, Any]) -> bool:
    """Whether the model computes in bf16, and not in fp32."""
    return bool(table(deepspeed, "bf16").get("enabled"))


def peak_lr(deepspeed: Mapping[str, Any]) -> float:
    """What the schedule's factors multiply."""
    return float(deepspeed["optimizer"]["params"]["lr"])
