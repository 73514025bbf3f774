"""The attention half of a block: norm, projections, an inner attention, the output projection.

The inner attention is a callable that the layer is given, so that an oracle, a kernel or a wrapper that spreads
heads over ranks slips in without the model knowing. Buckets are values: passed in, returned, never kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.call import Call
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.feed_forward import layer_norm
from reformer.local import local_attention
from reformer.lsh import lsh_attention
from reformer.lsh.hashing import bucket_factors, draw_rotations


class _Attention(nn.Module):
    """What all kinds share. Parameters are the module's own: see `FeedForward` for why."""

    projections: tuple[str, ...]

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        assert config.d_head is not None  # filled in by the config
        self.config, self.layer, self.n_heads = config, layer, config.n_heads
        inner_width = config.n_heads * config.d_head
        self.norm_weight = nn.Parameter(torch.ones(config.d_model))
        self.norm_bias = nn.Parameter(torch.zeros(config.d_model))
        for name in self.projections:
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(inner_width, config.d_model)))
        self.out_weight = nn.Parameter(torch.empty(config.d_model, inner_width))
        for name in (*self.projections, "out"):
            nn.init.xavier_uniform_(self.get_parameter(f"{name}_weight"))

    def project(self, x_BTM: Tensor) -> list[Tensor]:
        """The heads [B, H, T, D] of each projection of norm(x)."""
        normed = layer_norm(x_BTM, self.norm_weight, self.norm_bias, self.config.norm_eps)
        heads = []
        for name in self.projections:
            projected = F.linear(normed, self.get_parameter(f"{name}_weight"))
            heads.append(projected.unflatten(-1, (self.n_heads, -1)).transpose(1, 2))
        return heads

    def mode(self, call: Call, device: torch.device) -> dict[str, Any]:
        """The arguments that every kind of inner attention takes."""
        return {
            "causal": self.config.causal,
            "segment_ids": call.segment_ids_BT,
            "dropout": call.attn_dropout,
            "dropout_keys": call.attn_dropout_keys(self.layer, self.n_heads, device),
        }

    def merge(self, out_BHTD: Tensor) -> Tensor:
        return F.linear(out_BHTD.transpose(1, 2).flatten(2), self.out_weight)


class LocalSelfAttention(_Attention):
    """Sliding-chunk attention with separate queries and keys."""

    projections = ("query", "key", "value")

    def __init__(self, config: ReformerConfig, layer: int, inner: Callable[..., Tensor] = local_attention) -> None:
        super().__init__(config, layer)
        self.inner = inner

    def forward(self, x_BTM: Tensor, call: Call, buckets: Tensor | None = None) -> tuple[Tensor, None]:
        """Output [B, T, M]; there are no buckets."""
        q, k, v = self.project(x_BTM)
        out = self.inner(q, k, v, chunk_len=self.config.local_chunk_len, **self.mode(call, q.device))
        return self.merge(out), None


class DenseSelfAttention(_Attention):
    """Attention to everything, with the parameters of `LSHSelfAttention`, so that each can use the other's."""

    projections = ("qk", "value")

    def __init__(self, config: ReformerConfig, layer: int, inner: Callable[..., Tensor] = dense_attention) -> None:
        super().__init__(config, layer)
        self.inner = inner

    def forward(self, x_BTM: Tensor, call: Call, buckets: Tensor | None = None) -> tuple[Tensor, None]:
        """Output [B, T, M]; there are no buckets."""
        qk, v = self.project(x_BTM)
        return self.merge(self.inner(qk, v, **self.mode(call, qk.device))), None


class LSHSelfAttention(_Attention):
    """Multi-round LSH attention with shared queries and keys."""

    projections = ("qk", "value")

    def __init__(
        self, config: ReformerConfig, layer: int, inner: Callable[..., tuple[Tensor, Tensor]] = lsh_attention
    ) -> None:
        super().__init__(config, layer)
        self.inner = inner

    def forward(self, x_BTM: Tensor, call: Call, buckets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [B, T, M] and the buckets [B, H, R, T] used; given buckets, nothing is hashed."""
        config = self.config
        n_hashes = call.n_hashes or config.n_hashes
        qk, v = self.project(x_BTM)
        factors = bucket_factors(config.n_buckets, qk.shape[2], config.lsh_chunk_len)
        rotations = None
        if buckets is None:
            rotations = draw_rotations(
                config.n_heads, qk.shape[-1], n_hashes, factors, call.seed, call.step, self.layer
            )
        out, buckets = self.inner(
            qk,
            v,
            buckets,
            n_hashes=n_hashes,
            chunk_len=config.lsh_chunk_len,
            n_buckets=factors,
            attend_across_buckets=config.attend_across_buckets,
            duplicate_correction=config.duplicate_correction,
            rotations=rotations,
            **self.mode(call, qk.device),
        )
        return self.merge(out), buckets
