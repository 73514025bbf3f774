"""Checks of arguments: token ids, heads [B, H, T, D] of every inner attention, and masks that fit."""

from collections.abc import Mapping

import torch
from torch import Tensor

INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
"""What token ids may be; a tokenizer's are unsigned."""


def check_heads(heads: Mapping[str, Tensor], key_padding_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raises ValueError unless all heads are [B, H, T, D] of one floating-point dtype and masks [B, T] fit."""
    first = next(iter(heads.values()))
    names = " and ".join(heads)
    if first.ndim != 4 or 0 in first.shape or any(x.shape != first.shape for x in heads.values()):
        shapes = " and ".join(str(list(x.shape)) for x in heads.values())
        raise ValueError(f"{names} must all be [B, H, T, D], each at least 1, got {shapes}")
    if not first.is_floating_point() or any(x.dtype != first.dtype for x in heads.values()):
        raise ValueError(f"{names} must have one floating-point dtype, got {[x.dtype for x in heads.values()]}")
    shape = [first.shape[0], first.shape[2]]
    for name, mask in (("key_padding_mask", key_padding_mask), ("segment_ids", segment_ids)):
        if mask is not None and list(mask.shape) != shape:
            raise ValueError(f"{name} must be [B, T] = {shape}, got {list(mask.shape)}")
        if mask is not None and mask.is_floating_point():
            kinds = "integers or booleans" if mask is key_padding_mask else "integers"
            raise ValueError(f"{name} must be {kinds}, got {mask.dtype}")


def check_is_tensor(tokens: Tensor) -> None:
    """Raises ValueError for a list, or an array of numpy's."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"tokens must be a torch tensor of integers, got {type(tokens).__name__}: use torch.as_tensor")


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raises ValueError unless they are integers and, on a CPU, ids below vocab_size.

    A GPU would have to be waited for; its kernels stop at others.
    """
    check_is_tensor(tokens)
    if tokens.dtype not in INTEGERS:
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if tokens.device.type != "cpu":
        return
    least, most = (int(bound) for bound in tokens.long().aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"the tokens are from {least} to {most}, expected ids from 0 to {vocab_size - 1} "
            f"(vocab_size={vocab_size}): encode the text with the tokenizer that the model was trained with"
        )


def check_chunk_len(chunk_len: int) -> None:
    """Raises ValueError unless it is a length."""
    if not isinstance(chunk_len, int) or chunk_len < 1:
        raise ValueError(f"chunk_len={chunk_len!r} must be an int of at least 1")
