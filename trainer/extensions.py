"""DeepSpeed's C++ parts, which it compiles on the first use: what this machine lacks for one of them."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import accelerator_name, installed_ops
from deepspeed.ops.op_builder.builder import CUDAOpBuilder
from torch.utils import cpp_extension

STALE_LOCK_S = 900
"""Age at which the lock of a compilation is one that nobody holds any more."""


def missing_for(builder_name: str) -> str:
    """What a C++ part of DeepSpeed needs that this machine lacks to compile and load it; empty if nothing."""
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
            # Whoever finds a lock here waits until somebody removes it, for ever if nobody does.
            lock = Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock"
        except OSError as error:
            return f"a folder that can be written to, to compile in: {error}"
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE_LOCK_S:
                return f"the removal of {lock}, which a compilation that was stopped has left behind"
    return ""


def _missing_of_cuda() -> str:
    """What is compiled for NVIDIA's GPUs needs more than PyTorch brings. Empty if it is there."""
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "the CUDA toolkit with nvcc (on a cluster often a module to load; or set CUDA_HOME to where it is)"
    return "" if (Path(home) / "bin/nvcc").is_file() else f"the CUDA toolkit with nvcc, which CUDA_HOME={home} has not"
