"""What `launch/gpu_check.py` times: our attention and model, and those that a user of a GPU would pick instead.

Attention is a function from queries, keys and values [1, H, T, D] to the output; LSH attention takes the queries as
keys. Models are those of bench/peers.py, built on the GPU with parameters in the dtype asked for.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from bench.peers import (
    PEERS,
    DenseModel,
    Peer,
    Sizes,
    Step,
    built_on,
    config_of,
    heads_of,
    merged,
    model_step,
    step_on,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from reformer import Reformer, lsh_attention
from reformer.lsh.dispatch import Backend, attention_in_chunks
from reformer.lsh.hashing import default_buckets, draw_rotations, hash_to_buckets, sort_by_bucket, sort_labels
from reformer.lsh.rounds import Layout, by_head, renumbered
from reformer.lsh.triton_hashing import triton_hash

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(device: torch.device) -> Backend:
    """On a GPU the fused kernels or an error, never another path in their place; a dry run takes what a CPU has."""
    return "triton" if device.type == "cuda" else "chunked"


def lsh(sizes: Sizes, q_BHTD: Tensor, backend: Backend | None = None) -> Attend:
    """Longhand's, from hashing to the output."""
    backend = backend or fused(q_BHTD.device)
    attend = functools.partial(lsh_attention, n_hashes=sizes.n_hashes, chunk_len=sizes.chunk_len, backend=backend)
    return lambda q, k, v: attend(q, v)[0]


def segments_of(n_tokens: int, n_documents: int, device: torch.device) -> Tensor:
    """Documents of random lengths in one row: their numbers [T]."""
    begins = torch.zeros(n_tokens, dtype=torch.int64, device=device)
    begins[torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))[: n_documents - 1].to(device)] = 1
    return begins.cumsum(0)


def hash_and_sort(sizes: Sizes, q_BHTD: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """What gives the order of these queries and its inverse, by rotations that are drawn once."""
    factors = default_buckets(sizes.seq_len, sizes.chunk_len)
    rotations = draw_rotations(sizes.n_heads, q_BHTD.shape[-1], sizes.n_hashes, factors, seed=0, step=0, layer=0)
    rotations = rotations.to(q_BHTD.device)
    hashed = triton_hash if q_BHTD.is_cuda else hash_to_buckets
    return lambda: sort_by_bucket(hashed(q_BHTD, rotations, factors).flatten(0, 1), sizes.chunk_len)


def layout_of(sizes: Sizes, q_BHTD: Tensor) -> Layout:
    return Layout(*hash_and_sort(sizes, q_BHTD)(), sizes.chunk_len, causal=True, is_lsh=True)


def packed_layout_of(sizes: Sizes, q_BHTD: Tensor, n_documents: int) -> Layout:
    """Of random buckets."""
    shape = (1, sizes.n_heads, sizes.n_hashes, sizes.seq_len)
    n_buckets = math.prod(default_buckets(sizes.seq_len, sizes.chunk_len))
    buckets = torch.randint(n_buckets, shape, generator=torch.Generator().manual_seed(0)).int().to(q_BHTD.device)
    segments, n_segments = renumbered(segments_of(sizes.seq_len, n_documents, q_BHTD.device)[None])
    order, inverse = sort_by_bucket(sort_labels(buckets, segments, n_segments, None)[0], sizes.chunk_len)
    of_heads = by_head(segments, sizes.n_heads)
    return Layout(order, inverse, sizes.chunk_len, causal=True, is_lsh=True, segment_ids_GT=of_heads)


def only_attention(sizes: Sizes, q_BHTD: Tensor) -> Attend:
    """The same without hashing and sorting: what the roofline is about."""
    layout, backend = layout_of(sizes, q_BHTD), fused(q_BHTD.device)
    return lambda q, k, v: attention_in_chunks(q.flatten(0, 1), None, v.flatten(0, 1), layout, backend).view_as(v)


def only_hash_and_sort(sizes: Sizes, q_BHTD: Tensor) -> Attend:
    """The other part of it; its result is no attention, but an order."""
    hashed_and_sorted = hash_and_sort(sizes, q_BHTD)
    return lambda q, k, v: hashed_and_sorted()[1]


def dense(sizes: Sizes, q_BHTD: Tensor, kernel: SDPBackend) -> Attend:
    """scaled_dot_product_attention by one of its kernels; on a CPU, by the one that it has."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel) if q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def flex(sizes: Sizes, q_BHTD: Tensor) -> Attend:
    """FlexAttention, compiled, with a causal block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every length compiles anew, and all share a cache of eight entries, beyond which it would silently run eagerly.
    torch._dynamo.reset()
    n_tokens = sizes.seq_len
    mask = create_block_mask(_is_causal, None, None, n_tokens, n_tokens, device=q_BHTD.device.type, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _is_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


ATTENTION: dict[str, Callable[[Sizes, Tensor], Attend]] = {
    "ours": lsh,
    "ours-attention": only_attention,
    "ours-hash-sort": only_hash_and_sort,
    "ours-chunked": functools.partial(lsh, backend="chunked"),
    "flash": functools.partial(dense, kernel=SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(dense, kernel=SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}


def random_heads(sizes: Sizes, n: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Tensors [1, H, T, D] with the strides that projections leave them with."""
    torch.manual_seed(0)
    with built_on(device, dtype):
        return [heads_of(torch.randn(1, sizes.seq_len, sizes.d_model), sizes.n_heads) for _ in range(n)]


def disagreement(sizes: Sizes, n_documents: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far the fused path's output and gradients are from the chunked path's, relative to their largest number."""
    q, v, d_out = (x.flatten(0, 1) for x in random_heads(sizes, 3, device, dtype))
    layout = layout_of(sizes, q[None]) if n_documents == 1 else packed_layout_of(sizes, q[None], n_documents)
    found = []
    for backend in (fused(device), "chunked"):
        inputs = [x.detach().requires_grad_() for x in (q, v)]
        out = attention_in_chunks(inputs[0], None, inputs[1], layout, backend)
        found.append([x.float() for x in (out.detach(), *torch.autograd.grad(out, inputs, d_out))])
    pairs = zip(("out", "d_qk", "d_v"), *found, strict=True)
    return {name: ((one - other).abs().max() / other.abs().max()).item() for name, one, other in pairs}


def attention_step(name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, backward: bool) -> Step:
    """The forward of one layer's attention, or forward and backward, on tensors strided as projections leave them."""
    if name == "huggingface":
        torch.manual_seed(0)
        return step_on(PEERS["attention"]["huggingface"], sizes, device, dtype)
    q, k, v, d_out = random_heads(sizes, 4, device, dtype)
    attend = ATTENTION[name](sizes, q)
    inputs = [x.requires_grad_() for x in ((q, v) if name.startswith("ours") else (q, k, v))]

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
        if backward:
            torch.autograd.grad(out, inputs, d_out)

    return step


class _OtherAttention(nn.Module):
    """A dense layer whose attention is another function of queries, keys and values."""

    layer: Any

    def __init__(self, layer: nn.Module, attend: Attend) -> None:
        super().__init__()
        self.layer, self.attend = layer, attend

    def forward(self, x_BTM: Tensor) -> Tensor:
        layer = self.layer
        q, k, v = (heads_of(x, layer.n_heads) for x in layer.qkv(layer.norm(x_BTM)).chunk(3, dim=-1))
        return layer.out(merged(self.attend(q, k, v)))


def _ours(sizes: Sizes, backend: Backend | None = None, keep_ends: bool = True) -> Step:
    model = Reformer(config_of(sizes).model_copy(update={"keep_ends": keep_ends}))
    backend = backend or fused(model.head.weight.device)
    blocks: Any = model.blocks
    for block in blocks:
        block.attention.inner = functools.partial(lsh_attention, backend=backend)
    return model_step(model, lambda tokens: model(tokens, tokens, step=0), sizes)


def _dense(sizes: Sizes, attend_of: Callable[[Sizes, Tensor], Attend]) -> Step:
    model: Any = DenseModel(sizes)
    attend = attend_of(sizes, torch.empty(0))
    model.attentions = nn.ModuleList([_OtherAttention(layer, attend) for layer in model.attentions])
    return model_step(model, model, sizes)


LONGEST = "ours-longest"
"""Ours as it trains the longest sequences: it keeps as little as it can."""
MODEL: dict[str, Peer[Step]] = {
    "ours": Peer(_ours),
    LONGEST: Peer(functools.partial(_ours, keep_ends=False)),
    "ours-chunked": Peer(functools.partial(_ours, backend="chunked")),
    "flash": Peer(functools.partial(_dense, attend_of=ATTENTION["flash"])),
    "cudnn": Peer(functools.partial(_dense, attend_of=ATTENTION["cudnn"])),
    "flex": Peer(functools.partial(_dense, attend_of=flex)),
    "huggingface": PEERS["model"]["huggingface"],
}
OUR_MODEL = ("ours", LONGEST, "ours-chunked")
"""Those of them that are the Reformer, whose FLOPs trainer/flops.py counts."""


def model_training_step(name: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Step:
    """Forward and backward of a whole model."""
    torch.manual_seed(0)
    return step_on(MODEL[name], sizes, device, dtype)
