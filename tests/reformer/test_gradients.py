"""Known gradients are scaled by what the loss is scaled by, exactly."""

import pytest
import torch

from reformer.gradients import with_gradients


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_factor_is_not_rounded_to_the_gradients_dtype(dtype: torch.dtype) -> None:
    """A third is off by 0.1% in bf16; all gradients of a head would be off by the same factor."""
    torch.manual_seed(0)
    x, known = torch.zeros(1000, dtype=dtype, requires_grad=True), torch.randn(1000, dtype=dtype)
    (with_gradients(torch.zeros(()), [x], [known.clone()]) * (1 / 3)).backward()
    third = torch.tensor(1 / 3)
    expected = known * third if dtype == torch.float64 else (known.float() * third).to(dtype)
    assert torch.equal(x.grad, expected)
