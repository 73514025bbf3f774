"""What must hold for optimizer and parameters to live in the CPU's memory or on NVMe. Pure functions to problems.

DeepSpeed says nothing where a stage does not follow such a setting; here it is refused. To try whether a folder can be
written to is the only thing that looks at the machine, besides extensions.py.
"""

from collections.abc import Mapping
from tempfile import TemporaryFile
from typing import Any

from deepspeed.accelerator import get_accelerator

from trainer import extensions
from trainer.deepspeed_settings import is_bf16, table

OFFLOAD_STAGES: dict[str, dict[str, tuple[int, ...]]] = {
    "offload_optimizer": {"cpu": (1, 2, 3), "nvme": (3,)},
    "offload_param": {"cpu": (3,), "nvme": (3,)},
}
"""ZeRO stages that move a part of the state to a device; DeepSpeed says nothing where a stage does not."""

LEGACY = {
    "cpu_offload": "offload_optimizer.device='cpu'",
    "cpu_offload_param": "offload_param.device='cpu'",
    "cpu_offload_use_pin_memory": "offload_optimizer.pin_memory and offload_param.pin_memory",
}
"""Older keys of zero_optimization, which DeepSpeed turns into those that are checked here."""


def offload(deepspeed: Mapping[str, Any]) -> list[str]:
    """What must hold for a part of the state to live in the CPU's memory or on NVMe."""
    zero = table(deepspeed, "zero_optimization")
    problems, stage = _offload_extras(deepspeed), zero.get("stage", 0)
    problems += [
        f"deepspeed.zero_optimization.{old}: this key is from older versions; use {new}"
        for old, new in LEGACY.items()
        if old in zero
    ]
    for part, stages_of in OFFLOAD_STAGES.items():
        device, key = device_of(zero, part), f"deepspeed.zero_optimization.{part}"
        if device != "none" and stage not in (stages := stages_of[device]):
            problems.append(
                f"{key}.device='{device}' does nothing under ZeRO stage {stage}: leave it out, or set "
                f"deepspeed.zero_optimization.stage to {' or '.join(map(str, stages))}"
            )
        if device == "nvme":
            problems += [f"{key}.nvme_path{problem}" for problem in _nvme_path(zero[part].get("nvme_path"))]
    if "nvme" in {device_of(zero, part) for part in OFFLOAD_STAGES} and (
        missing := extensions.missing_for("AsyncIOBuilder")
    ):
        problems.append(
            f"deepspeed.zero_optimization: offloading to nvme needs DeepSpeed's async_io, which needs {missing}: "
            "see to that, or set the device to 'cpu'"
        )
    if device_of(zero, "offload_param") == "nvme" and not (is_bf16(deepspeed) or get_accelerator().is_fp16_supported()):
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
    """Settings of offload_optimizer that only ZeRO-3 or DeepSpeed's own CPU Adam can follow, or no checkpoint."""
    zero = table(deepspeed, "zero_optimization")
    optimizer, key = table(zero, "offload_optimizer"), "deepspeed.zero_optimization.offload_optimizer"
    ratio = optimizer.get("ratio", 1)
    is_partial = isinstance(ratio, float | int) and ratio < 1
    problems = []
    if is_partial and zero.get("stage", 0) != 3:
        problems.append(
            f"{key}.ratio={ratio} needs ZeRO-3: leave it out, or set deepspeed.zero_optimization.stage to 3"
        )
    if is_partial and table(table(deepspeed, "optimizer"), "params").get("torch_adam"):
        problems.append(
            f"{key}.ratio={ratio} with deepspeed.optimizer.params.torch_adam: only DeepSpeed's own Adam works in both "
            "places; leave one of them out"
        )
    if optimizer.get("super_offload"):
        problems.append(
            f"{key}.super_offload keeps the moments in another process, where no checkpoint can read them: leave it out"
        )
    return problems


def device_of(zero: Mapping[str, Any], part: str) -> str:
    """Where a part of the state is to live; "none" is where the model is, and where DeepSpeed refuses what it says."""
    device = table(zero, part).get("device", "none")
    return device if isinstance(device, str) and device in OFFLOAD_STAGES[part] else "none"
