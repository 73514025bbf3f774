"""Memory that attention computes in, which calls of one size after another share.

A layer takes a long sequence through attention a few heads at a time. Were each call to take its memory anew, the
system would clear it page by page: of the 18 GiB of fresh pages in a step of two layers at 262,144 tokens nearly half
were for this (measured).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_shared: ContextVar[dict[int, Tensor] | None] = ContextVar("shared scratch", default=None)


@contextmanager
def shared_scratch() -> Iterator[None]:
    """Inside, `scratch` gives the same memory again and again. It is freed at the end, and belongs to one thread."""
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def scratch(like: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Tensors of these shapes on like's device, to be written before they are read.

    Within `shared_scratch` they are the caller's until anyone asks again: the i-th of one call has the memory of the
    i-th of another, as long as that is of the same dtype and device and large enough; otherwise it is freed for more.
    """
    kept = _shared.get()
    if kept is None:
        return [like.new_empty(shape, dtype=dtype) for shape in shapes]
    tensors = []
    for place, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        memory = kept.pop(place, None)
        if memory is None or memory.numel() < size or memory.dtype != dtype or memory.device != like.device:
            memory = None  # freed before more is taken
            memory = like.new_empty(size, dtype=dtype)
        kept[place] = memory
        tensors.append(memory[:size].view(shape))
    return tensors
