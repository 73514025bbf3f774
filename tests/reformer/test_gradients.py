"""Known gradients are scaled by what the loss is scaled by, exactly."""

import pytest
import torch

from reformer.gradients import GradientSum, with_gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_is_not_rounded_to_the_gradients_dtype(dtype: torch.dtype) -> None:
    """A third is off by 0.1% in bf16; all gradients of a head would be off by the same factor."""
    torch.manual_seed(0)
    x, known = torch.zeros(1000, dtype=dtype, requires_grad=True), torch.randn(1000, dtype=dtype)
    (with_gradients(torch.zeros(()), [x], [known.clone()]) * (1 / 3)).backward()
    third = torch.tensor(1 / 3)
    expected = known * third if dtype == torch.float64 else (known.float() * third).to(dtype)
    assert torch.equal(x.grad, expected)


def test_gradients_are_handed_over_once() -> None:
    x = torch.zeros(3, requires_grad=True)
    value = with_gradients(torch.zeros(()), [x], [torch.ones(3)])
    value.backward()
    with pytest.raises(RuntimeError, match="handed over already: run the forward again"):
        value.backward()


def test_sums_over_chunks_call_no_hook_of_the_parameters() -> None:
    parameter, called = torch.ones(3, requires_grad=True), []
    parameter.register_hook(called.append)
    sums = GradientSum([parameter])
    for _ in range(2):
        x = torch.full((3,), 5.0, requires_grad=True)
        sums.add((sums.aliases[0] * x).sum(), [x])
    assert not called and sums.sums[0].tolist() == [10.0, 10.0, 10.0]
