"""`triton_attention`: the fused GPU path of LSH and local attention, and when it can run.

The same contract as `chunked_attention`. One launch per round and direction (triton_kernels.py). Between the launches
there is, per token, one fp32 row in the forward and two in the backward, and only where there are several rounds; for
the backward nothing is kept but the inputs, the output and three numbers.

Triton is imported when the path runs, so that this file can say why it cannot on a machine without Triton.

Axes: G batch times heads, T tokens, D head dim.
"""

import contextlib
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from reformer.gradients import refuse_second_derivatives
from reformer.lsh.dropout import keep_threshold
from reformer.lsh.rounds import Layout

CHUNK_LENGTHS = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 128
"""Beyond it, the accumulators of a block do not fit into the registers."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

BLOCK = {2: 64, 4: 32}
"""Most places of a block, by bytes per number: its rows of up to four tensors stand in shared memory."""
FORWARD_STAGES, BACKWARD_STAGES = 1, 2
"""Software pipelining: with two stages the next block of a window is fetched while this one is multiplied. The forward
took as long without (measured on an H200), and half of the shared memory."""
FORWARD_REGISTERS = 168
"""Of a thread in half precision, so that three programs of the forward share a multiprocessor, with next to no spills
(by the compiler's count for D = 128; the gain is yet to be measured)."""


def why_not(q_GTD: Tensor, k_GTD: Tensor | None, layout: Layout) -> str | None:
    """Why the Triton path cannot run for these inputs, as a half sentence; None where it can."""
    if reason := why_no_kernel(q_GTD):
        return reason
    if layout.chunk_len not in CHUNK_LENGTHS:
        return f"its chunk lengths are {', '.join(map(str, CHUNK_LENGTHS))}, not {layout.chunk_len}"
    if layout.is_lsh != (k_GTD is None) or (k_GTD is not None and layout.n_rounds > 1):
        return "it has keys of their own in local attention only, where there is one round"
    return None


def why_no_kernel(x: Tensor) -> str | None:
    """The part of it that is about a tensor [..., D] alone, for every kernel here."""
    if not find_spec("triton"):
        return "Triton is not installed (pip install triton)"
    if x.device.type != "cuda" and not interpreting():
        return f"the tensors are on the {x.device.type.upper()}"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"{torch.cuda.get_device_name(x.device)} is older than compute capability 8.0"
    if x.dtype not in DTYPES:
        return f"its kernels know bfloat16, float16 and float32, not {x.dtype}".replace("torch.", "")
    if x.shape[-1] > MAX_HEAD_DIM:
        return f"its head dims go up to {MAX_HEAD_DIM}, not to {x.shape[-1]}"
    return None


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device and slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "y", "on")


def triton_attention(q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout) -> Tensor:
    """Attention output [G, T, D] under `layout`; scores are q.k, or q.q/|q| where no keys are given.

    A token that sees nothing gets its own value. Products are of the inputs' dtype (bf16, fp16, fp32), statistics
    and sums fp32. Raises ValueError where the path cannot run, with the reason.
    """
    if reason := why_not(q_GTD, k_GTD, layout):
        raise ValueError(f"the Triton path cannot run: {reason}; take backend='chunked' or 'auto'")
    return _TritonAttention.apply(q_GTD, k_GTD, v_GTD, layout)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, v: Tensor, layout: Layout) -> Tensor:
        q, v = with_whole_rows(q), with_whole_rows(v)
        k = None if k is None else with_whole_rows(k)
        with on_device(q):
            out, *statistics = _forward(q, k, v, layout)
        ctx.save_for_backward(q, k, v, out, *statistics)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        refuse_second_derivatives("the fused kernels of attention")
        with on_device(d_out):
            dq, dk, dv = _backward(ctx.saved_tensors, with_whole_rows(d_out), ctx.layout)
        return dq, dk, dv, None


def _forward(
    q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Output [G, T, D] and, [G, T] in fp32: what weights are relative to, their sum, 1 / |q| (None: k is given).

    The first two are kept apart: a logsumexp would lose the sum to rounding where the scores are large.
    """
    from reformer.lsh import triton_kernels as kernels

    key_scale_GT = None
    if k_GTD is None:
        norm = torch.linalg.vector_norm(q_GTD, dim=-1, dtype=torch.float32)
        # The key of a zero vector is zero, without gradient.
        key_scale_GT = norm.reciprocal().masked_fill_(norm < torch.finfo(torch.float32).tiny, 0)
    out_GTD = torch.empty_like(v_GTD)
    top_GT, denom_GT = (torch.empty(q_GTD.shape[:2], dtype=torch.float32, device=q_GTD.device) for _ in range(2))
    several = layout.n_rounds > 1
    total = torch.empty(v_GTD.shape, dtype=torch.float32, device=v_GTD.device) if several else out_GTD
    places, constants = _places(layout), _constants(q_GTD, layout)
    is_limited = torch.version.hip is None and q_GTD.dtype.itemsize == 2
    limits = {"maxnreg": FORWARD_REGISTERS} if is_limited else {}
    # Half as many of them spill a kilobyte and more of registers in fp32 (by the compiler's count for D = 128).
    n_warps = _warps(q_GTD, layout) * (2 if q_GTD.dtype.itemsize == 4 else 1)
    q, k, v, out, total = (_rows(x) for x in (q_GTD, q_GTD if k_GTD is None else k_GTD, v_GTD, out_GTD, total))
    for round_ in range(layout.n_rounds):
        kernels.forward_kernel[_grid(q_GTD, layout)](
            q, k, v, out, total, top_GT, denom_GT, key_scale_GT, places, round_,
            IS_FIRST=round_ == 0, IS_LAST=round_ == layout.n_rounds - 1, STAGES=FORWARD_STAGES,
            num_warps=n_warps, **constants, **limits,
        )  # fmt: skip
    return out_GTD, top_GT, denom_GT, key_scale_GT


def _backward(saved: tuple[Any, ...], d_out_GTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of q, k (None where it was not given) and v, from what the forward saved."""
    from reformer.lsh import triton_kernels as kernels

    q_GTD, k_GTD, v_GTD, out_GTD, top_GT, denom_GT, key_scale_GT = saved
    dq_GTD, dv_GTD = torch.empty_like(q_GTD), torch.empty_like(v_GTD)
    dk_GTD = None if k_GTD is None else torch.empty_like(k_GTD)
    several = layout.n_rounds > 1
    totals = [torch.empty(x.shape, dtype=torch.float32, device=x.device) if several else x for x in (dq_GTD, dv_GTD)]
    stats_GT4 = torch.empty(*q_GTD.shape[:2], 4, dtype=torch.float32, device=q_GTD.device)
    constants = _constants(q_GTD, layout)
    d_out = _rows(d_out_GTD)
    n_blocks = -(-layout.n_tokens // constants["BLOCK"])
    kernels.prepare_kernel[(n_blocks * len(q_GTD),)](
        _rows(out_GTD), d_out, top_GT, denom_GT, key_scale_GT, stats_GT4, layout.n_tokens,
        D=constants["D"], BLOCK_D=constants["BLOCK_D"], BLOCK=constants["BLOCK"],
    )  # fmt: skip
    q, k, v = (_rows(x) for x in (q_GTD, q_GTD if k_GTD is None else k_GTD, v_GTD))
    total_rows, result_rows = [_rows(x) for x in totals], [_rows(x) for x in (dq_GTD, dv_GTD)]
    dk_to = result_rows[0] if dk_GTD is None else _rows(dk_GTD)  # not written to where there is none
    places = _places(layout)
    for round_ in range(layout.n_rounds):
        dq_to, dv_to = result_rows if round_ == layout.n_rounds - 1 else total_rows
        kernels.backward_kernel[_grid(q_GTD, layout)](
            q, k, v, d_out, *total_rows, dq_to, dk_to, dv_to, stats_GT4, places, round_,
            IS_FIRST=round_ == 0, STAGES=BACKWARD_STAGES, num_warps=2 * _warps(q_GTD, layout), **constants,
        )  # fmt: skip
    return dq_GTD, dk_GTD, dv_GTD


def _places(layout: Layout) -> Any:
    """The layout as the kernels take it. Key mask and segments become one label: that of a masked key equals none."""
    from reformer.lsh.triton_kernels import Places

    order = layout.order_GRS.flatten(1)
    query_label = key_label = None if layout.segment_ids_GT is None else layout.segment_ids_GT.int().contiguous()
    if layout.key_mask_GT is not None:
        query_label = torch.zeros_like(layout.key_mask_GT, dtype=torch.int32) if query_label is None else query_label
        key_label = query_label.masked_fill(~layout.key_mask_GT, -1)
    return Places(
        order=order,
        order_stride=order.stride(0),
        inverse=layout.inverse_GRT.contiguous() if layout.duplicate_correction else None,
        query_label=query_label,
        key_label=key_label,
        buckets=None if layout.buckets_GRT is None else layout.buckets_GRT.int().contiguous(),
        dropout_keys=layout.dropout_keys_G.int() if layout.dropout and layout.dropout_keys_G is not None else None,
        keep_threshold=keep_threshold(layout.dropout),
        keep_scale=1 / (1 - layout.dropout),
        n_tokens=layout.n_tokens,
        n_chunks=layout.n_chunks,
        n_rounds=layout.n_rounds,
    )


def _constants(q_GTD: Tensor, layout: Layout) -> dict[str, Any]:
    """What the kernels are compiled for."""
    import triton
    import triton.language as tl

    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[q_GTD.dtype]
    before, after = layout.reach
    return {
        "D": q_GTD.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q_GTD.shape[-1])),
        "L": layout.chunk_len,
        "BLOCK": _block(q_GTD, layout),
        "BEFORE": before,
        "AFTER": after,
        "CAUSAL": layout.causal,
        "IS_LSH": layout.is_lsh,
        "DUPLICATE_ROUNDS": layout.n_rounds if layout.duplicate_correction else 0,
        # The interpreter works with numpy, which has no bfloat16.
        "OPERAND": tl.float32 if dtype is tl.bfloat16 and interpreting() else dtype,
    }


def _block(x_GTD: Tensor, layout: Layout) -> int:
    return min(layout.chunk_len, BLOCK[x_GTD.dtype.itemsize])


def _warps(x_GTD: Tensor, layout: Layout) -> int:
    """Of a forward in half precision: a block of 64 rows is what the tensor cores' four warps take at a time."""
    return max(1, _block(x_GTD, layout) * x_GTD.dtype.itemsize // 32)


def _grid(x_GTD: Tensor, layout: Layout) -> tuple[int]:
    """A program per block of places; neighbours run at the same time and find each other's rows in the cache."""
    return (len(x_GTD) * layout.n_places // _block(x_GTD, layout),)


def _rows(x_GTD: Tensor) -> Any:
    from reformer.lsh.triton_kernels import Rows

    return Rows(x_GTD, x_GTD.stride(0), x_GTD.stride(1))


def with_whole_rows(x_GTD: Tensor) -> Tensor:
    return x_GTD if x_GTD.stride(-1) == 1 else x_GTD.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
