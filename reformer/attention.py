"""The attention half of a block: norm, projections, an inner attention, the output projection.

The inner attention is a callable that the layer is given, so that an oracle, a kernel or a wrapper that spreads
heads over ranks slips in without the model knowing. Buckets are values: passed in, returned, never kept.

Norm and projections go by chunks of tokens, like the feed-forward layers, and with them their gradients: of the whole
sequence there are the heads, the inner attention's output, and their gradients.

Axes: B batch, H heads, T tokens, D head dim, M model, R hash rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reformer.call import Call
from reformer.chunks import map_chunks, token_slices
from reformer.config import ReformerConfig
from reformer.dense import dense_attention
from reformer.feed_forward import layer_norm
from reformer.gradients import GradientSum, with_gradients
from reformer.local import local_attention
from reformer.lsh import lsh_attention
from reformer.lsh.hashing import bucket_factors, draw_rotations


@dataclass
class Held:
    """What an attention layer's backward needs besides its input, which takes it from here."""

    heads: list[Tensor] = field(default_factory=list)
    """The projections [B, H, T, D], leaves of the graph of `out`."""
    out: Tensor | None = None
    """The inner attention's output [B, H, T, D], with its graph."""


class _Attention(nn.Module):
    """What all kinds share. Parameters are the module's own: see `FeedForward` for why."""

    projections: tuple[str, ...]

    def __init__(self, config: ReformerConfig, layer: int, inner: Callable[..., Any]) -> None:
        super().__init__()
        assert config.d_head is not None  # filled in by the config
        self.config, self.layer, self.n_heads, self.inner = config, layer, config.n_heads, inner
        inner_width = config.n_heads * config.d_head
        self.norm_weight = nn.Parameter(torch.ones(config.d_model))
        self.norm_bias = nn.Parameter(torch.zeros(config.d_model))
        for name in self.projections:
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(inner_width, config.d_model)))
        self.out_weight = nn.Parameter(torch.empty(config.d_model, inner_width))
        for name in (*self.projections, "out"):
            nn.init.xavier_uniform_(self.get_parameter(f"{name}_weight"))

    def forward(
        self,
        x_BTM: Tensor,
        call: Call,
        buckets: Tensor | None = None,
        *,
        held: Held | None = None,
        needs_output: bool = True,
        d_out_BTM: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The output [B, T, M], and LSH attention's buckets [B, H, R, T]; given buckets, nothing is hashed.

        With an empty `held`, the output has no graph (and is None unless it is needed), and what the backward needs
        is put there. With that and the
        gradient of the output: a scalar, <output, d_out>, and None. Its backward gives x and the parameters their
        gradients, each once.
        """
        if held is None:
            out_BHTD, buckets = self.attend(self.project(x_BTM), call, buckets)
            return self.merge(out_BHTD), buckets
        if d_out_BTM is None:
            with torch.no_grad():
                held.heads = self.project(x_BTM)
            with torch.enable_grad():
                held.heads = [head.requires_grad_() for head in held.heads]
                held.out, buckets = self.attend(held.heads, call, buckets)
            with torch.no_grad():
                return self.merge(held.out.detach()) if needs_output else None, buckets
        return self._known_gradients(x_BTM, held, d_out_BTM), None

    def attend(self, heads: list[Tensor], call: Call, buckets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The inner attention's output [B, H, T, D], and buckets if there are any."""
        raise NotImplementedError

    @property
    def projection_weights(self) -> list[Tensor]:
        return [getattr(self, f"{name}_weight") for name in self.projections]

    def project(self, x_BTM: Tensor) -> list[Tensor]:
        """The heads [B, H, T, D] of each projection of norm(x)."""

        def projected(x: Tensor) -> tuple[Tensor, ...]:
            normed = layer_norm(x, self.norm_weight, self.norm_bias, self.config.norm_eps)
            return tuple(F.linear(normed, weight) for weight in self.projection_weights)

        return [self._heads(x) for x in map_chunks(projected, x_BTM, self.config.ff_chunk_tokens)]

    def merge(self, out_BHTD: Tensor) -> Tensor:
        """The output projection of all heads together, [B, T, M]."""
        merged_BTE = out_BHTD.transpose(1, 2).flatten(2)
        return map_chunks(lambda x: (F.linear(x, self.out_weight),), merged_BTE, self.config.ff_chunk_tokens)[0]

    def mode(self, call: Call, device: torch.device) -> dict[str, Any]:
        """The arguments that every kind of inner attention takes."""
        return {
            "causal": self.config.causal,
            "segment_ids": call.segment_ids_BT,
            "dropout": call.attn_dropout,
            "dropout_keys": call.attn_dropout_keys(self.layer, self.n_heads, device),
        }

    def _heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _known_gradients(self, x_BTM: Tensor, held: Held, d_out_BTM: Tensor) -> Tensor:
        """A scalar that gives x and the parameters their gradients."""
        with torch.no_grad():
            d_out_weight, d_heads = self._through_merge(held, d_out_BTM)
            d_x, sums = self._through_projections(x_BTM, d_heads)
        parameters = [self.norm_weight, self.norm_bias, *self.projection_weights, self.out_weight]
        inner_product = torch.zeros((), device=x_BTM.device)  # only its gradient is ever asked for
        return with_gradients(inner_product, [x_BTM, *parameters], [d_x, *sums, d_out_weight])

    def _through_merge(self, held: Held, d_out_BTM: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the output projection and of the heads [B, T, H*D] of each of the others."""
        assert held.out is not None
        chunk_tokens = self.config.ff_chunk_tokens
        merged_BTE = held.out.detach().transpose(1, 2).flatten(2)
        weight_sum = GradientSum([self.out_weight])
        for tokens in token_slices(merged_BTE.shape[1], chunk_tokens):
            merged = merged_BTE[:, tokens].flatten(0, 1)
            weight_sum.add_known([d_out_BTM[:, tokens].flatten(0, 1).to(merged.dtype).T @ merged])
        (d_merged_BTE,) = map_chunks(lambda d: (d.to(merged_BTE.dtype) @ self.out_weight,), d_out_BTM, chunk_tokens)
        d_heads = torch.autograd.grad(held.out, held.heads, self._heads(d_merged_BTE).to(held.out.dtype))
        held.out, held.heads = None, []
        return weight_sum.totals()[0], [d.transpose(1, 2).flatten(2) for d in d_heads]

    def _through_projections(self, x_BTM: Tensor, d_heads_BTE: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The gradients of x, and of the norm's parameters and the projections."""
        d_x_BTM = torch.empty_like(x_BTM)
        norm_sums, weight_sums = GradientSum([self.norm_weight, self.norm_bias]), GradientSum(self.projection_weights)
        for tokens in token_slices(x_BTM.shape[1], self.config.ff_chunk_tokens):
            with torch.enable_grad():
                x = x_BTM[:, tokens].detach().requires_grad_()
                norm_weight, norm_bias = norm_sums.aliases
                normed = layer_norm(x, norm_weight, norm_bias, self.config.norm_eps)
            d_heads = [d[:, tokens].flatten(0, 1) for d in d_heads_BTE]
            weight_sums.add_known([d.T @ normed.detach().flatten(0, 1).to(d.dtype) for d in d_heads])
            d_normed = sum(d @ weight for d, weight in zip(d_heads, self.projection_weights, strict=True))
            assert isinstance(d_normed, Tensor)
            (d_x_BTM[:, tokens],) = norm_sums.add(normed, [x], d_normed.view_as(normed).to(normed.dtype))
        return d_x_BTM, [*norm_sums.totals(), *weight_sums.totals()]


class LocalSelfAttention(_Attention):
    """Sliding-chunk attention with separate queries and keys."""

    projections = ("query", "key", "value")

    def __init__(self, config: ReformerConfig, layer: int, inner: Callable[..., Tensor] = local_attention) -> None:
        super().__init__(config, layer, inner)

    def attend(self, heads: list[Tensor], call: Call, buckets: Tensor | None) -> tuple[Tensor, None]:
        return self.inner(*heads, chunk_len=self.config.local_chunk_len, **self.mode(call, heads[0].device)), None


class DenseSelfAttention(_Attention):
    """Attention to everything, with the parameters of `LSHSelfAttention`, so that each can use the other's."""

    projections = ("qk", "value")

    def __init__(self, config: ReformerConfig, layer: int, inner: Callable[..., Tensor] = dense_attention) -> None:
        super().__init__(config, layer, inner)

    def attend(self, heads: list[Tensor], call: Call, buckets: Tensor | None) -> tuple[Tensor, None]:
        return self.inner(*heads, **self.mode(call, heads[0].device)), None


class LSHSelfAttention(_Attention):
    """Multi-round LSH attention with shared queries and keys."""

    projections = ("qk", "value")

    def __init__(
        self, config: ReformerConfig, layer: int, inner: Callable[..., tuple[Tensor, Tensor]] = lsh_attention
    ) -> None:
        super().__init__(config, layer, inner)

    def attend(self, heads: list[Tensor], call: Call, buckets: Tensor | None) -> tuple[Tensor, Tensor]:
        config, (qk, v) = self.config, heads
        n_hashes = call.n_hashes or config.n_hashes
        factors = bucket_factors(config.n_buckets, qk.shape[2], config.lsh_chunk_len)
        rotations = None
        if buckets is None:
            rotations = draw_rotations(
                config.n_heads, qk.shape[-1], n_hashes, factors, call.seed, call.step, self.layer
            )
        return self.inner(
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
