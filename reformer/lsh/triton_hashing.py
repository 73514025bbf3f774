"""`triton_hash`: the fused GPU path of hashing.

One launch per factor of the number of buckets (triton_hash_kernel.py), and no projection in device memory, where those
of a layer at a million tokens would be 24 GiB.

Triton is imported when the path runs, as in triton_attention.py, whose conditions are these (`why_no_kernel`).
"""

import torch
from torch import Tensor

from reformer.lsh.hashing import bucket_dtype, to_device
from reformer.lsh.triton_attention import interpreting, on_device, why_no_kernel, with_whole_rows

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 numbers that a number is the sum of."""
BLOCK = {1: 128, 2: 128, 3: 64}
"""Tokens of a program, by these parts, all of which stand in shared memory."""
MAX_COLUMNS = 64
"""Most directions that a program looks at together."""


def triton_hash(qk_BHTD: Tensor, rotations_HDRF: Tensor, factors: tuple[int, ...]) -> Tensor:
    """The buckets [B, H, R, T] that `hash_to_buckets` gives for qk [B, H, T, D] and rotations [H, D, R, F].

    Of two directions within the rounding of fp32 either may win. Raises ValueError where the path cannot run, with the
    reason.
    """
    if reason := why_no_kernel(qk_BHTD):
        raise ValueError(f"the fused hashing cannot run: {reason}; take hash_to_buckets")
    import triton
    import triton.language as tl

    from reformer.lsh.triton_hash_kernel import hash_kernel

    x = with_whole_rows(qk_BHTD.detach())
    batch, n_heads, n_tokens, d_head = x.shape
    directions_PHDRF = in_bf16_parts(to_device(rotations_HDRF, x.device).float().contiguous())
    n_hashes, n_directions = rotations_HDRF.shape[2:]
    buckets = torch.empty(batch, n_heads, n_hashes, n_tokens, dtype=bucket_dtype(factors), device=x.device)
    first, stride, block = 0, 1, BLOCK[PARTS[x.dtype]]
    with on_device(x):
        for factor in factors:
            half = factor // 2
            hash_kernel[(batch * n_heads * triton.cdiv(n_tokens, block),)](
                x, *x.stride()[:3], directions_PHDRF, directions_PHDRF.stride(0), buckets, n_heads, n_tokens, n_hashes,
                n_directions, first, half, stride,
                D=d_head, BLOCK_D=max(16, triton.next_power_of_2(d_head)), BLOCK=block,
                COLUMNS=min(MAX_COLUMNS, max(16, triton.next_power_of_2(half))), PARTS=PARTS[x.dtype],
                OPERAND=tl.float32 if interpreting() else tl.bfloat16,  # the interpreter's numpy has no bf16
                IS_FIRST=first == 0, num_warps=block // 16, num_stages=1,
            )  # fmt: skip
            first, stride = first + half, stride * factor
    return buckets


def in_bf16_parts(x: Tensor) -> Tensor:
    """Three bf16 numbers [3, ...] for each fp32 number of x, whose sum it is: 3 * 8 bits are its 24."""
    high = x.bfloat16()
    rest = x - high.float()
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle.float()).bfloat16()])
