"""Local attention: a token sees its own chunk of the sequence and the chunk before (and after, if not causal).

The same tiles as LSH attention with the identity as the sort order, one round, and separate queries and keys.
Below it stands its slow, obvious twin.
"""

import torch
from torch import Tensor

from reformer.arguments import check_heads, length, switch
from reformer.lsh.dispatch import Backend, attention_in_chunks
from reformer.lsh.dropout import check_dropout, keep_factor
from reformer.lsh.rounds import Layout, by_head, renumbered
from reformer.lsh.triton_attention import CHUNK_LENGTHS


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_len: int,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sliding-chunk attention [B, H, T, D] with scores q.k / sqrt(D); any T >= 1 (padded inside).

    key_padding_mask [B, T] is True at tokens that may be seen; a token that sees nothing gets its own value.
    segment_ids [B, T]: tokens of different segments do not see each other. Statistics are fp32 or better.
    In half precision q / sqrt(D) is rounded once more, unless sqrt(D) is a power of two.
    dropout: probability of dropping a probability after the softmax (the others are scaled by 1 / (1 - dropout)), that
    of the token itself too; dropout_keys: integers [B, H] in the range of int32 that decide which (dropout.py).

    backend: "triton" (fused kernels, on GPUs), "chunked" (any device), or "auto" as in `lsh_attention`.

    Raises ValueError for shapes and dtypes that do not fit, with what was expected; for dropout outside [0, 1), or
    without keys; for another backend, or one that cannot run.
    """
    if backend not in ("auto", "triton", "chunked"):
        raise ValueError(f"backend={backend!r}: choose 'auto', 'triton' or 'chunked'")
    check_heads({"q": q, "k": k, "v": v}, key_padding_mask, segment_ids)
    chunk_len, causal = length("chunk_len", chunk_len), switch("causal", causal)
    check_dropout(dropout, dropout_keys, q.shape[:2])
    batch, n_heads, n_tokens, d_head = q.shape
    groups = batch * n_heads
    chunk_len = min(chunk_len, _padded(n_tokens))  # one chunk of all tokens, without more padding
    places = torch.arange(n_tokens + -n_tokens % chunk_len, dtype=torch.int32, device=q.device)
    layout = Layout(
        order_GRS=places.expand(groups, 1, -1),
        inverse_GRT=places[:n_tokens].expand(groups, 1, -1),
        chunk_len=chunk_len,
        causal=causal,
        is_lsh=False,
        key_mask_GT=None if key_padding_mask is None else by_head(key_padding_mask.bool(), n_heads),
        segment_ids_GT=None if segment_ids is None else by_head(renumbered(segment_ids)[0], n_heads),
        dropout=dropout,
        dropout_keys_G=None if dropout_keys is None else dropout_keys.flatten().clone(),
    )
    scaled_q = q * d_head**-0.5
    return attention_in_chunks(scaled_q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout, backend).view_as(v)


def _padded(n_tokens: int) -> int:
    """A length for one chunk of all tokens: one that the fused kernel knows, or a multiple of 64."""
    return next((length for length in CHUNK_LENGTHS if length >= n_tokens), -(-n_tokens // 64) * 64)


def local_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunk_len: int,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """The same as one dense softmax under a [B, 1, T, T] mask: O(T^2), plain autograd."""
    check_dropout(dropout, dropout_keys, q.shape[:2])
    position = torch.arange(q.shape[2], device=q.device)
    chunk = position // chunk_len
    distance = chunk[:, None] - chunk[None, :]
    allowed = ((distance >= 0) if causal else (distance >= -1)) & (distance <= 1)
    if causal:
        allowed = allowed & (position[None, :] <= position[:, None])
    allowed = allowed[None, None]
    if key_padding_mask is not None:
        allowed = allowed & key_padding_mask.bool()[:, None, None, :]
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    alone = ~allowed.any(dim=-1, keepdim=True)
    allowed = allowed | (alone & (position[:, None] == position[None, :]))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    if dropout_keys is not None:
        key = dropout_keys[..., None, None]
        kept = keep_factor(key, 0, position[:, None], position, dropout, q.dtype)
        probabilities = probabilities * kept.masked_fill(alone, 1)
    return probabilities @ v
