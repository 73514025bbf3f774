"""DeepSpeed's C++ parts, which it compiles on the first use: what this machine lacks for one of them.

Whoever compiles one holds a lock that is nothing but a file. Whoever finds it waits until somebody removes it: without
a word, and for ever if its maker was killed.
"""

import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils import cpp_extension

from trainer.preemption import PREEMPTED, SIGNALS

STALE_LOCK_S = 480
"""Age at which the lock of a compilation is one that nobody holds any more; less than ranks wait for each other."""
_POLL_S = 1.0


def missing_for(builder_name: str) -> str:
    """What a C++ part of DeepSpeed needs that this machine lacks to compile and load it; empty if nothing.

    Where another process compiles it, or was killed while it did, this waits until that is over, or surely dead.
    """
    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None:
        return f"its version for {get_accelerator().device_name()}"
    if installed_ops.get(builder.name) and accelerator_name == get_accelerator()._name:
        return ""
    if isinstance(builder, CUDAOpBuilder) and torch.version.hip is None and (missing := _missing_of_cuda()):
        return missing
    if not cpp_extension.is_ninja_available():
        return "ninja"
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        return f"the C++ compiler {cpp_extension.get_cxx_compiler()}"
    if not builder.is_compatible():
        return "libaio with its headers (Debian: libaio-dev)" if builder.name == "async_io" else builder.name
    # Loading async_io compiles and loads pin_memory first.
    for name in (builder.name, "pin_memory") if builder.name == "async_io" else (builder.name,):
        try:
            lock = Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock"
        except OSError as error:
            return f"a folder that can be written to, to compile in: {error}"
        if not _is_released(lock):
            return f"the removal of {lock}, which a compilation that was stopped has left behind"
    return ""


def _is_released(lock: Path) -> bool:
    """Waits until a lock is gone; False once it is so old that nobody holds it any more.

    Where a signal that asks a run to stop comes meanwhile, this ends as a run that was asked to.
    """
    try:
        left_s = min(STALE_LOCK_S, STALE_LOCK_S - (time.time() - lock.stat().st_mtime))  # clocks of nodes may differ
    except FileNotFoundError:
        return True
    if left_s > 0:
        about = "another process seems to compile this part of DeepSpeed; if none does, remove that file"
        print(f"waiting for {lock} to go, {left_s:.0f} s at most: {about}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + left_s
    while lock.exists():
        if time.monotonic() > deadline:
            return False
        if signal.sigpending() & {*SIGNALS}:  # launch/train.py blocks them until the run listens to them
            raise SystemExit(PREEMPTED)
        time.sleep(_POLL_S)
    return True


def _missing_of_cuda() -> str:
    """What is compiled for NVIDIA's GPUs needs more than PyTorch brings. Empty if it is there."""
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "the CUDA toolkit with nvcc (on a cluster often a module to load; or set CUDA_HOME to where it is)"
    return "" if (Path(home) / "bin/nvcc").is_file() else f"the CUDA toolkit with nvcc, which CUDA_HOME={home} has not"
