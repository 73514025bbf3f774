"""What a run reports: TensorBoard events, the same numbers as lines of JSON, and a line on the terminal.

What is special: after a resume, what was reported beyond the checkpoint is taken back, so every curve is continuous.

RUN/metrics.jsonl: one JSON object a line. `step` is the number of optimizer steps done; the other keys are the tags
of TensorBoard, floats in full precision, null for what is no finite number:

    train/loss, train/bits_per_byte     of that step's global batch: nats per token, bits per byte of its text
    train/lr, train/grad_norm           of that step; the norm is that before clipping
    speed/tokens_per_s, speed/step_s    since the line before, without evaluation and checkpoints; tokens to predict
    speed/data_stall                    share of step_s that the slowest rank spent on its data: waiting for rows that
                                        are read in the background, and making batches of them
    data/skipped_rows                   with data.on_damage="skip": damaged rows left out since the run was started or
                                        resumed, on all ranks
    memory/peak_gib                     the largest of all ranks so far: device memory on GPUs, resident on CPUs
    eval/loss, eval/bits_per_byte       on a line of their own, from step 0 on
    lsh/layer01/…                       on the same line, of the first held-out row, each LSH layer; from layer 0 on
      largest_bucket_over_mean          tokens in the largest bucket of any round and head; 1 where all are even
      empty_buckets                     share of the buckets that are empty
      recovered_mass                    share of dense attention that LSH attention reaches, mean of sampled queries
    reversible/reconstruction_error     how far the backward's inputs of the stack are from the forward's: max / rms

RUN/run.json: one object, written before the first step.

    started, resumed_from_step          ISO time; null unless resumed
    config, deepspeed                   the resolved TOML side {model, data, run} and DeepSpeed's JSON
    store                               of data.store: {fingerprint, seq_len, vocab_size, rows: {split: number},
                                        tokenizer_sha256}
    samples                             what the order of the samples follows from: seed, and store (its fingerprint)
                                        and split; of a mixture NAME.store, … and NAME.per_thousand of each source
    launch                              {launcher, world_size, local_world_size, device}
    n_parameters                        of the model
    versions, git_commit                {package: version}; null outside of a git checkout
"""

import json
import math
import platform
import re
import resource
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

PACKAGES = ("longhand", "torch", "deepspeed", "numpy", "zarr", "sentencepiece")


class Metrics:
    """The reports of rank 0."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Continue the reports of a run after `step` steps; 0 begins them."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        _keep_until(self._path, step if step else -1)
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Report values of one step, by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()
        with self._path.open("a", encoding="utf-8") as lines:
            numbers = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
            lines.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self) -> None:
        self._writer.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`; a line that a crash cut short goes with them."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if (step_of := _step_of(line)) is not None and step_of <= step]
    shorter = path.with_suffix(".partial")
    shorter.write_text("".join(kept), encoding="utf-8")
    shorter.replace(path)


def _step_of(line: str) -> int | None:
    """The step of a line of metrics.jsonl; None if it is not whole."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Linux's high-water mark; getrusage would count what the launcher used before this program was loaded.
    status = Path("/proc/self/status")
    if status.exists() and (mark := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(mark[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def environment() -> dict[str, Any]:
    """Versions and git commit, for run.json."""
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit of this code, marked if the tree has changes; None outside of a git checkout."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def train_line(step: int, steps: int, values: Mapping[str, float]) -> str:
    """One dense line on a step."""
    left = duration((steps - step) * values["speed/step_s"])
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {values['train/loss']:.4f}  "
        f"bits/byte {values['train/bits_per_byte']:.4f}  lr {values['train/lr']:.2e}  "
        f"grad {values['train/grad_norm']:.3g}  {values['speed/tokens_per_s']:,.0f} tokens/s  "
        f"{values['memory/peak_gib']:.2f} GiB  {left} left"
    )


def eval_line(step: int, steps: int, values: Mapping[str, float], n_rows: int) -> str:
    """One line on an evaluation."""
    return (
        f"eval {step:>{len(str(steps))}}/{steps}  loss {values['eval/loss']:.4f}  "
        f"bits/byte {values['eval/bits_per_byte']:.4f}  on {n_rows} held-out rows"
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"
