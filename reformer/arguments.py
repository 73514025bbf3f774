"""Checks of arguments: token ids, heads [B, H, T, D] of every inner attention, masks that fit, numbers and switches."""

import operator
from collections.abc import Mapping
from typing import SupportsIndex

import torch
from torch import Tensor

INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
"""What token ids may be; a tokenizer's are unsigned."""


def check_heads(heads: Mapping[str, Tensor], key_padding_mask: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raises ValueError unless all heads are [B, H, T, D] of one floating-point dtype and masks [B, T] fit."""
    for name, x in heads.items():
        check_is_tensor(x, name, "floating-point numbers")
    if key_padding_mask is not None:
        check_is_tensor(key_padding_mask, "key_padding_mask", "integers or booleans")
    if segment_ids is not None:
        check_is_tensor(segment_ids, "segment_ids")
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


def check_is_tensor(given: Tensor, name: str = "tokens", kind: str = "integers") -> None:
    """Raises ValueError for a list, or an array of numpy's."""
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a torch tensor of {kind}, got {type(given).__name__}: use torch.as_tensor")


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


def whole_number(name: str, value: SupportsIndex) -> int:
    """The number, of whatever type: NumPy's and a tensor of one are taken too.

    Raises TypeError for booleans and floating-point numbers.
    """
    try:
        if not (isinstance(value, bool) or is_boolean(value)):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}={value!r} must be a whole number, got {type(value).__name__}")


def length(name: str, value: SupportsIndex) -> int:
    """The whole number. Raises ValueError unless it is one of at least 1."""
    try:
        number = whole_number(name, value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be an int of at least 1")
    return number


def is_boolean(value: object) -> bool:
    """Whether its type is NumPy's or PyTorch's boolean."""
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def switch(name: str, value: object) -> bool:
    """The boolean, NumPy's too. Raises ValueError for anything else, such as a text, which would count as True."""
    if isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", "")) == "bool" and getattr(value, "shape", None) == ():
        return bool(value)  # not a tensor's, which would have to come from its device
    raise ValueError(f"{name}={value!r} must be True or False")
