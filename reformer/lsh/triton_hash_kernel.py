"""The kernel of `triton_hash`: projections, and the largest of both signs, in one pass for all rounds of a factor.

A program is a block of tokens of one head. Its vectors are read once; the directions of all rounds go by, a few at a
time, and of the projections nothing leaves the registers but the places of the highest and the lowest.

Products are exact, and on the tensor cores: an fp32 number is the sum of three bf16 numbers, one in fp16 that of two,
and a product of two bf16 numbers fits into fp32, in which sums are made. (Products of fp32 numbers have no tensor
cores, and code for them spilled kilobytes of registers, by the compiler's count.)

Axes: N tokens of a block, D head dim, F directions that are looked at together.
"""

import triton
import triton.language as tl


@triton.jit
def _high(x):
    """fp32 numbers without what bf16 has no bits for."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _projected(
    high_ND, middle_ND, low_ND, directions, part_stride, row_stride, n_left,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """x times the next directions, [N, F], both the sums of parts; zeros where no direction is left.

    The smallest products come first: tensor cores may cut off what they add to a larger sum, where fp32 would round.
    """
    row, column = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, COLUMNS)[None, :]
    exists = (row < D) & (column < n_left)
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for larger in tl.static_range(3):
        start = directions + (2 - larger) * part_stride
        part_DF = tl.load(start + row * row_stride + column, mask=exists, other=0.0).to(OPERAND)
        if PARTS > 2:
            sums = tl.dot(low_ND, part_DF, sums, input_precision="ieee")
        if PARTS > 1:
            sums = tl.dot(middle_ND, part_DF, sums, input_precision="ieee")
        sums = tl.dot(high_ND, part_DF, sums, input_precision="ieee")
    return sums


@triton.jit
def hash_kernel(
    x, batch_stride, head_stride, row_stride, directions, part_stride, buckets, n_heads, n_tokens, n_rounds,
    n_directions, first, half, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    OPERAND: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """buckets [B, H, R, T] of x [B, H, T, D], whose rows are contiguous, by directions [3, H, D, R, F].

    Of the F = n_directions of a round this factor has `half`, from `first` on; its digit counts `stride` times. Unless
    IS_FIRST, it is added to what the factors before it found. PARTS: bf16 numbers that a number of x is the sum of.
    """
    n_blocks = tl.cdiv(n_tokens, BLOCK)
    group, block = (tl.program_id(0) // n_blocks).to(tl.int64), tl.program_id(0) % n_blocks
    head = group % n_heads
    token, column = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    rows = x + group // n_heads * batch_stride + head * head_stride + token.to(tl.int64)[:, None] * row_stride
    exists = token < n_tokens
    x_ND = tl.load(rows + column[None, :], mask=exists[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    high_ND = _high(x_ND)
    middle_ND = _high(x_ND - high_ND)
    low_ND = (x_ND - high_ND - middle_ND).to(OPERAND)
    high_ND, middle_ND = high_ND.to(OPERAND), middle_ND.to(OPERAND)
    row_of_directions = n_rounds * n_directions
    of_head = directions + head * D * row_of_directions + first
    for round_ in range(n_rounds):
        highest, lowest = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
        highest_at, lowest_at = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        for seen in range(0, half, COLUMNS):
            some = of_head + round_ * n_directions + seen
            projected = _projected(
                high_ND, middle_ND, low_ND, some, part_stride, row_of_directions, half - seen,
                D, BLOCK_D, BLOCK, COLUMNS, PARTS, OPERAND,
            )  # fmt: skip
            is_one = (tl.arange(0, COLUMNS) < half - seen)[None, :]
            top, top_at = tl.max(tl.where(is_one, projected, float("-inf")), 1, return_indices=True)
            bottom, bottom_at = tl.min(tl.where(is_one, projected, float("inf")), 1, return_indices=True)
            # Strictly: of equals the first counts.
            highest_at = tl.where(top > highest, seen + top_at, highest_at)
            lowest_at = tl.where(bottom < lowest, seen + bottom_at, lowest_at)
            highest, lowest = tl.maximum(highest, top), tl.minimum(lowest, bottom)
        digit = tl.where(-lowest > highest, half + lowest_at, highest_at)
        to = buckets + (group * n_rounds + round_) * n_tokens + token
        bucket = digit * stride
        if not IS_FIRST:
            bucket += tl.load(to, mask=exists, other=0).to(tl.int32)
        tl.store(to, bucket.to(buckets.dtype.element_ty), mask=exists)
