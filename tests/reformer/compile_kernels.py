"""Compile the kernels for an H100, on a machine that needs no GPU: prints what each one takes.

For each a line: its name, its shared memory and, spilled registers for the most part, its stack, in bytes.

Triton's own front end runs as it would on the GPU, with a driver that only says what the GPU is; nothing is launched.
"""

import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from reformer.lsh import triton_attention, triton_hash_kernel, triton_hashing, triton_kernels
from reformer.lsh.hashing import sort_by_bucket
from reformer.lsh.rounds import Layout


class AbsentGpu:
    """What Triton asks of a driver until it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel: kernel[grid](…) compiles for these arguments."""

    def __init__(self, kernel: Any, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: self.compile(*arguments, grid=grid, **options)

    def compile(self, *arguments: Any, **options: Any) -> None:
        compiled = self.kernel.warmup(*arguments, **options)
        print(self.name, compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]))


def stack_bytes(cubin: bytes) -> int:
    """Of a thread, by NVIDIA's own tool, which Triton has with it."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])  # type: ignore[index]


def compile_for(dtype: torch.dtype, d_head: int, *, n_hashes: int, is_lsh: bool, **options: Any) -> None:
    n_groups, n_tokens, chunk_len = 2, 200, 64
    buckets = torch.zeros(n_groups, n_hashes, n_tokens, dtype=torch.int64)
    layout = Layout(*sort_by_bucket(buckets, chunk_len), chunk_len, is_lsh=is_lsh, **options)
    x = torch.zeros(n_groups, n_tokens, d_head, dtype=dtype)
    k = None if is_lsh else x
    out, *statistics = triton_attention._forward(x, k, x, layout)
    triton_attention._backward((x, k, x, out, *statistics), x, layout)


if __name__ == "__main__":
    triton.runtime.driver.set_active(AbsentGpu())
    for name in ("forward_kernel", "prepare_kernel", "backward_kernel"):
        setattr(triton_kernels, name, CompileOnly(getattr(triton_kernels, name), name))
    triton_hash_kernel.hash_kernel = CompileOnly(triton_hash_kernel.hash_kernel, "hash_kernel")
    labels = torch.zeros(2, 200, dtype=torch.int64)
    for dtype, d_head in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float32, 128)):
        compile_for(dtype, d_head, n_hashes=3, is_lsh=True, causal=True, segment_ids_GT=labels)
    everything = {"segment_ids_GT": labels, "key_mask_GT": labels == 0, "dropout": 0.1}
    keys = torch.zeros(2, dtype=torch.int64)
    compile_for(torch.bfloat16, 24, n_hashes=1, is_lsh=False, causal=False, dropout_keys_G=keys, **everything)
    triton_hashing.why_no_kernel = lambda x: None  # the tensors are on the CPU
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        triton_hashing.triton_hash(torch.zeros(1, 2, 200, 128, dtype=dtype), torch.zeros(2, 128, 4, 48), (32, 64))
