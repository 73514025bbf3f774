"""The entry point of LSH attention: checks the arguments, hashes if no buckets are given, chooses the path.

Local attention picks its path here too (`attention_in_chunks`). Which path runs, and why, is logged once per process
for every distinct reason (logger "reformer.lsh", level INFO).
"""

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from reformer.arguments import check_heads, check_is_tensor, length, switch
from reformer.dense import dense_attention
from reformer.lsh.chunked import chunked_attention
from reformer.lsh.counts import Counts
from reformer.lsh.dropout import check_dropout
from reformer.lsh.hashing import bucket_factors, hash_to_buckets, sort_by_bucket, sort_labels
from reformer.lsh.reference import lsh_attention_reference
from reformer.lsh.rounds import Layout, by_head, renumbered
from reformer.lsh.triton_attention import triton_attention, why_no_kernel, why_not
from reformer.lsh.triton_hashing import triton_hash

Backend = Literal["auto", "triton", "chunked", "dense", "reference"]

log = logging.getLogger("reformer.lsh")


def lsh_attention(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor | None = None,
    *,
    n_hashes: int,
    chunk_len: int,
    n_buckets: int | Sequence[int] | None = None,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    attend_across_buckets: bool = True,
    duplicate_correction: bool = False,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    rotations: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Multi-round LSH attention with shared queries and keys (Kitaev et al., ICLR 2020, section 2).

    Per round, tokens are sorted by (segment, bucket, position), padding last, and cut into chunks; a chunk sees itself
    and the one before (and the one after when not causal), cyclically over all rounds. Keys are qk / ||qk||, scores
    q.k; a token sees itself only if it sees nothing else. Rounds combine by exp(lse_round - lse_total).

    Args:
        qk: shared queries and keys [B, H, T, D], floating point; any T >= 1 (padded inside).
        v: values [B, H, T, D].
        buckets: integer [B, H, n_hashes, T], used as they are: nothing is hashed. None: hash qk.
        n_hashes: rounds R.
        chunk_len: tokens per chunk of the sorted sequence.
        n_buckets: a number, its even factors, or None for about 2 * T / chunk_len.
        causal: whether a token sees only what stands before it in the original order. Which of these its chunk shows
            it depends on where all tokens are sorted to, those after it too.
        key_padding_mask: booleans or integers [B, T], True (non-zero) at tokens that may be seen, False at padding:
            the reverse of nn.MultiheadAttention's.
        segment_ids: integer [B, T]; tokens of different segments do not see each other.
        attend_across_buckets: see all of the visible chunks, or the own bucket of the round only (eq. 4).
        duplicate_correction: subtract log N_ij, N_ij the number of times that the rounds find key j (eq. 16), so
            that the rounds together are one softmax over the union of what they reach.
        dropout: probability of dropping a weight. Each round's probabilities are dropped after its softmax, the rest
            scaled by 1 / (1 - dropout); the own value of a token that sees nothing but itself is never dropped.
        dropout_keys: integers [B, H] in the range of int32, needed with dropout: what is dropped is a function of
            them, the round and the two positions (dropout.py).
        rotations: N(0, 1) [H, D, n_hashes, sum(factors) / 2]; None draws from torch's global generator.
        backend: "triton" (fused kernels, on GPUs), "chunked" (any device), "dense" (any device, O(T^2),
            where that is the same function: see `why_not_dense`), "reference" (O(T^2), the oracle), or "auto": on a
            GPU triton where it can run; on a CPU dense where it is the same and less work; else chunked.

    Returns:
        The output [B, H, T, D] in v's dtype and the buckets [B, H, n_hashes, T] that were used. Buckets carry no
        gradient. Statistics are fp32 for half-precision inputs. Second and forward derivatives and torch.func
        (not vmap) are for backend="reference" alone: elsewhere a backward with create_graph=True raises RuntimeError.

    Raises:
        ValueError: a shape, dtype or option that does not fit, with what was expected; a path that cannot run.
    """
    n_hashes, chunk_len = length("n_hashes", n_hashes), length("chunk_len", chunk_len)
    causal = switch("causal", causal)
    attend_across_buckets = switch("attend_across_buckets", attend_across_buckets)
    duplicate_correction = switch("duplicate_correction", duplicate_correction)
    _check_tensors(qk, v, buckets, n_hashes, key_padding_mask, segment_ids)
    check_dropout(dropout, dropout_keys, qk.shape[:2])
    if backend not in ("auto", "triton", "chunked", "dense", "reference"):
        raise ValueError(f"backend={backend!r}: choose 'auto', 'triton', 'chunked', 'dense' or 'reference'")
    n_heads, n_tokens, _ = qk.shape[1:]
    if buckets is None:
        buckets = _hashed(qk, n_hashes, bucket_factors(n_buckets, n_tokens, chunk_len), rotations, backend)
    if backend == "reference":
        _announce("LSH", backend, "it was asked for")
        with torch.autocast(qk.device.type, enabled=False):
            out = lsh_attention_reference(
                qk,
                v,
                buckets,
                chunk_len=chunk_len,
                causal=causal,
                key_padding_mask_BT=key_padding_mask,
                segment_ids_BT=segment_ids,
                attend_across_buckets=attend_across_buckets,
                duplicate_correction=duplicate_correction,
                dropout=dropout,
                dropout_keys=dropout_keys,
            )
        return out, buckets
    segments, n_segments = (None, 0) if segment_ids is None else renumbered(segment_ids)
    labels_GRT = sort_labels(buckets, segments, n_segments, key_padding_mask).flatten(0, 1)
    if _takes_dense(backend, qk, n_hashes, chunk_len, causal, attend_across_buckets, dropout):
        is_one_chunk = n_tokens <= chunk_len  # each round shows all tokens, and equally often
        out = dense_attention(
            qk,
            v,
            causal=causal,
            key_padding_mask=key_padding_mask,
            segment_ids=segment_ids,
            counts=None if is_one_chunk else Counts.of(labels_GRT, chunk_len, causal, duplicate_correction),
        )
        return out, buckets
    order, inverse = sort_by_bucket(labels_GRT, chunk_len)
    layout = Layout(
        order,
        inverse,
        chunk_len,
        causal,
        is_lsh=True,
        key_mask_GT=None if key_padding_mask is None else by_head(key_padding_mask.bool(), n_heads),
        segment_ids_GT=None if segments is None else by_head(segments, n_heads),
        buckets_GRT=None if attend_across_buckets else renumbered(buckets.flatten(0, 1))[0],
        duplicate_correction=duplicate_correction,
        dropout=dropout,
        dropout_keys_G=None if dropout_keys is None else dropout_keys.flatten().clone(),
    )
    out = attention_in_chunks(qk.flatten(0, 1), None, v.flatten(0, 1), layout, backend)
    return out.view_as(v), buckets


@torch.no_grad()
def _hashed(qk: Tensor, n_hashes: int, factors: tuple[int, ...], rotations: Tensor | None, backend: Backend) -> Tensor:
    """The buckets [B, H, R, T] of qk, by the given rotations or new ones.

    By the fused kernel where that of attention would be taken, whatever the length of its chunks.
    """
    shape = (qk.shape[1], qk.shape[3], n_hashes, sum(factors) // 2)
    if rotations is None:
        rotations = torch.randn(shape, device=qk.device, dtype=torch.float32)
    check_is_tensor(rotations, "rotations", "floating-point numbers")
    if rotations.shape != shape:
        raise ValueError(f"rotations must be {list(shape)} = [H, D, R, F], got {list(rotations.shape)}")
    with torch.autocast(qk.device.type, enabled=False):  # rounded products would change buckets
        may_be_fused = backend == "triton" or (backend == "auto" and qk.device.type == "cuda")
        hashed = triton_hash if may_be_fused and not why_no_kernel(qk) else hash_to_buckets
        return hashed(qk, rotations, factors)


def _takes_dense(
    backend: Backend,
    qk: Tensor,
    n_hashes: int,
    chunk_len: int,
    causal: bool,
    attend_across_buckets: bool,
    dropout: float,
) -> bool:
    """Whether all rounds are computed as one dense softmax whose keys count as often as they are found (counts.py).

    That is the same function unless each round has a mask or a dropout of its own. On a CPU it is taken where it is
    less work (`dense_is_less`), and no row is gathered.
    Raises ValueError for backend="dense" where it is another function.
    """
    reason = why_not_dense(attend_across_buckets, dropout)
    if backend == "dense":
        if reason:
            raise ValueError(f"backend='dense' cannot run: {reason}; choose 'auto' or 'chunked'")
        _announce("LSH", "dense", "it was asked for")
        return True
    if backend != "auto" or qk.device.type != "cpu" or reason:
        return False
    if not dense_is_less(qk.shape[2], qk.shape[3], n_hashes, chunk_len, causal):
        return False
    _announce("LSH", "dense", f"of so few tokens the same {n_hashes} rounds are less work in one softmax over all")
    return True


def dense_is_less(n_tokens: int, d_head: int, n_hashes: int, chunk_len: int, causal: bool) -> bool:
    """Whether one dense softmax with counts has fewer products than the rounds, and no more keys.

    Forward and backward have 7 products of width D for a pair, and the counts 2 whose width is that of all chunks;
    of the pairs a causal mask leaves half. (Blocks compute more of them, which costs less than gathering does.)
    """
    n_keys = n_hashes * (2 if causal else 3) * chunk_len
    n_chunks = n_hashes * -(-n_tokens // chunk_len)
    n_pairs = n_tokens / 2 if causal else n_tokens
    return n_tokens <= n_keys and n_pairs * (7 * d_head + 2 * n_chunks) <= n_keys * 7 * d_head


def why_not_dense(attend_across_buckets: bool, dropout: float) -> str | None:
    """Why the rounds are not one dense softmax whose keys count as often as they are found; None where they are."""
    if not attend_across_buckets:
        return "with attend_across_buckets=False each round has its own mask"
    if dropout:
        return "each round drops weights of its own"
    return None


def attention_in_chunks(
    q_GTD: Tensor, k_GTD: Tensor | None, v_GTD: Tensor, layout: Layout, backend: Backend = "auto"
) -> Tensor:
    """The output [G, T, D] under `layout`, by the path that was asked for or, "auto", the fused one if it can run.

    Raises ValueError for backend="triton" where it cannot run, with the reason.
    """
    kind = "LSH" if layout.is_lsh else "local"
    if backend == "chunked":
        _announce(kind, backend, "it was asked for")
        return chunked_attention(q_GTD, k_GTD, v_GTD, layout)
    if backend == "auto" and q_GTD.device.type != "cuda":  # not even where Triton's interpreter could
        reason: str | None = f"the tensors are on the {q_GTD.device.type.upper()}"
    else:
        reason = why_not(q_GTD, k_GTD, layout)
    if reason and backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {reason}; choose 'auto' or 'chunked'")
    if reason:
        _announce(kind, "chunked", reason)
        return chunked_attention(q_GTD, k_GTD, v_GTD, layout)
    _announce(kind, "triton", f"the tensors are on the {q_GTD.device.type.upper()}")
    return triton_attention(q_GTD, k_GTD, v_GTD, layout)


@functools.cache
def _announce(kind: str, path: str, reason: str) -> None:
    log.info("%s attention runs as '%s': %s", kind, path, reason)


def _check_tensors(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor | None,
    n_hashes: int,
    key_padding_mask: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    check_heads({"qk": qk, "v": v}, key_padding_mask, segment_ids)
    batch, n_heads, n_tokens, _ = qk.shape
    if buckets is not None:
        check_is_tensor(buckets, "buckets")
        shape = [batch, n_heads, n_hashes, n_tokens]
        if list(buckets.shape) != shape or buckets.is_floating_point() or buckets.dtype == torch.bool:
            raise ValueError(
                f"buckets must be integers {shape} = [B, H, R, T], got {buckets.dtype} {list(buckets.shape)}"
            )
