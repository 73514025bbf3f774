"""A stack of reversible blocks (the paper's section 3): activation memory does not grow with depth.

    y1 = x1 + attention(x2);  y2 = x2 + feed_forward(y1)

One autograd Function spans the stack. Its backward walks the blocks in reverse, reconstructs each one's inputs from
its outputs and differentiates the two halves on the way. Per layer the forward keeps the hash buckets, since the
reconstructed inputs differ from the originals by rounding: hashed again, some tokens would change buckets, and the
gradient would be that of another function. At the two ends of the stack there is less to compute again: the inputs of
the first block are kept, and of the last one, whose backward comes first, what its attention's backward needs. That is
one block's memory, whatever the depth, and is left out where `keep_ends` is False.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reformer.attention import DenseSelfAttention, HeadGroup, LocalSelfAttention, LSHSelfAttention
from reformer.call import Call
from reformer.config import ReformerConfig
from reformer.feed_forward import FeedForward
from reformer.gradients import Handed, refuse_second_derivatives


@dataclass
class Streams:
    """The two streams [B, T, M] at one place of the stack, and their gradients, on the way back through it.

    One object that blocks change, so that no caller's frame holds on to what is replaced: each is a gigabyte at a
    million tokens of width 256.
    """

    x1: Tensor
    x2: Tensor
    d_x1: Tensor
    d_x2: Tensor


class ReversibleBlock(nn.Module):
    """One layer: an attention half and a feed-forward half, each a function of one stream."""

    def __init__(self, config: ReformerConfig, layer: int) -> None:
        super().__init__()
        kinds = {"local": LocalSelfAttention, "lsh": LSHSelfAttention, "dense": DenseSelfAttention}
        kind = kinds[config.attention_kind(layer)]
        self.layer = layer
        self.attention = kind(config, layer)
        self.feed_forward = FeedForward(config)

    def attend(
        self, x2: Tensor, call: Call, buckets: Tensor | None = None, held: list[HeadGroup] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The attention half's output [B, T, M] after dropout, and the buckets; `held` as in the layer itself."""
        attended, buckets = self.attention(x2, call, buckets, held=held)
        return _dropped(attended, call.kept(attended, self.layer, "attention"), call.dropout), buckets

    def feed(self, y1: Tensor, call: Call) -> Tensor:
        """The feed-forward half's output [B, T, M] after dropout."""
        fed, _ = self.feed_forward(y1)
        return _dropped(fed, call.kept(fed, self.layer, "feed_forward"), call.dropout)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        call: Call,
        buckets: Tensor | None = None,
        held: list[HeadGroup] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Streams [B, T, M] in, streams and buckets out: the definition, differentiable by plain autograd.

        `held` as in the attention layer.
        """
        attended, buckets = self.attend(x2, call, buckets, held)
        y1 = _sum(x1, attended)
        return y1, _sum(x2, self.feed(y1, call)), buckets

    def backward(self, at: Streams, call: Call, buckets: Tensor | None) -> None:
        """Takes `at` from the block's outputs to its inputs; parameters receive their gradients on the way.

        Called without gradients enabled, as in the backward of an autograd Function.
        """
        fed = self.feed_backward(at, call)
        assert fed is not None
        at.x2 = _difference(at.x2, fed)
        del fed
        attended = self.attend_backward(at, call, buckets)
        assert attended is not None
        at.x1 = _difference(at.x1, attended)

    def feed_backward(self, at: Streams, call: Call, needs_output: bool = True) -> Tensor | None:
        """Adds to the gradient of y1, `at.x1`, what comes through the feed-forward half.

        Returns that half's output after dropout, or None if it is not needed.
        """
        kept = call.kept(at.x1, self.layer, "feed_forward")
        with torch.enable_grad():
            y1 = at.x1.detach().requires_grad_()
            fed, inner_product = self.feed_forward(y1, _dropped(at.d_x2, kept, call.dropout), needs_output)
        inner_product.backward()
        at.d_x1 = _gradient(y1).add_(at.d_x1)
        return None if fed is None else _dropped(fed, kept, call.dropout)

    def attend_backward(
        self,
        at: Streams,
        call: Call,
        buckets: Tensor | None = None,
        held: list[HeadGroup] | None = None,
        needs_output: bool = True,
    ) -> Tensor | None:
        """The same for the attention half and the gradient of its input, `at.x2`."""
        kept = call.kept(at.x2, self.layer, "attention")
        with torch.enable_grad():
            x2 = at.x2.detach().requires_grad_()
            dropped = _dropped(at.d_x1, kept, call.dropout)
            attended, inner_product = self.attention(
                x2, call, buckets, held=held, d_out_BTM=dropped, needs_output=needs_output
            )
        del dropped
        inner_product.backward()
        at.d_x2 = _gradient(x2).add_(at.d_x2)
        return None if attended is None else _dropped(attended, kept, call.dropout)


def _dropped(x: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    """x with zeros where it is not kept, the rest by 1 / (1 - dropout)."""
    if kept is None:
        return x
    # Rounded to fp32 or better: runs that an earlier version began, whose masks had this number, go on to the bit.
    scale = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32), device="cpu") / (1 - dropout)
    return (x * kept).mul_(scale.item())


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _sum(stream: Tensor, update: Tensor) -> Tensor:
    """stream + update, in the update's memory where it is fresh: 64 MiB of new pages cost more than the sum."""
    if torch.is_grad_enabled() or update.dtype != stream.dtype:
        return stream + update
    return update.add_(stream)


def _difference(stream: Tensor, update: Tensor) -> Tensor:
    """stream - update, in the same way."""
    return torch.sub(stream, update, out=update) if update.dtype == stream.dtype else stream - update


def reversible_stack(
    blocks: nn.ModuleList, x1: Tensor, x2: Tensor, call: Call, keep_ends: bool = True
) -> tuple[Tensor, Tensor]:
    """The streams after all blocks. The parameters' gradients appear in `.grad` during the backward, once.

    The streams' gradients may come by autograd or by hand, see `Handed`; the backward adds them up. It raises
    RuntimeError where the parameters have been replaced since the forward, or changed so that autograd knows of it.
    """
    needs_gradients = x1.requires_grad or x2.requires_grad or any(p.requires_grad for p in blocks.parameters())
    if not (torch.is_grad_enabled() and needs_gradients):
        with torch.no_grad():
            for block in blocks:
                x1, x2, _ = block(x1, x2, call)
        return x1, x2
    if not (x1.requires_grad or x2.requires_grad):
        x1 = x1.detach().requires_grad_()  # a frozen embedding must not freeze the stack
    return _ReversibleStack.apply(x1, x2, tuple(blocks), call, keep_ends)


@dataclass
class _Kept:
    """What lives from the forward to the backward, which takes it apart as it goes. An output of the stack is here
    without its graph: that would be a circle of references."""

    buckets: list[Tensor | None]
    """Of all blocks; if the ends are kept, of all but the last."""
    y1: Tensor
    y2: Tensor
    """The streams after the last block; if the ends are kept, the second one before it."""
    ends: "_Ends | None" = None


@dataclass
class _Ends:
    """Of the two ends of the stack, what they need not compute again."""

    first_x2: Tensor
    """The second stream before the first block."""
    last_x1: Tensor
    """The first stream before the last block."""
    held: list[HeadGroup]
    """What the backward of the last block's attention needs."""


class _ReversibleStack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, blocks: Sequence[ReversibleBlock], call: Call, keep_ends: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.blocks, ctx.call, ctx.handed, ctx.autocast = blocks, call, Handed(), _autocast_state(x1.device.type)
        ctx.parameters = _parameters(blocks)
        first_x2, buckets = x2.detach() if keep_ends else None, []
        for block in blocks[:-1] if keep_ends else blocks:
            x1, x2, used = block(x1, x2, call)
            buckets.append(used)
        if first_x2 is None:
            ctx.kept = _Kept(buckets, x1.detach(), x2.detach())
            return x1, x2
        ends = _Ends(first_x2, x1.detach(), held=[])
        y1, y2, _ = blocks[-1](x1, x2, call, held=ends.held)
        ctx.kept = _Kept(buckets, y1.detach(), x2.detach(), ends)
        return y1, y2

    @staticmethod
    def backward(ctx: Any, d_y1: Tensor, d_y2: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("a reversible stack")
        if ctx.kept is None:
            raise RuntimeError("this stack was differentiated already: run the forward again")
        _refuse_other_parameters(ctx.parameters, _parameters(ctx.blocks))
        kept, ctx.kept = ctx.kept, None
        at = Streams(kept.y1, kept.y2, *ctx.handed.added_to([d_y1, d_y2]))
        buckets, ends = kept.buckets, kept.ends
        del kept, d_y1, d_y2
        with torch.autocast(**ctx.autocast):
            if ends is not None:
                _backward_with_ends(at, ctx.blocks, ctx.call, buckets, ends)
            else:
                for block in reversed(ctx.blocks):
                    block.backward(at, ctx.call, buckets.pop())
        return at.d_x1, at.d_x2, None, None, None


def _backward_with_ends(
    at: Streams, blocks: Sequence[ReversibleBlock], call: Call, buckets: list[Tensor | None], ends: _Ends
) -> None:
    """From the outputs of the stack to its inputs, with less to do in the last block and in the first."""
    *others, last = blocks
    last.feed_backward(at, call, needs_output=False)
    at.x1 = ends.last_x1
    del ends.last_x1
    last.attend_backward(at, call, held=ends.held, needs_output=False)
    for block in reversed(others[1:]):
        block.backward(at, call, buckets.pop())
    for block in others[:1]:
        block.feed_backward(at, call, needs_output=False)
        at.x1 = at.x2 = ends.first_x2
        block.attend_backward(at, call, buckets.pop(), needs_output=False)


def _parameters(blocks: Sequence[ReversibleBlock]) -> list[tuple[Tensor, int]]:
    """All of them, and how often each has been changed in place, as far as autograd counts that: fused optimizers,
    writes by way of `.data` and DeepSpeed's ZeRO go uncounted."""
    return [(parameter, parameter._version) for block in blocks for parameter in block.parameters()]


def _refuse_other_parameters(of_forward: list[tuple[Tensor, int]], now: list[tuple[Tensor, int]]) -> None:
    """Raise RuntimeError where the backward would go back through another function than the forward came by."""
    if [id(parameter) for parameter, _ in of_forward] != [id(parameter) for parameter, _ in now]:
        raise RuntimeError(
            "the blocks have other parameters than in the forward (those of torch.func.functional_call are gone by the "
            "time of backward(), so it is not available through a reversible stack)"
        )
    for (_, version), (parameter, current) in zip(of_forward, now, strict=True):
        if version != current:
            raise RuntimeError(
                f"parameters of the blocks ({list(parameter.shape)}) were changed in place between forward and "
                "backward: take the optimizer's step after all backward passes, or run the forward again"
            )


def _autocast_state(device_type: str) -> dict[str, Any]:
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        # Its cache would keep a copy of every alias in GradientSum until the outermost region ends.
        "cache_enabled": False,
    }
