"""Gradients that are computed during the forward and handed over once.

A layer that works by chunks of tokens meets each of its parameters once per chunk. If autograd saw the chunks,
every parameter's gradient would arrive in pieces, and ZeRO's gradient hooks must fire exactly once per backward;
if it saw the whole, the intermediate values of all tokens would be alive at once. So such a layer computes value
and gradients chunk by chunk, adds the gradients up itself, and returns a scalar that knows them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Handed:
    """Gradients on their way from one Function's backward to another's, past autograd's engine.

    The engine keeps what it gives to a Function for as long as that runs, and a long one could neither free nor reuse
    it. A Function that takes gradients in this way has one as `ctx.handed`.
    """

    task: int = -1
    """The backward pass that they belong to."""
    gradients: list[Tensor] = field(default_factory=list)

    def give(self, gradients: list[Tensor]) -> None:
        """Add to those that were given in this pass: there may be several losses of the same streams."""
        self.task, self.gradients = _task(), self.added_to(gradients)

    def added_to(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The sums of those that came by the engine and those given in this pass, in the memory of the latter."""
        given, self.gradients = self.gradients, []
        if not given or self.task != _task():
            return list(gradients)
        return [one.add_(other) for one, other in zip(given, gradients, strict=True)]


def _task() -> int:
    """Which backward pass this is; a pass inside of a pass is another one."""
    return torch._C._current_graph_task_id()


def receiver(outputs: Sequence[Tensor]) -> Handed | None:
    """Where the Function that made these tensors takes gradients by hand.

    None if none did, or if they are not its very outputs: what stands between changes their gradients.
    """
    made_by = outputs[0].grad_fn
    if any(x.grad_fn is not made_by or x.output_nr != place for place, x in enumerate(outputs)):
        return None
    return getattr(made_by, "handed", None)


def refuse_second_derivatives(through: str) -> None:
    """In a Function's backward: raise RuntimeError where it would have to be differentiated itself.

    torch.autograd's once_differentiable does so only where the gradient that comes in has a graph: a penalty on the
    gradient of a sum would be left out without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"second derivatives (create_graph=True) are not available through {through}")


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, gradients: Sequence[Tensor], by_hand: Sequence[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.by_hand, ctx.dtypes = gradients, by_hand, [x.dtype for x in inputs]
        return value.detach()

    @staticmethod
    def backward(ctx: Any, d_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("these gradients were handed over already: run the forward again")
        gradients, ctx.gradients = ctx.gradients, None
        by_hand, ctx.by_hand = ctx.by_hand, None
        refuse_second_derivatives("chunked layers")
        if not _is_known_to_be_one(d_value):
            gradients = [_scaled(gradient, d_value) for gradient in gradients]
        scaled = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        handed = receiver(by_hand) if by_hand else None
        if handed is not None and not any(x.retains_grad or x._backward_hooks for x in by_hand):
            handed.give(scaled[: len(by_hand)])
            scaled[: len(by_hand)] = [x.new_zeros(()).expand_as(x) for x in scaled[: len(by_hand)]]
        return None, None, None, *scaled


def _is_known_to_be_one(factor: Tensor) -> bool:
    """Always so within a stack, whose layers give a scalar on the CPU; a GPU would have to be waited for."""
    return factor.device.type == "cpu" and factor.item() == 1


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """The gradient times a scalar, in place where that loses nothing: a factor in bf16 would be off by up to 0.4%."""
    if torch.promote_types(gradient.dtype, factor.dtype) == gradient.dtype:
        return gradient.mul_(factor)
    return gradient.to(factor.dtype) * factor


def with_gradients(
    value: Tensor, inputs: Sequence[Tensor], gradients: Sequence[Tensor], by_hand: Sequence[Tensor] = ()
) -> Tensor:
    """The scalar `value`, whose backward gives `gradients` (scaled in place) to `inputs`, each exactly once.

    The first inputs may be given again as `by_hand`, the outputs of a Function that takes gradients by hand. It gets
    theirs so, and the engine zeros without memory, unless there is a hook on them: `autograd.grad` of these tensors
    themselves gives zeros.
    """
    return _KnownGradients.apply(value, gradients, by_hand, *inputs)


class GradientSum:
    """Adds up gradients of parameters over chunks, in fp32 or better."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # Aliases without the originals' hooks: what is differentiated chunk by chunk.
        self.aliases = [parameter.detach().requires_grad_() for parameter in parameters]
        self._dtypes = [_sum_dtype(parameter) for parameter in parameters]
        self._sums: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """One for each parameter, zeros as long as nothing was added."""
        if not self._sums:
            self._sums = [torch.zeros_like(p, dtype=d) for p, d in zip(self.aliases, self._dtypes, strict=True)]
        return self._sums

    def add(self, output: Tensor, chunk_inputs: Sequence[Tensor], d_output: Tensor | None = None) -> list[Tensor]:
        """Differentiate a chunk's output: add to the parameters' sums, return the gradients of the inputs."""
        gradients = torch.autograd.grad(output, [*chunk_inputs, *self.aliases], d_output)
        self.add_known(gradients[len(chunk_inputs) :])
        return list(gradients[: len(chunk_inputs)])

    def add_known(self, gradients: Sequence[Tensor]) -> None:
        """Add a chunk's gradients of the parameters, which the sums take over if they are the first."""
        if not self._sums:
            self._sums = [x.to(dtype).contiguous() for x, dtype in zip(gradients, self._dtypes, strict=True)]
            return
        for total, gradient in zip(self.sums, gradients, strict=True):
            total += gradient


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def sums_of_products(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Memory, with anything in it, for sums of `add_product`: as large as the parameters, in fp32 or better."""
    return [torch.empty_like(parameter, dtype=_sum_dtype(parameter)) for parameter in parameters]


def add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """total += a @ b, with no memory for the product where all have the same dtype.

    If it is the first, total = a @ b, whatever stood there.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b
