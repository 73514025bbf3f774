"""A stack of reversible blocks (the paper's section 3): activation memory does not grow with depth.

    y1 = x1 + attention(x2);  y2 = x2 + feed_forward(y1)

One autograd Function spans the stack. Its forward keeps the last (y1, y2) and, per layer, the hash buckets; its
backward walks the blocks in reverse, reconstructs each one's inputs from its outputs and differentiates the two
halves on the way. Buckets are kept because the reconstructed inputs differ from the originals by rounding: hashed
again, some tokens would change buckets, and the gradient would be that of another function.
"""

from typing import Any

import torch
from torch import Tensor, nn

from reformer.attention import DenseSelfAttention, LocalSelfAttention, LSHSelfAttention
from reformer.call import Call
from reformer.config import ReformerConfig
from reformer.feed_forward import FeedForward


class ReversibleBlock(nn.Module):
    """One layer: an attention half and a feed-forward half, each a function of one stream."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        kinds = {"local": LocalSelfAttention, "lsh": LSHSelfAttention, "dense": DenseSelfAttention}
        kind = kinds[config.attention_kind(layer)]
        self.layer = layer
        self.attention = kind(config, layer)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x1: Tensor, x2: Tensor, call: Call, buckets: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Streams [B, T, M] in, streams and buckets out: the definition, differentiable by plain autograd."""
        attended, buckets = self.attention(x2, call, buckets)
        y1 = x1 + _scaled(attended, call.dropout_scale(attended, self.layer, "attention"))
        fed, _ = self.feed_forward(y1)
        y2 = x2 + _scaled(fed, call.dropout_scale(fed, self.layer, "feed_forward"))
        return y1, y2, buckets

    def backward(
        self, y1: Tensor, y2: Tensor, d_y1: Tensor, d_y2: Tensor, call: Call, buckets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From outputs and their gradients to inputs and theirs; parameters receive their gradients on the way."""
        with torch.enable_grad():
            y1 = y1.detach().requires_grad_()
            scale = call.dropout_scale(y1, self.layer, "feed_forward")
            fed, inner_product = self.feed_forward(y1, _scaled(d_y2, scale))
        inner_product.backward()
        x2 = y2 - _scaled(fed, scale)
        d_y1 = d_y1 + _gradient(y1)
        with torch.enable_grad():
            x2 = x2.detach().requires_grad_()
            attended, _ = self.attention(x2, call, buckets)
            attended = _scaled(attended, call.dropout_scale(attended, self.layer, "attention"))
        attended.backward(d_y1.to(attended.dtype))
        x1 = y1.detach() - attended.detach()
        return x1, x2.detach(), d_y1, d_y2 + _gradient(x2)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def reversible_stack(blocks: nn.ModuleList, x1: Tensor, x2: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The streams after all blocks. The parameters' gradients appear in `.grad` during the backward."""
    if torch.is_grad_enabled() and not (x1.requires_grad or x2.requires_grad):
        x1 = x1.detach().requires_grad_()  # a frozen embedding must not freeze the stack
    return _ReversibleStack.apply(x1, x2, blocks, call)


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, blocks: nn.ModuleList, call: Call) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.call, ctx.autocast = blocks, call, _autocast_state(x1.device.type)
        buckets = []
        for block in blocks:
            x1, x2, used = block(x1, x2, call)
            buckets.append(used)
        ctx.has_buckets = [used is not None for used in buckets]
        ctx.save_for_backward(x1, x2, *(used for used in buckets if used is not None))
        return x1, x2

    @staticmethod
    def backward(ctx: Any, d_y1: Tensor, d_y2: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives (create_graph=True) are not available through a reversible stack")
        y1, y2, *saved = ctx.saved_tensors
        with torch.autocast(**ctx.autocast):
            for block, has_buckets in zip(reversed(ctx.blocks), reversed(ctx.has_buckets), strict=True):
                buckets = saved.pop() if has_buckets else None
                y1, y2, d_y1, d_y2 = block.backward(y1, y2, d_y1, d_y2, ctx.call, buckets)
        return d_y1, d_y2, None, None


def _autocast_state(device_type: str) -> dict[str, Any]:
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }
