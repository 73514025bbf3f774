"""How well LSH attention works in a model: are its buckets even, how much of dense attention do they recover, what
is a model without it, and how exactly does the reversible stack give its inputs back.

Nothing is kept on the model. `observed` puts a wrapper around the attention of each LSH layer for as long as a `with`
statement lasts, so that what is reported is what really ran, in no pass of its own; `ablated` puts nothing in the place
of the inner attention, the seam that oracles and kernels use too. Dense attention is computed for a sample of queries
only: O(samples * T * D) a head instead of O(T^2 * D).

Axes: B batch, H heads, R hash rounds, T tokens, D head dim, S sampled queries, L chunk length, C chunks of one round,
M model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from reformer.attention import LSHSelfAttention
from reformer.call import Call
from reformer.lsh.hashing import bucket_factors, derive_seed, sort_by_bucket, sort_labels
from reformer.lsh.rounds import renumbered
from reformer.model import Reformer
from reformer.reversible import ReversibleBlock

SAMPLED_QUERIES = 64
"""Per head: 4 heads give the mean of a layer to about 0.02 where queries differ by 0.3."""

BLOCK_SCORES = 2**22
"""Scores of sampled queries that exist at a time."""


@contextmanager
def observed(model: Reformer, n_tokens: int | None = None) -> Iterator[dict[str, float]]:
    """A dictionary that the next forward pass fills in, with numbers on the first sample of the batch.

    For each LSH layer, counted from 0:

        lsh/layer01/largest_bucket_over_mean   of all heads and rounds; 1 is even, the number of buckets the worst
        lsh/layer01/empty_buckets              their share
        lsh/layer01/recovered_mass             see `recovered_mass`; the mean over the sampled queries of all heads

    Counted are the first `n_tokens` places (all, if not given; padding has nothing to tell), and queries are drawn
    from them, the same ones at every call. Later passes within the statement change nothing. Where the pass has a
    part of a sequence, the numbers are of its own heads: see `of_all_heads`.
    """
    found: dict[str, float] = {}
    with _replaced(_lsh_layers(model), "attend", lambda layer: _reporting(layer, n_tokens, found)):
        yield found


def of_all_heads(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What `observed` would find in one pass, from what it found where holders of parts had as many heads each."""
    return {
        tag: max(values) if tag.endswith("/largest_bucket_over_mean") else sum(values) / len(values)
        for tag in found[0]
        for values in [[own[tag] for own in found]]
    }


@contextmanager
def ablated(model: Reformer) -> Iterator[None]:
    """Within the statement the attention of LSH layers contributes nothing to passes without gradients.

    Their modules are called as always, so that ZeRO-3 finds what it expects, and hash nothing.
    """
    with _replaced(_lsh_layers(model), "inner", lambda _: _nothing):
        yield


def _nothing(qk: Tensor, v: Tensor, buckets: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(v), None


def _lsh_layers(model: Reformer) -> list[LSHSelfAttention]:
    return [block.attention for block in model.blocks if isinstance(block.attention, LSHSelfAttention)]


@contextmanager
def _replaced(
    layers: Sequence[LSHSelfAttention], name: str, replacement: Callable[[LSHSelfAttention], Callable[..., Any]]
) -> Iterator[None]:
    """Each layer has another function of this name, until the statement ends."""
    before = [vars(layer).get(name) for layer in layers]  # None: the class has it
    for layer in layers:
        setattr(layer, name, replacement(layer))
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                delattr(layer, name)
            else:
                setattr(layer, name, own)


def _reporting(layer: LSHSelfAttention, n_tokens: int | None, found: dict[str, float]) -> Callable[..., Any]:
    """The layer's `attend`, which also reports on its first pass, a few heads at a time as they come."""
    attend, prefix, config = layer.attend, f"lsh/layer{layer.layer:02d}", layer.config
    largest: list[float] = []  # these three: of each group
    empty: list[float] = []
    masses: list[Tensor] = []

    @torch.no_grad()
    def report(qk_BhTD: Tensor, buckets_BhRT: Tensor, call: Call, heads: slice) -> None:
        seq_len = qk_BhTD.shape[2]
        queries = sample_queries(layer.n_heads, n_tokens or seq_len, seed=layer.layer)
        mass_hS = recovered_mass(
            qk_BhTD[0],
            buckets_BhRT[0],
            queries[heads].to(qk_BhTD.device),
            chunk_len=config.lsh_chunk_len,
            causal=config.causal,
            segment_ids_T=None if call.segment_ids_BT is None else call.segment_ids_BT[0],
            attend_across_buckets=config.attend_across_buckets,
        )
        factors = bucket_factors(config.n_buckets, seq_len, config.lsh_chunk_len)
        of_largest, of_empty = bucket_occupancy(buckets_BhRT[:1, ..., :n_tokens], math.prod(factors))
        largest.append(of_largest)
        empty.append(of_empty * len(mass_hS))
        masses.append(mass_hS)
        found[f"{prefix}/largest_bucket_over_mean"] = max(largest)
        found[f"{prefix}/empty_buckets"] = sum(empty) / sum(len(mass) for mass in masses)
        found[f"{prefix}/recovered_mass"] = torch.cat(masses).mean().item()

    def reporting(projected: list[Tensor], call: Call, buckets: Tensor | None, heads: slice) -> tuple[Tensor, Tensor]:
        out, used = attend(projected, call, buckets, heads)
        if sum(len(mass) for mass in masses) < layer.n_heads // call.part.n_parts:  # more of the first pass
            report(projected[0], used, call, heads)
        return out, used

    return reporting


def bucket_occupancy(buckets_BHRT: Tensor, n_buckets: int) -> tuple[float, float]:
    """The largest bucket of any round over the mean, T / n_buckets, and the share of buckets that are empty.

    Buckets are integers in [0, n_buckets); every sample, head and round has its own n_buckets of them.
    """
    rounds_GT = buckets_BHRT.flatten(0, 2).long()
    n_rounds, n_tokens = rounds_GT.shape
    own = torch.arange(n_rounds, device=rounds_GT.device)[:, None] * n_buckets
    sizes = torch.bincount((rounds_GT + own).flatten(), minlength=n_rounds * n_buckets)
    return sizes.max().item() * n_buckets / n_tokens, (sizes == 0).double().mean().item()


def sample_queries(n_heads: int, n_tokens: int, seed: int) -> Tensor:
    """Positions int64 [H, S] on the CPU, uniform in [0, n_tokens), a function of the arguments alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed))
    return torch.randint(n_tokens, (n_heads, SAMPLED_QUERIES), generator=generator)


def recovered_mass(
    qk_HTD: Tensor,
    buckets_HRT: Tensor,
    queries_HS: Tensor,
    *,
    chunk_len: int,
    causal: bool = True,
    segment_ids_T: Tensor | None = None,
    attend_across_buckets: bool = True,
) -> Tensor:
    """Share [H, S] of each query's dense attention that goes to keys which some round lets it reach.

    Dense attention is what LSH attention stands for: the softmax of q.k, k = qk / ||qk||, over all other tokens that
    are visible (before it when causal, of its segment). A query with no visible token but itself has lost nothing: 1.
    Computed in fp32, or in float64 for such inputs.
    """
    n_tokens = qk_HTD.shape[1]
    segments, n_segments = (None, 0) if segment_ids_T is None else renumbered(segment_ids_T[None])
    labels_HRT = sort_labels(buckets_HRT[None], segments, n_segments, None)[0]
    order_HRS, inverse_HRT = sort_by_bucket(labels_HRT, chunk_len)
    masses = []
    for head, qk in enumerate(qk_HTD.to(torch.promote_types(qk_HTD.dtype, torch.float32))):
        k_TD = qk / qk.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(qk.dtype).tiny)
        for query_S in queries_HS[head].split(max(1, BLOCK_SCORES // n_tokens)):
            visible_ST = _visible(query_S, n_tokens, causal, segment_ids_T)
            reached_ST = reached_keys(
                order_HRS[head],
                inverse_HRT[head],
                query_S,
                chunk_len,
                causal=causal,
                buckets_RT=None if attend_across_buckets else buckets_HRT[head],
            )
            weights_ST = (qk[query_S] @ k_TD.T).masked_fill_(~visible_ST, -torch.inf).softmax(dim=-1)
            share_S = weights_ST.mul_(reached_ST).sum(dim=-1)
            masses.append(share_S.masked_fill(~visible_ST.any(dim=-1), 1.0))
    return torch.cat(masses).view(queries_HS.shape)


def _visible(query_S: Tensor, n_tokens: int, causal: bool, segment_ids_T: Tensor | None) -> Tensor:
    """The keys [S, T] that dense attention gives each query; a token sees itself only when it sees nothing else."""
    position_T = torch.arange(n_tokens, device=query_S.device)
    visible = position_T < query_S[:, None] if causal else position_T != query_S[:, None]
    if segment_ids_T is not None:
        visible &= segment_ids_T == segment_ids_T[query_S][:, None]
    return visible


def reached_keys(
    order_RS: Tensor,
    inverse_RT: Tensor,
    query_S: Tensor,
    chunk_len: int,
    *,
    causal: bool,
    buckets_RT: Tensor | None,
) -> Tensor:
    """Whether query s finds key j in the chunks that it sees in any round, bool [S, T], before any mask.

    The same as `reach_counts(...).sum(0) > 0` in reference.py at the rows of the queries, without anything of size
    T x T: each query's windows are read off the sorted order of one head. Given buckets, only keys of the same round
    and bucket count.
    """
    n_rounds, n_tokens = inverse_RT.shape
    order_CL = order_RS.reshape(-1, chunk_len)  # the chunks of all rounds, one round behind the other
    chunks_per_round = len(order_CL) // n_rounds
    round_R1 = torch.arange(n_rounds, device=order_RS.device)[:, None]
    chunk_RS = round_R1 * chunks_per_round + inverse_RT[:, query_S] // chunk_len
    offsets = torch.tensor([-1, 0] if causal else [-1, 0, 1], device=order_RS.device)
    window_RSO = (chunk_RS[..., None] + offsets) % len(order_CL)
    key_RSOL = order_CL[window_RSO].long().clamp(max=n_tokens)  # padding gathers in a column of its own
    if buckets_RT is not None:
        bucket_RT = torch.nn.functional.pad(buckets_RT, (0, 1))
        key_bucket = bucket_RT[round_R1[..., None, None], key_RSOL]
        same = key_bucket == buckets_RT[:, query_S][..., None, None]
        same &= (window_RSO // chunks_per_round == round_R1[..., None])[..., None]
        key_RSOL = key_RSOL.masked_fill(~same, n_tokens)
    reached = torch.zeros(len(query_S), n_tokens + 1, dtype=torch.bool, device=order_RS.device)
    return reached.scatter_(1, key_RSOL.transpose(0, 1).flatten(1), True)[:, :n_tokens]


@torch.no_grad()
def reconstruction_error(model: Reformer, tokens: Tensor, *, segment_ids: Tensor | None = None) -> float:
    """max |x - x'| / rms(x): how far the inputs x of the reversible stack are from those that its inverse gives.

    Tokens are integer [B, T]. Without dropout, this is what the backward pass works with, so it bounds the error that
    reversibility puts into gradients. Costs two passes through the stack.
    """
    sample_ids = tuple(range(len(tokens)))
    call = Call(model.config.seed, 0, sample_ids, segment_ids_BT=segment_ids)
    x = model.embedding(tokens)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return inverse_error(model, x, *by_blocks(model, x, call), call)


def by_blocks(
    model: Reformer, x_BTM: Tensor, call: Call, buckets: Sequence[Tensor | None] | None = None
) -> tuple[tuple[Tensor, Tensor], list[Tensor | None]]:
    """The streams after all blocks, by plain autograd, and the buckets that were used: the given ones, if any are."""
    y1, y2, used = x_BTM, x_BTM, []
    for block, given in zip(_blocks(model), buckets or [None] * len(model.blocks), strict=True):
        y1, y2, of_block = block(y1, y2, call, given)
        used.append(of_block)
    return (y1, y2), used


@torch.no_grad()
def inverse_error(
    model: Reformer, x_BTM: Tensor, y: tuple[Tensor, Tensor], buckets: Sequence[Tensor | None], call: Call
) -> float:
    """What `reconstruction_error` gives, from what `by_blocks` makes of the inputs."""
    for block, used in zip(reversed(_blocks(model)), reversed(buckets), strict=True):
        y = invert(block, *y, call, used)
    largest = torch.maximum(*((stream - x_BTM).abs().max() for stream in y))
    return (largest / x_BTM.square().mean().sqrt()).item()


def _blocks(model: Reformer) -> list[ReversibleBlock]:
    return cast("list[ReversibleBlock]", list(model.blocks))


def invert(block: ReversibleBlock, y1: Tensor, y2: Tensor, call: Call, buckets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The inputs [B, T, M] of a block without dropout from its outputs, as its backward reconstructs them."""
    x2 = y2 - block.feed_forward(y1)[0]
    return y1 - block.attention(x2, call, buckets)[0], x2
