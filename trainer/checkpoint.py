"""Checkpoints: complete or absent, and refused where they would not continue the same run.

What is special: everything is written into `.partial-step_…`, and when every rank has finished, the folder is
published by renaming it. `state.json` says what the checkpoint belongs to and is read before any process group
starts. The rest of the folder is a DeepSpeed checkpoint of its own, for DeepSpeed's tools too.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch

from reformer.config import ConfigError
from trainer.config import RunConfig, flatten
from trainer.distributed import Launch, barrier

TAG = "deepspeed"
"""Subfolder of DeepSpeed's files in a checkpoint."""

FIXED = (
    "store_fingerprint",
    "world_size",
    "model",
    "data.train_split",
    "run.seed",
    "train_batch_size",
    "deepspeed.optimizer",
    "deepspeed.bf16",
    "deepspeed.data_types",
    "deepspeed.zero_optimization.stage",
)
"""What must be the same when a run continues: the model, the order of the data, the layout of the optimizer's state."""

ON_NVME = "deepspeed.zero_optimization.{}.device='nvme'"
"""How a part of the state is said to live on NVMe: offload_optimizer, offload_param."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    """Optimizer steps that it is the result of."""


def identity(
    config: RunConfig,
    deepspeed_config: Mapping[str, Any],
    store_fingerprint: str | Mapping[str, str | int],
    world_size: int,
) -> dict[str, Any]:
    """What a checkpoint says about its run, as plain JSON values."""
    micro, accumulation = (
        deepspeed_config.get(key, 1) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    return {
        "store_fingerprint": store_fingerprint,
        "world_size": world_size,
        "train_batch_size": deepspeed_config.get("train_batch_size", micro * accumulation * world_size),
        **config.model_dump(mode="json"),
        "deepspeed": dict(deepspeed_config),
    }


def published(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    steps = [(match, folder) for folder in folders if (match := re.fullmatch(r"step_(\d+)", folder.name))]
    return sorted((Checkpoint(path, int(match[1])) for match, path in steps), key=lambda found: found.step)


def starting_point(run_dir: Path, current: Mapping[str, Any], resume: bool) -> Checkpoint | None:
    """Where to start from: a checkpoint or, as None, the beginning. A ConfigError if that is not possible."""
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={run_dir}: {error.strerror}: choose another folder") from None
    found = published(run_dir)
    if not found:
        return None
    newest = found[-1]
    if not resume:
        raise ConfigError(
            f"{run_dir} already holds a run up to step {newest.step}: "
            "continue it with --resume, or choose another folder with run.dir=…"
        )
    saved, sizes = _read_state(newest)
    _refuse_nvme(newest, saved, current)
    _refuse_damage(newest, sizes)
    if differences := _differences(saved, current):
        raise ConfigError("\n".join([f"cannot continue from {newest.path}:", *differences]))
    return newest


def nvme_note(deepspeed_config: Mapping[str, Any]) -> str:
    """What to say when a run starts about how it could be continued; empty if that goes without saying."""
    parts = _on_nvme(deepspeed_config)
    if "offload_optimizer" in parts:
        return (
            f"note: with {ON_NVME.format('offload_optimizer')} this run cannot be continued with --resume, since "
            "DeepSpeed does not restore an optimizer from NVMe. If it may have to be, set the device to 'cpu'"
        )
    if parts:
        return (
            f"note: with {ON_NVME.format('offload_param')}, set the device to 'cpu' to continue this run with "
            "--resume, since DeepSpeed does not restore parameters to NVMe"
        )
    return ""


def _on_nvme(deepspeed_config: Mapping[str, Any]) -> list[str]:
    """The parts of the state that DeepSpeed would not restore.

    Of an optimizer on NVMe, its load_checkpoint() skips the file with everything but the moments, and copies these to
    where the swapper does not know of them. Into parameters on NVMe it writes as if they were in memory, and fails
    with an AttributeError for those beyond max_in_cpu; but their checkpoint is whole, and goes on from the CPU.
    """
    zero = deepspeed_config.get("zero_optimization") or {}
    return [name for name in ("offload_optimizer", "offload_param") if (zero.get(name) or {}).get("device") == "nvme"]


def _refuse_nvme(checkpoint: Checkpoint, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    was, now = (_on_nvme(run.get("deepspeed") or {}) for run in (saved, current))
    if "offload_optimizer" in was:
        raise ConfigError(
            f"cannot continue from {checkpoint.path}: it is of a run with {ON_NVME.format('offload_optimizer')}, and "
            "DeepSpeed does not restore an optimizer from NVMe: start anew in another run.dir, with device 'cpu' if "
            "that run may have to be continued"
        )
    if now:
        settings = " and ".join(ON_NVME.format(name) for name in now)
        raise ConfigError(
            f"cannot continue from {checkpoint.path} with {settings}: DeepSpeed does not restore what lives on NVMe; "
            "set the device to 'cpu'"
        )


def _read_state(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, int]]:
    """What a checkpoint says about its run, and how many bytes each of its files has."""
    try:
        state = json.loads((checkpoint.path / "state.json").read_text(encoding="utf-8"))
        run, sizes = dict(state["run"]), dict(state["n_bytes"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(checkpoint, f"state.json: {error!r}") from None
    return run, sizes


def _refuse_damage(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> None:
    for name, n_bytes in sizes.items():
        path = checkpoint.path / TAG / name
        if not path.is_file():
            raise _damaged(checkpoint, f"{TAG}/{name} is missing")
        if path.stat().st_size != n_bytes:
            raise _damaged(checkpoint, f"{TAG}/{name} has {path.stat().st_size} bytes instead of {n_bytes}")


def _damaged(checkpoint: Checkpoint, problem: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint {checkpoint.path} is damaged: {problem}. Remove that folder, and --resume continues from the "
        "one before it"
    )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each value in FIXED that is not what it was."""
    before, now = flatten(saved), flatten(json.loads(json.dumps(current)))
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r} now: {_way_back(name)}, "
        "or start anew in another run.dir"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and any(f"{name}.".startswith(f"{fixed}.") for fixed in FIXED)
    ]


def _way_back(name: str) -> str:
    if re.fullmatch(r"store_fingerprint(\..*\.store)?", name):
        return "it is another store, or was added to (--append), which changes the order; continue on that of before"
    return "set it back"


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Bring weights, optimizer and schedule to where they were."""
    loaded, _ = engine.load_checkpoint(str(checkpoint.path), tag=TAG)
    if loaded is None:
        raise _damaged(checkpoint, "DeepSpeed finds no state in it")


def save(
    engine: deepspeed.DeepSpeedEngine,
    run_dir: Path,
    step: int,
    run: Mapping[str, Any],
    keep_last: int,
    launch: Launch,
    device: torch.device,
) -> Path:
    """Write the state after `step` steps, publish it, and remove what is older than `keep_last`."""
    name = f"step_{step:08d}"
    partial, final = run_dir / "checkpoints" / f".partial-{name}", run_dir / "checkpoints" / name
    engine.save_checkpoint(str(partial), tag=TAG)
    # Rank 0 may publish only what every rank has finished, and none may go on before it is published.
    barrier(device)
    if launch.rank == 0:
        # DeepSpeed makes folders in its folder, for what is on NVMe.
        files = [path for path in sorted((partial / TAG).rglob("*")) if path.is_file()]
        sizes = {path.relative_to(partial / TAG).as_posix(): path.stat().st_size for path in files}
        state = {"step": step, "run": run, "n_bytes": sizes}
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        partial.rename(final)
        for old in published(run_dir)[:-keep_last]:
            _remove(old)
    barrier(device)
    return final


def remove_leftovers(run_dir: Path) -> None:
    """Delete what an interrupted save left behind."""
    for leftover in (run_dir / "checkpoints").glob(".partial-*"):
        shutil.rmtree(leftover)


def _remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint so that, interrupted, it is a leftover and not a damaged checkpoint."""
    doomed = checkpoint.path.with_name(f".partial-{checkpoint.path.name}")
    checkpoint.path.rename(doomed)
    shutil.rmtree(doomed)
