"""What DeepSpeed's JSON may say: its keys, the batch, the precision, the ZeRO stage. Pure functions to problems.

DeepSpeed ignores keys that it does not know, but in two of its tables, so the keys that this trainer passes on are
listed here, and those that would change what the training loop relies on are refused with the reason. Each function
returns one line for each problem: the value, what was expected and the way out.
"""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeGuard

from deepspeed import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from reformer.config import explain
from trainer.config import OF_DEEPSPEED
from trainer.deepspeed_settings import BATCH_KEYS, is_bf16, table

ALLOWED = {
    *BATCH_KEYS,
    "optimizer",
    "gradient_clipping",
    "bf16",
    "data_types",
    "communication_data_type",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
}
"""Top-level keys of DeepSpeed's JSON that work here."""

TABLES: dict[str, set[str] | None] = {
    "optimizer": {"type", "params"},
    "data_types": {"grad_accum_dtype"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "zero_optimization": None,
    "bf16": None,
}
"""Which of ALLOWED are tables, with the keys allowed inside; None where DeepSpeed itself refuses unknown ones."""

REFUSED = {
    "scheduler": "the learning-rate schedule is in [run]: run.warmup_steps, run.decay, run.final_lr_ratio",
    "fp16": "the trainer runs in fp32 or bf16; use bf16",
    "prescale_gradients": "the loss is scaled for DeepSpeed's default, the mean over ranks; leave it out",
    "gradient_predivide_factor": "the loss is scaled for DeepSpeed's default, the mean over ranks; leave it out",
    "gradient_allreduce_op": "the loss is scaled for DeepSpeed's default, the mean over ranks; leave it out",
    "managed_gradient_accumulation": "the loss is scaled for DeepSpeed's default; leave it out",
    "sequence_parallel_size": "use run.sequence_parallel instead; leave it out",
    "activation_checkpointing": "reversible layers keep no activations to checkpoint; leave it out",
    "tensorboard": "the trainer writes TensorBoard events to run.dir; leave it out",
}
"""Keys of DeepSpeed's that contradict this trainer, with the way out."""

HARMLESS = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
"""Values of these that change nothing; of the others, {"enabled": false}."""

GATHERS = "it gathers a whole block at once, but the reversible backward runs its halves again one at a time"
CONTRADICTING = {
    ("zero_optimization", "compute_grad_norm"): (
        [False],
        "the gradient's norm is reported, and tells which steps are to be skipped",
    ),
    ("zero_optimization", "zenflow"): (None, "checkpoints cannot save its moments"),
    ("zero_optimization", "legacy_stage1"): ([True], "DeepSpeed has no such stage any more"),
    ("zero_optimization", "module_granularity_threshold"): (None, GATHERS),
    ("zero_optimization", "stage3_module_granularity_threshold"): (None, GATHERS),
    ("bf16", "check_grad_overflow"): ([False], "a step that is not finite would not be skipped"),
}
"""Keys of its tables that contradict this trainer: with which values (None: any but 0), and why."""

SECTIONS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}
"""Tables in which DeepSpeed refuses unknown keys, and what they are parsed by."""
BOOLEAN = (bool, bool | None)


QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""What ZeRO sends between ranks with 4 or 8 bits a number."""


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 1


def _is_limit(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0


def _is_interval(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and value >= 1)


COMMUNICATED = ("fp32", "bf16", "fp16")
SWITCH: tuple[Callable[[Any], bool], str] = (lambda value: value in (False, True), "give true or false")
SCALARS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_clipping": (_is_limit, "give the maximum gradient norm, or 0 for no limit"),
    "steps_per_print": (_is_interval, "give a number >= 1"),
    "communication_data_type": (
        lambda value: value is None or str(value).lower() in COMMUNICATED,
        f"give one of {COMMUNICATED}",
    ),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
}
"""What others of ALLOWED may be, and what to say where one is something else, which DeepSpeed would find late."""


def keys(deepspeed: Mapping[str, Any]) -> list[str]:
    """Keys are known and not refused, tables are tables, and single values are of their kinds."""
    problems = []
    for key in deepspeed:
        if key in REFUSED and deepspeed[key] != HARMLESS.get(key, {"enabled": False}):
            problems.append(f"deepspeed.{key}: {REFUSED[key]}")
        elif key not in ALLOWED and key not in REFUSED:
            problems.append(f"deepspeed.{key}: {nearest(key, ALLOWED)}")
        elif key in TABLES and not isinstance(deepspeed[key], Mapping):
            problems.append(f"deepspeed.{key}: this is a table of keys and values (got {deepspeed[key]!r})")
        elif key in SCALARS and not SCALARS[key][0](deepspeed[key]):
            problems.append(f"deepspeed.{key}={deepspeed[key]!r}: {SCALARS[key][1]}")
        elif known := TABLES.get(key):
            unknown = [name for name in deepspeed[key] if name not in known]
            problems += [f"deepspeed.{key}.{name}: {nearest(name, known)}" for name in unknown]
    for (section, key), (values, reason) in CONTRADICTING.items():
        value = table(deepspeed, section).get(key)
        if value if values is None else value in values:
            problems.append(f"deepspeed.{section}.{key}={value!r}: {reason}; leave it out")
    return problems


def switches(deepspeed: Mapping[str, Any]) -> list[str]:
    """DeepSpeed takes text such as "off" for true and false, too, which others that read the same value do not."""
    return [
        f"deepspeed.{section}.{key}={value!r}: {SWITCH[1]}"
        for section, known in SECTIONS.items()
        for key, value in table(deepspeed, section).items()
        if isinstance(value, str) and key in known.model_fields and known.model_fields[key].annotation in BOOLEAN
    ]


def batch(deepspeed: Mapping[str, Any], world_size: int, n_parts: int = 1) -> list[str]:
    """The global batch must be micro-batch * accumulation * ranks; DeepSpeed works out what is left out.

    Ranks that share each sequence, n_parts of them, count as one.
    """
    given = {name: deepspeed[name] for name in BATCH_KEYS if name in deepspeed}
    if wrong := [
        f"deepspeed.{name}={value!r}: give a number >= 1" for name, value in given.items() if not _is_count(value)
    ]:
        return wrong
    total, micro, _ = BATCH_KEYS
    size = given.pop(total, None)
    if size is None:
        return [] if micro in given else [f"deepspeed: give {total} (sequences per step) or {micro}"]
    n_groups = world_size // n_parts
    each = math.prod(given.values()) * n_groups
    if size == each or (size % each == 0 and len(given) < 2):
        return []
    ranks = f"{world_size} ranks" if n_parts == 1 else f"{n_groups} ({world_size} ranks by {n_parts} for a sequence)"
    parts = " times ".join([*(f"{name}={value}" for name, value in given.items()), ranks])
    if len(given) == 2:
        return [f"deepspeed.train_batch_size={size} is not {parts}: {each} would be, or leave one of them out"]
    near = sorted({max(each, size // each * each), (size // each + 1) * each})
    return [f"deepspeed.train_batch_size={size} is not divisible by {parts}: {' or '.join(map(str, near))} would do"]


def precision(deepspeed: Mapping[str, Any]) -> list[str]:
    """Gradients and moments are of types that DeepSpeed has, for this ZeRO stage and on this device."""
    zero, bf16, types = (table(deepspeed, key) for key in ("zero_optimization", "bf16", "data_types"))
    weights = "bf16" if is_bf16(deepspeed) else "fp32"
    accumulate = types.get("grad_accum_dtype", weights)
    quantized = [key for key in QUANTIZED if zero.get(key)]
    if quantized and get_accelerator().device_name() == "cpu":
        return [
            f"deepspeed.zero_optimization.{key}=True: DeepSpeed has this for GPUs only; leave it out"
            for key in quantized
        ]
    if accumulate not in ("fp32", "bf16"):
        return [f"deepspeed.data_types.grad_accum_dtype={accumulate!r}: give 'fp32' or 'bf16'"]
    if bf16.get("bf16_master_weights_and_grads") and not bf16.get("bf16_optimizer_states"):
        return [
            "deepspeed.bf16.bf16_master_weights_and_grads=True without bf16_optimizer_states=True: DeepSpeed has fp32 "
            "moments for fp32 weights only; set both, or leave both out"
        ]
    if zero.get("stage", 0) == 0 and accumulate != weights:
        return [
            f"deepspeed.data_types.grad_accum_dtype={accumulate!r} with weights in {weights} needs ZeRO: "
            "set deepspeed.zero_optimization.stage to 1, 2 or 3, or leave it out"
        ]
    return []


def zero_stage(deepspeed: Mapping[str, Any]) -> list[str]:
    """DeepSpeed would take text and true for a stage too, and the relations to it are those of numbers."""
    stage = table(deepspeed, "zero_optimization").get("stage", 0)
    if type(stage) is int and 0 <= stage <= 3:
        return []
    return [f"deepspeed.zero_optimization.stage={stage!r}: give one of the numbers 0, 1, 2 and 3"]


def objections(deepspeed: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed itself would say to its configuration; without a process group it assumes one rank."""
    problems = []
    for key, section in SECTIONS.items():
        try:
            section(**deepspeed.get(key, {}))
        except ValidationError as error:
            problems += [f"deepspeed.{key}: {line}" for line in explain(error, section).splitlines()]
    if problems:
        return problems
    try:
        # Batch sizes have been checked, for the real number of ranks.
        DeepSpeedConfig({k: v for k, v in deepspeed.items() if k not in BATCH_KEYS} | {"train_batch_size": 1})
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError) as error:
        return [f"deepspeed: {error}"]
    return []


def nearest(key: str, known: set[str]) -> str:
    """What to say to an unknown key."""
    if key in OF_DEEPSPEED:
        return OF_DEEPSPEED[key]
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key; did you mean '{close[0]}'?" if close else "not a key that this trainer passes to DeepSpeed"
