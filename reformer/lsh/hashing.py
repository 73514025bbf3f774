"""From vectors to buckets, and from buckets to the sorted order that LSH attention works in.

Angular LSH of the Reformer paper (section 2): a random rotation R, bucket = argmax([xR; -xR]). Everything here is
a pure function; the randomness is a tensor of rotations that the caller passes in, drawn by `draw_rotations` from
(seed, step, layer, round), so that it never depends on the device, the rank or the global random state.

Axes: B batch, H heads, T tokens, D head dim, R hash rounds, F half the hash width, C chunks, L chunk length.
"""

import hashlib
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer.arguments import length

# Unfactorised hashing costs T * D * n_buckets / 2 products and n_buckets grows with T: beyond this many
# buckets it would be quadratic, so the default number is split into two factors.
MAX_UNFACTORISED = 128

MAX_BUCKETS = 2**24
"""Their numbers are added up in fp32."""
HASH_TOKENS = 1024
"""Tokens that are hashed at a time on a CPU, so that their projections stay in cache."""
RADIX_TOKENS = 2**15
"""Rows of so many tokens are sorted one by one on a CPU: torch's radix sort, for which they have to be as long, is 4 to
6 times as fast as its sort along a dimension. For shorter rows that takes half the time, for 64 tokens an eighth
(measured)."""
HASH_NUMBERS_GPU = 2**26
"""Projections that exist at a time on a GPU, where so few tokens at a time took eight times as long (measured)."""


def default_buckets(n_tokens: int, chunk_len: int) -> tuple[int, ...]:
    """Factors of the default number of buckets, 2 * T / chunk_len (the paper's chunk length m = 2 T / n_buckets).

    Above MAX_UNFACTORISED buckets: two powers of two whose product is the nearest power of two.
    """
    n_buckets = 2 * math.ceil(n_tokens / chunk_len)
    if n_buckets <= MAX_UNFACTORISED:
        return (n_buckets,)
    power = round(math.log2(n_buckets))
    return (2 ** (power // 2), 2 ** (power - power // 2))


def bucket_factors(n_buckets: int | Sequence[int] | None, n_tokens: int, chunk_len: int) -> tuple[int, ...]:
    """The even factors of the number of buckets.

    Raises ValueError for an odd or non-positive factor, and for more than MAX_BUCKETS.
    """
    if n_buckets is None:
        return default_buckets(n_tokens, chunk_len)
    given = tuple(n_buckets) if isinstance(n_buckets, Sequence) else (n_buckets,)
    try:
        factors = tuple(length("n_buckets", factor) for factor in given)
    except ValueError:
        factors = ()
    if not factors or any(factor % 2 for factor in factors):
        raise ValueError(f"n_buckets={n_buckets!r}: each factor must be even and at least 2, and an int")
    if math.prod(factors) > MAX_BUCKETS:
        raise ValueError(f"n_buckets={n_buckets}: there can be up to {MAX_BUCKETS:,} buckets")
    return factors


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers: different tuples give unrelated seeds, the same on every platform.

    Raises TypeError for what is no integer; NumPy's and tensors of one are taken as the number that they are.
    """
    integers = tuple(operator.index(part) for part in parts)
    digest = hashlib.blake2b(repr(integers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_rotations(
    n_heads: int, d_head: int, n_hashes: int, factors: tuple[int, ...], seed: int, step: int, layer: int
) -> Tensor:
    """Random rotations [H, D, R, F] ~ N(0, 1), fp32 on the CPU, F = sum(factors) / 2.

    Round r of (seed, step, layer) is the same whatever the number of rounds, and head h is its h-th slice, so
    that evaluation may use more rounds than training and a rank may compute with some of the heads only.
    """
    rounds = [
        torch.randn(
            n_heads,
            d_head,
            sum(factors) // 2,
            generator=torch.Generator().manual_seed(derive_seed(seed, step, layer, round_)),
            dtype=torch.float32,
            device="cpu",  # whatever torch.set_default_device says: generator and numbers go together
        )
        for round_ in range(n_hashes)
    ]
    return torch.stack(rounds, dim=2)


def hash_to_buckets(qk_BHTD: Tensor, rotations_HDRF: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Buckets [B, H, R, T] (int16, or int32 above 32,768 buckets) of the vectors qk [B, H, T, D].

    With factors (f1, f2, …) the columns of the rotation are split into f_i / 2 each, every part is hashed by
    argmax([xR; -xR]), and bucket = b1 + f1 * (b2 + f2 * …). Half precision inputs are hashed in fp32.
    """
    return hash_by_directions(qk_BHTD, as_directions(rotations_HDRF, factors, qk_BHTD), factors)


def as_directions(rotations_HDRF: Tensor, factors: tuple[int, ...], qk: Tensor) -> Tensor:
    """Rotations as `hash_by_directions` takes them for vectors like qk: [H, N, D] where qk is, in fp32 or better.

    All rounds in one product, the directions of a factor together, N = R*f1/2 + R*f2/2 + …, and tokens last: maxima
    over the directions then go by whole vectors of tokens (up to a third of the time less, measured).
    """
    dtype = torch.promote_types(qk.dtype, torch.float32)
    parts = to_device(rotations_HDRF, qk.device).to(dtype).split([factor // 2 for factor in factors], dim=-1)
    return torch.cat([part.flatten(2) for part in parts], dim=-1).mT.contiguous()


def hash_by_directions(qk_BHTD: Tensor, directions_HND: Tensor, factors: tuple[int, ...]) -> Tensor:
    """`hash_to_buckets`, for whoever hashes by the same rotations again and again."""
    dtype = directions_HND.dtype
    batch, n_heads, n_tokens = qk_BHTD.shape[:3]
    halves = [factor // 2 for factor in factors]
    n_hashes = directions_HND.shape[1] // sum(halves)
    buckets = torch.empty(batch, n_heads, n_hashes, n_tokens, dtype=bucket_dtype(factors), device=qk_BHTD.device)
    at_once = HASH_TOKENS
    if qk_BHTD.device.type != "cpu":
        at_once = max(HASH_TOKENS, HASH_NUMBERS_GPU // (batch * n_heads * directions_HND.shape[1]))
    for start in range(0, n_tokens, at_once):
        x_BHtD = qk_BHTD[:, :, start : start + at_once].detach().to(dtype)
        projected = torch.matmul(directions_HND, x_BHtD.mT).split([n_hashes * half for half in halves], dim=-2)
        bucket_BHRt, stride = torch.zeros((), dtype=dtype, device=qk_BHTD.device), 1
        for part, half in zip(projected, halves, strict=True):
            bucket_BHRt = bucket_BHRt + stride * _argmax_of_both_signs(part.unflatten(-2, (n_hashes, half)))
            stride *= 2 * half
        buckets[..., start : start + at_once] = bucket_BHRt
    return buckets


def bucket_dtype(factors: tuple[int, ...]) -> torch.dtype:
    """int16, or int32 above 32,768 buckets."""
    return torch.int16 if math.prod(factors) <= 2**15 else torch.int32


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn, where it is used, without the host waiting for a GPU: from pageable memory it would."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def _argmax_of_both_signs(x_Ft: Tensor) -> Tensor:
    """argmax([x; -x]) over the directions of [..., F, t], the first of equals, as floating-point numbers [..., t].

    By vectorised maxima: torch's argmax takes ten times as long on a CPU (measured).
    """
    n = x_Ft.shape[-2]
    highest, lowest = x_Ft.amax(dim=-2, keepdim=True), x_Ft.amin(dim=-2, keepdim=True)
    is_negative = -lowest > highest
    is_extreme = torch.eq(x_Ft, torch.where(is_negative, lowest, highest), out=torch.empty_like(x_Ft))
    countdown = torch.arange(n, 0, -1, dtype=x_Ft.dtype, device=x_Ft.device)
    first = n - is_extreme.mul_(countdown[:, None]).amax(dim=-2).clamp_(min=1)  # NaN equals nothing
    return first.add_(is_negative.squeeze(-2), alpha=n)


def sort_labels(
    buckets_BHRT: Tensor, segments_BT: Tensor | None, n_segments: int, key_padding_mask_BT: Tensor | None
) -> Tensor:
    """Numbers [B, H, R, T] in the order of (padding, segment, bucket), by which tokens are sorted.

    So the chunks of a document hold hardly any other tokens than its own, however many documents share the row, and
    padding takes no place among what it pads. Without segments and padding these are the buckets themselves.

    segments_BT, n_segments: numbered from 0 on, and how many; see `rounds.renumbered`.
    """
    if segments_BT is None and key_padding_mask_BT is None:
        return buckets_BHRT
    if segments_BT is None:
        segments_BT, n_segments = torch.zeros_like(buckets_BHRT[:, 0, 0], dtype=torch.int64), 1
    if key_padding_mask_BT is not None:
        segments_BT = segments_BT + ~key_padding_mask_BT.bool() * n_segments
        n_segments *= 2
    if buckets_BHRT.dtype not in (torch.int16, torch.int32):  # of the caller's own, of any size
        buckets_BHRT = torch.unique(buckets_BHRT, return_inverse=True)[1]
    least, most = _bounds(buckets_BHRT)
    n_buckets = most - least + 1
    dtype = torch.int32 if n_segments * n_buckets < 2**31 else torch.int64  # the narrower, the faster they are sorted
    return segments_BT.to(dtype)[:, None, None] * n_buckets + (buckets_BHRT.to(dtype) - least)


def _bounds(buckets: Tensor) -> tuple[int, int]:
    """Numbers that buckets lie between. On a GPU, which the host would wait for, those of a short type."""
    if buckets.device.type != "cpu" and buckets.dtype == torch.int16:
        return -(2**15), 2**15 - 1
    least, most = buckets.aminmax()
    return int(least), int(most)


def sort_by_bucket(buckets_GRT: Tensor, chunk_len: int) -> tuple[Tensor, Tensor]:
    """The order of the tokens by (bucket, position) in each round, and its inverse; or by `sort_labels` for buckets.

    Returns order [G, R, C*L] int32, the token at each sorted place, with values of T and above at the padding
    that fills a round up to whole chunks; and inverse [G, R, T] int32, the sorted place of each token.
    """
    n_tokens = buckets_GRT.shape[-1]
    padding = -n_tokens % chunk_len
    order = stable_order(buckets_GRT).to(torch.int32)
    places = torch.arange(n_tokens, dtype=torch.int32, device=order.device).expand_as(order)
    inverse = torch.empty_like(order).scatter_(-1, order.long(), places)
    if padding:
        tail = torch.arange(n_tokens, n_tokens + padding, dtype=torch.int32, device=order.device)
        order = torch.cat([order, tail.expand(*order.shape[:-1], padding)], dim=-1)
    return order, inverse


def stable_order(buckets_GRT: Tensor) -> Tensor:
    """Indices, int64, that sort the last dimension, equal buckets by position."""
    if buckets_GRT.device.type != "cpu" or buckets_GRT.shape[-1] < RADIX_TOKENS:
        return torch.sort(buckets_GRT, dim=-1, stable=True).indices
    rows = [torch.sort(row, stable=True).indices for row in buckets_GRT.reshape(-1, buckets_GRT.shape[-1])]
    return torch.stack(rows).view(buckets_GRT.shape)
