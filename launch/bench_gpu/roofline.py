"""What the fused attention has to move and to compute, and how fast a GPU could: arithmetic without one.

"Must move" counts what no schedule of these kernels avoids: in every round the rows of q and v (and d_out) once, in
that round's order, and every result once. The running sums in fp32 between the rounds come on top of it: the kernels
move `moved`, and the share of the roofline is that of `must_move`.
"""

from dataclasses import dataclass

from trainer.peaks import PEAKS


def peaks_of(device_name: str) -> tuple[float, float] | None:
    """Bytes and bf16 operations per second at the peak (trainer/peaks.py); None for a device that is not listed."""
    peaks = PEAKS.get(device_name)
    return (peaks.bytes_per_s, peaks.bf16) if peaks and peaks.bf16 else None


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one call."""

    must_move: float
    moved: float
    operations: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.must_move + other.must_move, self.moved + other.moved, self.operations + other.operations)

    def roofline_s(self, peaks: tuple[float, float]) -> float:
        """The least time that memory or tensor cores allow."""
        return max(self.must_move / peaks[0], self.operations / peaks[1])


def forward_work(n_tokens: int, n_heads: int, d_head: int, n_hashes: int, chunk_len: int, itemsize: int) -> Work:
    """Causal LSH attention of one sequence: a token sees two chunks."""
    rows, width = n_tokens * n_heads, d_head * itemsize
    must_move = rows * (n_hashes * (2 * width + 4) + width)
    between_rounds = 2 * (n_hashes - 1) * rows * (4 * d_head + 8)
    return Work(must_move, must_move + between_rounds, rows * n_hashes * 2 * chunk_len * d_head * 2 * 2)


def backward_work(n_tokens: int, n_heads: int, d_head: int, n_hashes: int, chunk_len: int, itemsize: int) -> Work:
    """The same for the backward: q, v, d_out and four statistics in every round; out, d_out before; dq, dv after.

    Seven products of a chunk with a chunk: three as queries, four as keys.
    """
    rows, width = n_tokens * n_heads, d_head * itemsize
    must_move = rows * (n_hashes * (3 * width + 4 + 16) + 4 * width + 16)
    between_rounds = 2 * (n_hashes - 1) * rows * 2 * 4 * d_head
    return Work(must_move, must_move + between_rounds, rows * n_hashes * 2 * chunk_len * d_head * 2 * 7)
