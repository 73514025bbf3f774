"""What every inner attention asks of its arguments: heads [B, H, T, D], and masks that fit."""

from collections.abc import Mapping

from torch import Tensor


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
    if segment_ids is not None and segment_ids.is_floating_point():
        raise ValueError(f"segment_ids must be integers, got {segment_ids.dtype}")


def check_chunk_len(chunk_len: int) -> None:
    """Raises ValueError unless it is a length."""
    if not isinstance(chunk_len, int) or chunk_len < 1:
        raise ValueError(f"chunk_len={chunk_len} must be a whole number of at least 1")
