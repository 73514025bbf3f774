"""What one GPU has of the trainer's promises: the CPU's numbers, and a run that continues to the bit.

Skipped where there is no GPU; `make gpu-check` runs it. Its processes start as a user's do: a fork of what has asked
for CUDA cannot use it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed.conftest import Run, assert_resumed_equals_uninterrupted, run, script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MODEL = ("model.d_model=64", "model.n_layers=3", 'model.attn_pattern=["local","lsh","lsh"]')
"""Head dims of 32, which the fused kernels have."""
TAGS = ("train/loss", "train/grad_norm", "train/param_norm", "eval/loss", "eval/loss_without_lsh")
STAGE = "deepspeed.zero_optimization.stage"


def train_on(device: str, config: Path, run_dir: Path, changes: Sequence[str]) -> Run:
    command = [sys.executable, *script(config, run_dir), *MODEL, *changes]
    done = run([command], run_dir, [{"DS_ACCELERATOR": device}])
    assert done.code == 0, done.errors
    is_gpu = device == "cuda"
    assert (torch.cuda.get_device_name() in done.output) == is_gpu
    assert ("LSH attention runs as 'triton'" in done.output + done.errors) == is_gpu
    assert ("local attention runs as 'triton'" in done.output + done.errors) == is_gpu
    return done


def test_computes_what_the_cpu_computes(config: Path, tmp_path: Path):
    """In fp32. Later steps are not compared: a rounding may send a token to another bucket."""
    gpu, cpu = (train_on(device, config, tmp_path / device, ["run.steps=1"]) for device in ("cuda", "cpu"))
    for tag in TAGS:
        assert gpu.column(tag) == pytest.approx(cpu.column(tag), rel=1e-3), tag


@pytest.mark.parametrize("changes", [(f"{STAGE}=0",), (f"{STAGE}=2", "model.dropout=0.1"), (f"{STAGE}=3",)])
def test_resumed_equals_uninterrupted_in_bf16(config: Path, tmp_path: Path, changes: tuple[str, ...]):
    settings = ("deepspeed.bf16.enabled=true", *changes)
    assert_resumed_equals_uninterrupted(lambda: train_on("cuda", config, tmp_path / "run", settings), TAGS)
