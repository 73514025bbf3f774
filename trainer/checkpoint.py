"""Checkpoints: complete, verified, and readable by any number of ranks under any ZeRO stage.

Everything is written into `.partial-step_…`, and when every rank has finished, the folder is published by renaming it.
On resume all ranks together check every byte; a damaged checkpoint is renamed to `damaged-step_…`, and the one before
it is used.

RUN/checkpoints/step_00000100/:

    rank_00000.safetensors …   slices of weights and optimizer state, one file a rank that wrote: see state.py
    state.json                 {format, step, world_size, shapes: {parameter: shape}, run: see resume.identity,
                                progress: what the run had counted, see reports.py}
    SHA256SUMS                 of all other files; `sha256sum -c SHA256SUMS` reads it
"""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.layout import hash_file
from reformer.config import ConfigError
from trainer import state
from trainer.config import LoopConfig
from trainer.distributed import Launch, all_gather, all_max, all_sum, together
from trainer.run_files import CHECKPOINTS
from trainer.terminal import show

T = TypeVar("T")

FORMAT = 3
SUMS = "SHA256SUMS"
SPARE_BYTES = 2**20
"""Room that a checkpoint needs besides its tensors: their names, state.json, the folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    """Optimizer steps that it is the result of."""


class SaveError(Exception):
    """A checkpoint could not be written; the ones before it are untouched, and nothing of it is left."""


def published(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run_dir / CHECKPOINTS).glob("step_*")
    steps = [(match, folder) for folder in folders if (match := re.fullmatch(r"step_(\d+)", folder.name))]
    found = [Checkpoint(path, int(match[1])) for match, path in steps if path.name == _name(int(match[1]))]
    return sorted(found, key=lambda each: each.step)


def checked(run_dir: Path, step: int | None = None) -> Iterator[tuple[Checkpoint, list[str]]]:
    """The checkpoints of a run, or the one of a step, newest first, each with its `problems`.

    A run may go on meanwhile: what it writes is taken in, and what it removes is left out.
    """
    seen: set[Checkpoint] = set()
    while left := [each for each in published(run_dir) if each not in seen and step in (None, each.step)]:
        newest = left[-1]
        seen.add(newest)
        found = problems(newest.path)
        if newest.path.exists():
            yield newest, found


def way_on(run_dir: Path) -> str:
    """What to tell people whose run has ended."""
    saved = published(run_dir)
    return f"the same command goes on from {saved[-1].path}" if saved else "there is no checkpoint yet to go on from"


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, its state.json.

    Raises DataError where that is not what was written, and ConfigError where another version wrote it.
    """
    try:
        if hash_file(path / "state.json") != _read_sums(path)["state.json"]:
            raise DataError(f"{path}/state.json is not what was written")
        found: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}/state.json cannot be read: {error!r}") from None
    if found["format"] != FORMAT:
        raise ConfigError(
            f"{path} is of format {found['format']}, and this version reads {FORMAT}: use the version that wrote it"
        )
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, fp32 on the CPU, by parameter. Raises DataError where they cannot be read."""
    with state.SavedSlices.open(path) as saved:
        return saved.weights()


def problems(path: Path, share: int = 0, n_shares: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, a line for each; every byte is read. Empty if it is sound.

    Of `n_shares` callers, each with its `share`, all look at the names and each at the bytes of its files.
    """
    try:
        sums = _read_sums(path)
        names = sorted(entry.name for entry in os.scandir(path) if entry.name != SUMS)
    except (OSError, ValueError) as error:
        return [f"{SUMS} cannot be read: {error}"]
    missing = [f"{name} is missing" for name in sorted(sums.keys() - set(names))]
    unknown = [f"{name} does not belong there" for name in names if name not in sums]
    if not {"state.json", "rank_00000.safetensors"} <= sums.keys():
        unknown.append(f"{SUMS} does not name what every checkpoint has")
    shared = [name for name in names if name in sums][share::n_shares]
    return missing + unknown + [line for name in shared for line in _differs(path / name, sums[name])]


def _read_sums(path: Path) -> dict[str, str]:
    """The SHA-256 of each file by name. Raises OSError or ValueError."""
    *lines, rest = (path / SUMS).read_bytes().decode("ascii").split("\n")
    if rest:
        raise ValueError("its last line is cut short")
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def _differs(path: Path, digest: str) -> list[str]:
    try:
        found = hash_file(path)
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]
    return [] if found == digest else [f"{path.name} is not what was written ({path.stat().st_size:,} bytes)"]


def sound_start(run_dir: Path, launch: Launch, device: torch.device, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is what was written; None if there is none at all. All ranks call this.

    What is damaged is put aside and reported. Raises ConfigError where all checkpoints are.
    """
    newest = published(run_dir)[::-1] if launch.rank == 0 else []
    for number in range(int(all_max(len(newest), device))):
        step = int(all_max(newest[number].step if newest else -1, device))
        checkpoint = Checkpoint(run_dir / CHECKPOINTS / _name(step), step)
        together(partial(_refuse_unseen, checkpoint.path), launch, device)
        found = problems(checkpoint.path, launch.rank, launch.world_size)
        for problem in found:
            show(f"damaged checkpoint {checkpoint.path}: {problem}")
        if not all_max(len(found), device):
            return checkpoint
        aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
        together(partial(_put_aside, checkpoint.path, aside, acts=launch.rank == 0), launch, device)
        say(f"put aside as {aside}; trying the checkpoint before it")
    if damaged := sorted((run_dir / CHECKPOINTS).glob("damaged-step_*")):
        raise ConfigError(
            f"no checkpoint of {run_dir} is sound: {', '.join(path.name for path in damaged)} are damaged. Remove them "
            "to start this run anew, or choose another run.dir"
        )
    return None


def _refuse_unseen(path: Path) -> None:
    """On a rank that does not see what rank 0 does, which says nothing about what is there."""
    if not path.is_dir():
        raise ConfigError(
            f"{path} exists for rank 0, but not on {socket.gethostname()}: have all nodes see the same run.dir"
        )


def _put_aside(damaged: Path, aside: Path, acts: bool) -> None:
    try:
        if acts:
            _delete(aside)
            damaged.rename(aside)
    except OSError as error:
        raise ConfigError(f"cannot rename {damaged}, which is damaged: {error.strerror}: remove it") from None


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Bring weights and optimizer to where they were. All ranks call this."""
    with state.SavedSlices.open(checkpoint.path) as saved:
        state.restore(engine, saved)


def save(
    engine: deepspeed.DeepSpeedEngine,
    plan: LoopConfig,
    step: int,
    run: Mapping[str, Any],
    progress: Mapping[str, Any],
    launch: Launch,
    device: torch.device,
    *,
    removes: bool = True,
) -> Checkpoint:
    """Write the state after `step` steps, publish it, and remove what need not be kept. All ranks call this.

    removes: whether it does the latter.

    Raises SaveError, on all ranks, where one of them cannot write; then nothing has changed.
    """
    final = plan.dir / CHECKPOINTS / _name(step)
    folder = final.with_name(f".partial-{final.name}")
    slices, shapes = state.local_slices(engine), state.shapes(engine)
    n_bytes = int(all_sum([sum(each.nbytes for each in slices.values())], device)[0])
    facts = {"format": FORMAT, "step": step, "world_size": launch.world_size, "shapes": shapes}
    facts |= {"run": run, "progress": progress}
    leads, name = launch.rank == 0, f"rank_{launch.rank:05d}.safetensors"
    try:
        _on_all(partial(_make_room, folder, n_bytes), leads, device)
        digest = _on_all(partial(_write_slices, folder / name, slices), bool(slices), device)
        digests = _gather_digests(digest, device)
        _on_all(partial(_publish, folder, final, facts, digests), leads, device)
    except SaveError as error:
        if leads:
            _delete(folder)
        raise SaveError(f"cannot save {final}, of {n_bytes:,} bytes: {error}") from None
    if leads and removes:
        _retain(plan, progress.get("best_step"))
    all_sum([0], device)  # none goes on, and perhaps ends, before rank 0 has done this
    return Checkpoint(final, step)


def _on_all(action: Callable[[], T], acts: bool, device: torch.device) -> T | None:
    """Do something on the ranks that act. Where one fails, all raise SaveError, which says why where it failed."""
    result, problem = None, ""
    try:
        result = action() if acts else None
    except (OSError, SafetensorError) as error:
        problem = str(error)
        show(f"error while saving: {problem}", error=True)
    if all_max(bool(problem), device):
        raise SaveError(problem or "another rank failed")
    return result


def _make_room(folder: Path, n_bytes: int) -> None:
    """An empty folder, where there is room for so many bytes and a little more."""
    _delete(folder)
    folder.mkdir(parents=True)
    needed, free = n_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free:,} bytes left, and {needed:,} are needed: make room there")


def _write_slices(path: Path, slices: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of what is on the disk then."""
    save_file(dict(slices), path)
    shutil.copymode(path.parent, path)  # safetensors gives no one else the right to read
    path.chmod(path.stat().st_mode & ~0o111)
    _sync(path)
    return hash_file(path)


def _gather_digests(digest: str | None, device: torch.device) -> dict[str, str]:
    """The digest of each rank's file by name; of none where a rank has nothing to write."""
    values = [float(byte) for byte in bytes.fromhex(digest)] if digest else [-1.0] * 32
    found = enumerate(all_gather(values, device))
    return {f"rank_{rank:05d}.safetensors": bytes(map(int, each)).hex() for rank, each in found if each[0] >= 0}


def _publish(folder: Path, final: Path, facts: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    (folder / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    sums = {**digests, "state.json": hash_file(folder / "state.json")}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="ascii")
    for path in (folder / "state.json", folder / SUMS, folder):
        _sync(path)
    folder.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retain(plan: LoopConfig, best_step: int | None) -> None:
    for old in published(plan.dir)[: -plan.keep_last]:
        is_best = plan.keep_best and old.step == best_step
        if not (is_best or (plan.keep_every and old.step % plan.keep_every == 0)):
            try:
                _remove(old)
            except OSError as error:  # what is too much is no reason to stop
                show(f"note: cannot remove {old.path}, which need not be kept: {error.strerror or error}")


def remove_leftovers(run_dir: Path) -> None:
    """Delete what an interrupted save left behind."""
    for leftover in (run_dir / CHECKPOINTS).glob(".partial-*"):
        _delete(leftover)


def _remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint so that, interrupted, it is a leftover and not a damaged checkpoint."""
    doomed = checkpoint.path.with_name(f".partial-{checkpoint.path.name}")
    checkpoint.path.rename(doomed)
    _delete(doomed)


def _delete(folder: Path) -> None:
    """As far as possible. Of a link to a folder elsewhere, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:08d}"
