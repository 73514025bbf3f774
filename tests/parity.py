"""Correctness as a number: how far one tensor is from another, relative to the other's size."""

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """max |actual - expected| / max(max |expected|, floor); NaN and inf count as infinitely far."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    scale = max(expected.abs().max().item(), floor)
    difference = (actual - expected).abs().max().item()
    return difference / scale if scale else difference


def assert_parity(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every named tensor agrees within the tolerance; says each one's error when any does not.

    An error is relative to the tensor's own size, but no smaller than 1e-3 of the largest tensor compared: a
    gradient that is zero but for rounding has no size of its own.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(tensor.abs().max().item() for tensor in expected.values())
    errors = {name: relative_error(actual[name], expected[name], floor) for name in expected}
    assert max(errors.values()) <= tolerance, "\n".join(f"{name}: {error:.2e}" for name, error in errors.items())


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters' gradients by name, cleared from the module."""
    found = {}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name], parameter.grad = parameter.grad, None
    return found
