"""The relations between TOML, DeepSpeed's JSON, the data and the number of ranks, in one pure function.

It runs on every rank before any process group starts, so nothing can hang, and reports every problem at once.
What is special: DeepSpeed ignores top-level keys that it does not know, so the keys that this trainer passes on are
listed here, and those that would change what the training loop relies on are refused with the reason.
"""

import inspect
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any, Self, TypeGuard

import torch
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from torch.utils import cpp_extension

from data_pipeline.store import Store
from reformer.config import ConfigError, explain
from trainer.config import RunConfig

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

ALLOWED = {
    *BATCH_KEYS,
    "optimizer",
    "gradient_clipping",
    "bf16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
}
"""Top-level keys of DeepSpeed's JSON that work here."""

TABLES = {"optimizer", "bf16", "data_types", "zero_optimization", "aio"}
"""Those of them that hold keys and values of their own."""

REFUSED = {
    "scheduler": "the learning rate's course belongs to [run]: run.warmup_steps, run.decay, run.final_lr_ratio",
    "fp16": "the trainer runs in fp32 or bf16; use bf16",
    "gradient_allreduce_op": "the loss is scaled for DeepSpeed's default, the mean over ranks; leave it out",
    "managed_gradient_accumulation": "the loss is scaled for DeepSpeed's default; leave it out",
    "activation_checkpointing": "reversible layers keep no activations to checkpoint; leave it out",
    "tensorboard": "the trainer writes TensorBoard events to run.dir; leave it out",
}
"""Keys of DeepSpeed's that contradict this trainer, with the way out."""

SECTIONS = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}
"""Tables in which DeepSpeed refuses unknown keys, and what they are parsed by."""


OFFLOAD_STAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "offload_optimizer": {"cpu": (1, 2, 3), "nvme": (3,)},
    "offload_param": {"cpu": (3,), "nvme": (3,)},
}
"""ZeRO stages that move a part of the state to a device; DeepSpeed says nothing where a stage does not."""

STALE_LOCK_S = 3600
"""Age at which the lock of a compilation is one that nobody holds any more."""

LEGACY = {
    "cpu_offload": "offload_optimizer.device='cpu'",
    "cpu_offload_param": "offload_param.device='cpu'",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory and offload_param.pin_memory",
}
"""Older keys of zero_optimization, which DeepSpeed turns into those that are checked here."""

OWN_ADAM_PARAMS = {"lr", "betas", "eps", "weight_decay", "amsgrad", "torch_adam", "adam_w_mode"}
"""Those of torch's AdamW, and of DeepSpeed, that DeepSpeed's own Adam takes too."""


@dataclass(frozen=True)
class StoreFacts:
    """What the relations need to know of a store."""

    seq_len: int
    vocab_size: int
    rows: Mapping[str, int]
    """Rows of each split."""
    tokenizer_sha256: str

    @classmethod
    def of(cls, store: Store) -> Self:
        """The facts of a store on disk."""
        rows = {name: sum(stop - start for start, stop in store.split_rows(name)) for name in store.manifest.splits}
        return cls(store.seq_len, store.vocab_size, rows, store.manifest.tokenizer_sha256)


def check(
    config: RunConfig,
    deepspeed: Mapping[str, Any],
    store: StoreFacts,
    world_size: int,
    sources: Mapping[str, StoreFacts] = MappingProxyType({}),
) -> None:
    """Raise one ConfigError that names every contradiction; return if there is none.

    `store` is data.store, `sources` are the stores of data.mixture by name.
    """
    problems = [
        *_keys(deepspeed),
        *_batch(deepspeed, world_size),
        *_precision(deepspeed),
        *_clipping(deepspeed.get("gradient_clipping", 0.0)),
        *(_optimizer(deepspeed) or _adam(deepspeed)),
        *_offload(deepspeed),
        *_data(config, store, sources),
    ]
    # DeepSpeed's own opinion is asked last: it would only repeat the ones above.
    if problems := (problems or _deepspeed_objections(deepspeed)):
        raise ConfigError("\n".join(problems))


def _keys(deepspeed: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in deepspeed:
        if key in REFUSED and deepspeed[key] != {"enabled": False}:
            problems.append(f"deepspeed.{key}: {REFUSED[key]}")
        elif key not in ALLOWED and key not in REFUSED:
            problems.append(f"deepspeed.{key}: {_nearest(key, ALLOWED)}")
        elif key in TABLES and not isinstance(deepspeed[key], Mapping):
            problems.append(f"deepspeed.{key}: this is a table of keys and values (got {deepspeed[key]!r})")
    return problems


def _batch(deepspeed: Mapping[str, Any], world_size: int) -> list[str]:
    """The global batch must be micro-batch * accumulation * ranks; DeepSpeed works out what is left out."""
    given = {name: deepspeed[name] for name in BATCH_KEYS if name in deepspeed}
    if wrong := [
        f"deepspeed.{name}={value!r}: give a number >= 1" for name, value in given.items() if not _is_count(value)
    ]:
        return wrong
    total, micro, _ = BATCH_KEYS
    batch = given.pop(total, None)
    if batch is None:
        return [] if micro in given else [f"deepspeed: give {total} (sequences per step) or {micro}"]
    each = math.prod(given.values()) * world_size
    if batch == each or (batch % each == 0 and len(given) < 2):
        return []
    parts = " times ".join([*(f"{name}={value}" for name, value in given.items()), f"{world_size} ranks"])
    if len(given) == 2:
        return [f"deepspeed.train_batch_size={batch} is not {parts}: {each} would be, or leave one of them out"]
    near = sorted({max(each, batch // each * each), (batch // each + 1) * each})
    return [f"deepspeed.train_batch_size={batch} is not divisible by {parts}: {' or '.join(map(str, near))} would do"]


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 1


def _precision(deepspeed: Mapping[str, Any]) -> list[str]:
    zero, bf16, types = (_table(deepspeed, key) for key in ("zero_optimization", "bf16", "data_types"))
    weights = "bf16" if bf16.get("enabled") else "fp32"
    accumulate = types.get("grad_accum_dtype", weights)
    if accumulate not in ("fp32", "bf16"):
        return [f"deepspeed.data_types.grad_accum_dtype={accumulate!r}: give 'fp32' or 'bf16'"]
    if zero.get("stage", 0) == 0 and accumulate != weights:
        return [
            f"deepspeed.data_types.grad_accum_dtype={accumulate!r} with weights in {weights} needs ZeRO: "
            "set deepspeed.zero_optimization.stage to 1, 2 or 3, or leave it out"
        ]
    return []


def _clipping(limit: Any) -> list[str]:
    if isinstance(limit, float | int) and limit >= 0:
        return []
    return [f"deepspeed.gradient_clipping={limit!r}: give the largest gradient norm as a number, or 0 for any"]


def _optimizer(deepspeed: Mapping[str, Any]) -> list[str]:
    optimizer = _table(deepspeed, "optimizer")
    if str(optimizer.get("type")).lower() not in ("adam", "adamw"):
        return ['deepspeed.optimizer: give one of type "AdamW" or "Adam"']
    params = _table(optimizer, "params")
    known = {*inspect.signature(torch.optim.AdamW).parameters, "torch_adam", "adam_w_mode"} - {"params"}
    problems = [f"deepspeed.optimizer.params.{key}: {_nearest(key, known)}" for key in params if key not in known]
    if not isinstance(params.get("lr"), float | int):
        problems.append("deepspeed.optimizer.params.lr: give the peak learning rate as a number")
    return problems or _optimizer_values(params)


def _optimizer_values(params: Mapping[str, Any]) -> list[str]:
    """What the optimizer itself says to its settings, and numbers that it would take but that train nothing."""
    flat = [
        (key, number) for key, value in params.items() for number in (value if isinstance(value, list) else [value])
    ]
    for key, number in flat:
        if isinstance(number, float) and not math.isfinite(number):
            return [f"deepspeed.optimizer.params.{key}={number}: give a finite number"]
    if isinstance(params["lr"], bool):
        return [f"deepspeed.optimizer.params.lr={params['lr']}: give the peak learning rate as a number"]
    own = {key: value for key, value in params.items() if key not in ("torch_adam", "adam_w_mode")}
    try:
        torch.optim.AdamW([torch.zeros(1)], **own)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return [f"deepspeed.optimizer.params: {error}"]
    return []


def _adam(deepspeed: Mapping[str, Any]) -> list[str]:
    """Which Adam it will be: torch's, or one of DeepSpeed's, which it compiles on the first use."""
    params = _table(_table(deepspeed, "optimizer"), "params")
    offloaded = _device(_table(deepspeed, "zero_optimization"), "offload_optimizer") != "none"
    if params.get("torch_adam"):
        # Also where it is offloaded: zero_force_ds_cpu_optimizer is about an optimizer that the caller has made.
        return []
    problems = [
        f"deepspeed.optimizer.params.{key}: DeepSpeed's own Adam does not take it; leave it out, or add torch_adam=true"
        for key in params
        if key not in OWN_ADAM_PARAMS
    ]
    if missing := missing_for("CPUAdamBuilder" if offloaded else "FusedAdamBuilder"):
        problems.append(
            f"deepspeed.optimizer: DeepSpeed compiles an Adam of its own, which needs {missing}: see to that, or set "
            "deepspeed.optimizer.params.torch_adam=true for PyTorch's"
        )
    return problems


def _offload(deepspeed: Mapping[str, Any]) -> list[str]:
    """What must hold for a part of the state to live in the CPU's memory or on NVMe."""
    zero = _table(deepspeed, "zero_optimization")
    problems, stage = _offload_extras(deepspeed), zero.get("stage", 0)
    problems += [
        f"deepspeed.zero_optimization.{old}: this key is from older versions; use {new}"
        for old, new in LEGACY.items()
        if old in zero
    ]
    for part, stages_of in OFFLOAD_STAGES.items():
        device, key = _device(zero, part), f"deepspeed.zero_optimization.{part}"
        if device != "none" and stage not in (stages := stages_of[device]):
            problems.append(
                f"{key}.device='{device}' does nothing under ZeRO stage {stage}: leave it out, or set "
                f"deepspeed.zero_optimization.stage to {' or '.join(map(str, stages))}"
            )
        if device == "nvme":
            problems += [f"{key}.nvme_path{problem}" for problem in _nvme_path(zero[part].get("nvme_path"))]
    if "nvme" in {_device(zero, part) for part in OFFLOAD_STAGES} and (missing := missing_for("AsyncIOBuilder")):
        problems.append(
            f"deepspeed.zero_optimization: offloading to nvme needs DeepSpeed's async_io, which needs {missing}: "
            "see to that, or set the device to 'cpu'"
        )
    is_bf16 = _table(deepspeed, "bf16").get("enabled")
    if _device(zero, "offload_param") == "nvme" and not (is_bf16 or get_accelerator().is_fp16_supported()):
        problems.append(
            "deepspeed.zero_optimization.offload_param.device='nvme' with weights in fp32: DeepSpeed writes them in "
            "bf16 where the device has no fp16; set deepspeed.bf16.enabled=true, or the device to 'cpu'"
        )
    return problems


def _nvme_path(path: Any) -> list[str]:
    """What keeps a folder from being used, as one line or none; what is no text is left for DeepSpeed to refuse."""
    if not path:
        return [" is missing: give a folder on the drive to be used"]
    if isinstance(path, str):
        try:
            # To try is the only way to know: permissions say nothing of /proc, or of a drive mounted read-only.
            TemporaryFile(dir=path).close()
        except OSError as error:
            return [f"='{path}' cannot be written to: {error.strerror}: give a folder that exists on every machine"]
    return []


def _offload_extras(deepspeed: Mapping[str, Any]) -> list[str]:
    """Settings of offload_optimizer that only ZeRO-3, DeepSpeed's own CPU Adam or an NVIDIA GPU can follow."""
    zero = _table(deepspeed, "zero_optimization")
    optimizer, key = _table(zero, "offload_optimizer"), "deepspeed.zero_optimization.offload_optimizer"
    ratio, is_super = optimizer.get("ratio", 1), optimizer.get("super_offload")
    is_partial = isinstance(ratio, float | int) and ratio < 1
    given = [name for name, is_set in ((f"ratio={ratio}", is_partial), ("super_offload", is_super)) if is_set]
    problems = [
        f"{key}.{name} needs ZeRO-3: leave it out, or set deepspeed.zero_optimization.stage to 3"
        for name in given
        if zero.get("stage", 0) != 3
    ]
    if is_partial and _table(_table(deepspeed, "optimizer"), "params").get("torch_adam"):
        problems.append(
            f"{key}.ratio={ratio} with deepspeed.optimizer.params.torch_adam: only DeepSpeed's own Adam works in both "
            "places; leave one of them out"
        )
    if is_super and (device := get_accelerator().device_name()) != "cuda":
        problems.append(f"{key}.super_offload is for NVIDIA's GPUs, and this runs on '{device}': leave it out")
    return problems


def _device(zero: Mapping[str, Any], part: str) -> str:
    """Where a part of the state is to live; "none" is where the model is, and where DeepSpeed refuses what it says."""
    device = _table(zero, part).get("device", "none")
    return device if isinstance(device, str) and device in OFFLOAD_STAGES[part] else "none"


def missing_for(builder_name: str) -> str:
    """What a C++ part of DeepSpeed needs that this machine lacks to compile and load it; empty if nothing."""
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None:
        return f"its version for {get_accelerator().device_name()}"
    if installed_ops.get(builder.name):
        return ""
    if not cpp_extension.is_ninja_available():
        return "ninja"
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        return f"the C++ compiler {cpp_extension.get_cxx_compiler()}"
    if not builder.is_compatible():
        return "libaio with its headers (Debian: libaio-dev)" if builder.name == "async_io" else builder.name
    # Loading async_io compiles and loads pin_memory first.
    for name in (builder.name, "pin_memory") if builder.name == "async_io" else (builder.name,):
        try:
            # Whoever finds a lock here waits until somebody removes it, for ever if nobody does.
            lock = Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock"
        except OSError as error:
            return f"a folder that can be written to, to compile in: {error}"
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
                return f"the removal of {lock}, which a compilation that was stopped has left behind"
    return ""


def _data(config: RunConfig, store: StoreFacts, sources: Mapping[str, StoreFacts]) -> list[str]:
    model, data = config.model, config.data
    problems = []
    if model.vocab_size != store.vocab_size:
        problems.append(
            f"model.vocab_size={model.vocab_size}, but the tokenizer of {data.store} has {store.vocab_size} tokens: "
            f"set model.vocab_size={store.vocab_size}"
        )
    if model.max_seq_len < store.seq_len:
        problems.append(
            f"model.max_seq_len={model.max_seq_len}, but the rows of {data.store} have {store.seq_len} tokens: "
            f"set model.max_seq_len={store.seq_len}, with an axial_shape of that product"
        )
    splits = [
        (f"data.mixture.{name}.split", source.split or data.train_split, source.store, sources[name])
        for name, source in data.mixture.items()
    ] or [("data.train_split", data.train_split, data.store, store)]
    if config.run.eval_every:
        splits.append(("data.eval_split", data.eval_split, data.store, store))
    for name, split, path, facts in splits:
        if not facts.rows.get(split):
            full = ", ".join(f"'{known}'" for known, rows in facts.rows.items() if rows)
            problems.append(f"{name}='{split}' has no rows in {path}: its splits are {full}")
    return problems + [
        f"data.mixture.{name}: {key} of {data.mixture[name].store} is {theirs}, that of data.store={data.store} is "
        f"{ours}: build all stores of a mixture with one tokenizer and one --seq-len"
        for name, facts in sources.items()
        for key in ("tokenizer_sha256", "vocab_size", "seq_len")
        if (theirs := getattr(facts, key)) != (ours := getattr(store, key))
    ]


def _deepspeed_objections(deepspeed: Mapping[str, Any]) -> list[str]:
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


def _table(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The table `key`; an empty one where there is none, or a value that _keys() complains of."""
    table = parent.get(key)
    return table if isinstance(table, Mapping) else {}


def _nearest(key: str, known: set[str]) -> str:
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    return f"unknown key; did you mean '{close[0]}'?" if close else "not a key that this trainer passes to DeepSpeed"
