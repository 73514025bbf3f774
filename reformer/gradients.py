"""Gradients that are computed during the forward and handed over once.

A layer that works by chunks of tokens meets each of its parameters once per chunk. If autograd saw the chunks,
every parameter's gradient would arrive in pieces, and ZeRO's gradient hooks must fire exactly once per backward;
if it saw the whole, the intermediate values of all tokens would be alive at once. So such a layer computes value
and gradients chunk by chunk, adds the gradients up itself, and returns a scalar that knows them.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Handed = deque[Tensor]
"""Gradients on their way from one backward to another. Not a list: under ZeRO-3, DeepSpeed calls modules with copies
of the lists that they are given."""


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], handed: Handed, n_handed: int, *inputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.handed, ctx.n_handed = gradients, handed, n_handed
        return value.detach()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("these gradients were handed over already: run the forward again")
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives (create_graph=True) are not available through chunked layers")
        scaled = [_scale(gradient, d_value) for gradient in gradients]
        for i in range(ctx.n_handed):
            ctx.handed.append(scaled[i])
            scaled[i] = scaled[i].new_zeros(()).expand_as(scaled[i])
        return None, None, None, None, *scaled


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a scalar, in place; a factor that was rounded to half precision would be off by up to 0.4%."""
    if torch.promote_types(gradient.dtype, factor.dtype) == gradient.dtype:
        return gradient.mul_(factor)
    return gradient.copy_(gradient.to(factor.dtype) * factor)


def with_gradients(
    value: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    handed: Handed | None = None,
    n_handed: int = 0,
) -> Tensor:
    """The scalar `value`, whose backward gives `gradients` (scaled in place) to `inputs`, each exactly once.

    The first `n_handed` gradients go into `handed`, and zeros without memory go to these inputs: autograd's
    engine keeps what it gives to a Function for as long as that runs, and a long one could not free or reuse it.
    """
    return _KnownGradients.apply(value, gradients, deque() if handed is None else handed, n_handed, *inputs)


class GradientSum:
    """Adds up gradients of parameters over chunks, in fp32 or better, and returns them in the parameters' dtype."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        # Aliases without the originals' hooks: what is differentiated chunk by chunk.
        self.aliases = [parameter.detach().requires_grad_() for parameter in parameters]
        self.sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]

    def add(self, output: Tensor, chunk_inputs: Sequence[Tensor], d_output: Tensor | None = None) -> list[Tensor]:
        """Differentiate a chunk's output: add to the parameters' sums, return the gradients of the inputs."""
        gradients = torch.autograd.grad(output, [*chunk_inputs, *self.aliases], d_output)
        self.add_known(gradients[len(chunk_inputs) :])
        return list(gradients[: len(chunk_inputs)])

    def add_known(self, gradients: Sequence[Tensor]) -> None:
        """Add a chunk's gradients of the parameters."""
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient

    def totals(self) -> list[Tensor]:
        return [total.to(p.dtype) for total, p in zip(self.sums, self.parameters, strict=True)]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with no memory for the product where all have the same dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
