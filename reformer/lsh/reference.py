"""LSH attention by its definition: O(T^2), one dense mask of multiplicities per round, plain autograd.

This is the oracle that every fast path is compared with, in outputs and gradients. It knows nothing of tiles, running
maxima or saved statistics, and computes in float64 whatever it is given. `count_RTT` says how often query i reaches key
j in round r:

    chunk g of the R*C chunks (rounds one behind the other) sees itself and chunk g-1, and g+1 when bidirectional,
    cyclically, so that the first chunk of a round sees the last chunk of the round before it.

Dropout acts on the probabilities of each round, after its softmax, as in the authors' and Hugging Face's code:
out_r,i = sum_j P_r,ij m_r,ij v_j with m = `keep_factor`. Two occurrences of a key in a round are dropped together. The
weight of a token with itself, which matters only where it is the only one in every round, is never dropped.

Axes: B batch, H heads, T tokens, D head dim, R hash rounds, C chunks, L chunk length.
"""

import torch
from torch import Tensor

from reformer.lsh.dropout import check_dropout, keep_factor
from reformer.lsh.hashing import sort_by_bucket

SELF_PENALTY = -1e5
"""A token's score with itself: finite, so that a token with no other target attends to itself."""


def reach_counts(
    buckets_RT: Tensor,
    chunk_len: int,
    *,
    causal: bool,
    attend_across_buckets: bool,
    labels_RT: Tensor | None = None,
) -> Tensor:
    """How often query i finds key j within the chunks that it sees, [R, T, T], for one head, before any mask.

    With attend_across_buckets=False only keys of the same round and bucket count (the paper's eq. 4).

    labels_RT: what tokens are sorted by, if not their buckets; see `lexicographic`.
    """
    n_hashes, n_tokens = buckets_RT.shape
    _, inverse = sort_by_bucket((buckets_RT if labels_RT is None else labels_RT)[None], chunk_len)
    chunks_per_round = -(-n_tokens // chunk_len)
    n_chunks = n_hashes * chunks_per_round
    rounds = torch.arange(n_hashes, device=buckets_RT.device)
    chunk_RT = rounds[:, None] * chunks_per_round + inverse[0].long() // chunk_len
    visible = {offset % n_chunks for offset in ((0, -1) if causal else (0, -1, 1))}
    counts = torch.zeros(n_hashes, n_tokens, n_tokens, dtype=torch.int64, device=buckets_RT.device)
    for query_round in range(n_hashes):
        for key_round in range(n_hashes):
            offset = (chunk_RT[key_round][None, :] - chunk_RT[query_round][:, None]) % n_chunks
            seen = torch.stack([offset == reach for reach in visible]).any(dim=0)
            if not attend_across_buckets:
                same = buckets_RT[query_round][:, None] == buckets_RT[key_round][None, :]
                seen &= same & (query_round == key_round)
            counts[query_round] += seen
    return counts


def lexicographic(is_padding_T: Tensor, segment_ids_T: Tensor, buckets_RT: Tensor) -> Tensor:
    """Numbers [R, T] in the order of (padding, segment, bucket)."""
    columns = [is_padding_T.expand_as(buckets_RT), segment_ids_T.expand_as(buckets_RT), buckets_RT]
    keys_3N = torch.stack([column.long().flatten() for column in columns])
    return torch.unique(keys_3N, dim=1, return_inverse=True)[1].view_as(buckets_RT)


def lsh_attention_reference(
    qk_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    chunk_len: int,
    causal: bool = True,
    key_padding_mask_BT: Tensor | None = None,
    segment_ids_BT: Tensor | None = None,
    attend_across_buckets: bool = True,
    duplicate_correction: bool = False,
    dropout: float = 0.0,
    dropout_keys: Tensor | None = None,
) -> Tensor:
    """Output [B, H, T, D] of multi-round LSH attention with the given buckets; see `reformer.lsh_attention`.

    In the dtype of v, of sums in float64.
    """
    dtype, n_tokens = v_BHTD.dtype, qk_BHTD.shape[2]
    qk_BHTD, v_BHTD = qk_BHTD.double(), v_BHTD.double()
    check_dropout(dropout, dropout_keys, qk_BHTD.shape[:2])
    norm_BHT1 = qk_BHTD.norm(dim=-1, keepdim=True)
    # The key of a zero vector is zero, without gradient; divided by a tiny number its gradient would be a huge one.
    k_BHTD = qk_BHTD / norm_BHT1.masked_fill(norm_BHT1 == 0, torch.inf)
    position = torch.arange(n_tokens, device=qk_BHTD.device)
    is_self = position[:, None] == position[None, :]
    outputs = []
    for b in range(qk_BHTD.shape[0]):
        allowed = torch.ones_like(is_self)
        if causal:
            allowed &= position[None, :] <= position[:, None]
        if key_padding_mask_BT is not None:
            allowed &= key_padding_mask_BT[b].bool()[None, :]
        if segment_ids_BT is not None:
            allowed &= segment_ids_BT[b][:, None] == segment_ids_BT[b][None, :]
        allowed |= is_self
        no_T = torch.zeros_like(position)
        is_padding_T = no_T if key_padding_mask_BT is None else ~key_padding_mask_BT[b].bool()
        segment_T = no_T if segment_ids_BT is None else segment_ids_BT[b]
        for h in range(qk_BHTD.shape[1]):
            scores = (qk_BHTD[b, h] @ k_BHTD[b, h].T).masked_fill(is_self, SELF_PENALTY)
            counts = reach_counts(
                buckets_BHRT[b, h],
                chunk_len,
                causal=causal,
                attend_across_buckets=attend_across_buckets,
                labels_RT=lexicographic(is_padding_T, segment_T, buckets_BHRT[b, h]),
            )
            kept = None if dropout_keys is None else _keep_factors(dropout_keys[b, h], dropout, counts, scores.dtype)
            outputs.append(_combine_rounds(scores, counts * allowed, v_BHTD[b, h], duplicate_correction, kept))
    return torch.stack(outputs).view_as(v_BHTD).to(dtype)


def _keep_factors(key: Tensor, dropout: float, like_RTT: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors [R, T, T] of one head's probabilities; 1 on the diagonal."""
    position = torch.arange(like_RTT.shape[-1], device=like_RTT.device)
    rounds = [keep_factor(key, r, position[:, None], position, dropout, dtype) for r in range(len(like_RTT))]
    return torch.stack(rounds).masked_fill(position[:, None] == position, 1)


def _combine_rounds(
    scores: Tensor, counts_RTT: Tensor, v_TD: Tensor, duplicate_correction: bool, kept_RTT: Tensor | None
) -> Tensor:
    """One softmax per round over the keys that it reaches, rounds weighted by exp(lse_round - lse_total)."""
    if duplicate_correction:
        scores = scores - counts_RTT.sum(dim=0).clamp(min=1).to(scores.dtype).log()
    weighted = scores + counts_RTT.to(scores.dtype).log()  # -inf where a key is not reached
    lse_RT = weighted.logsumexp(dim=-1)
    probabilities = weighted.softmax(dim=-1)
    out_RTD = (probabilities if kept_RTT is None else probabilities * kept_RTT) @ v_TD
    return ((lse_RT - lse_RT.logsumexp(dim=0)).exp()[..., None] * out_RTD).sum(dim=0)
