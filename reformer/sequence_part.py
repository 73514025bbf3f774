"""One part of a sequence whose other parts are elsewhere: what a pass has to know of that, and what it exchanges.

Only attention looks at other tokens, and its heads are independent. So the holders of the P parts exchange tokens for
heads before it, and heads for tokens after it (as DeepSpeed-Ulysses does: Jacobs et al., 2023): inside, each has the
whole sequence for one P-th of the heads, and hashes, sorts and attends as if it were alone. All else goes token by
token. Shared queries and keys make it two tensors in and one out, however many rounds there are. Who the holders are
and how they talk is the caller's: `all_to_all` is all that is asked of them.

Axes: P parts, B batch, H heads of a group, h = H/P of them, T tokens of the whole sequence, S = T/P tokens of a part,
D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer.gradients import refuse_second_derivatives

AllToAll = Callable[[Tensor], Tensor]
"""[P, …] to [P, …], contiguous: entry p goes to the holder of part p, and entry p of the result came from there."""


@dataclass(frozen=True)
class SequencePart:
    """Part number `index` of `n_parts` equal parts of a sequence; all holders make the same passes at the same time."""

    index: int
    n_parts: int
    all_to_all: AllToAll

    def start(self, n_tokens: int) -> int:
        """The position of the first token, in parts of so many tokens."""
        return self.index * n_tokens

    def seq_len(self, n_tokens: int) -> int:
        """The length of the whole sequence."""
        return self.n_parts * n_tokens

    def own_heads(self, heads: slice) -> slice:
        """Of a group of heads those that this holder attends with."""
        count = (heads.stop - heads.start) // self.n_parts
        first = heads.start + self.index * count
        return slice(first, first + count)

    def held_heads(self, heads: slice) -> slice:
        """Where `own_heads` stand among all that this holder attends with, group by group."""
        return slice(heads.start // self.n_parts, heads.stop // self.n_parts)

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """From some tokens of all heads, [B, H, S, D] each, to all tokens of the own heads, [B, h, T, D]."""
        if self.n_parts == 1:
            return list(tensors)
        by_holder = [x.unflatten(1, (self.n_parts, -1)).movedim(1, 0) for x in tensors]
        return [x.movedim(0, 2).flatten(2, 3) for x in self._exchanged(by_holder)]

    def to_tokens(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The way back, [B, h, T, D] each to [B, H, S, D]."""
        if self.n_parts == 1:
            return list(tensors)
        by_holder = [x.unflatten(2, (self.n_parts, -1)).movedim(2, 0) for x in tensors]
        return [x.movedim(0, 1).flatten(1, 2) for x in self._exchanged(by_holder)]

    def whole(self, x_BS: Tensor) -> Tensor:
        """A value of each token, of all parts end to end, [B, T]; without a gradient."""
        if self.n_parts == 1:
            return x_BS
        parts_PBS = self.all_to_all(x_BS.detach().expand(self.n_parts, *x_BS.shape).contiguous())
        return parts_PBS.movedim(0, 1).flatten(1, 2)

    def _exchanged(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _Exchange.apply(self.all_to_all, *tensors)


WHOLE = SequencePart(0, 1, lambda x: x)
"""A sequence that one holder has, who exchanges nothing."""


class _Exchange(torch.autograd.Function):
    """Entries go to their holders, and gradients back to where the entries came from, which is the same exchange.

    One node for all tensors: of several, autograd might choose the order, and not the same one everywhere.
    """

    @staticmethod
    def forward(ctx: Any, all_to_all: AllToAll, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.all_to_all = all_to_all
        return tuple(all_to_all(x.contiguous()) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("an exchange between the parts of a sequence")
        return None, *(ctx.all_to_all(d.contiguous()) for d in gradients)
