"""Known gradients are scaled by what the loss is scaled by, exactly."""

import pytest
import torch

from reformer.gradients import GradientSum, add_product, sums_of_products, with_gradients


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


def test_a_gradient_without_memory_of_its_own_can_be_the_first_of_a_sum() -> None:
    """As that of a bias, which autograd expands."""
    sums = GradientSum([torch.zeros(2, 3)])
    for _ in range(2):
        sums.add_known([torch.ones(3).expand(2, 3)])
    assert sums.sums[0].tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_product_of_a_sum_takes_the_place_of_what_stood_there(dtype: torch.dtype) -> None:
    (total,) = sums_of_products([torch.zeros(2, 3, dtype=dtype)])
    assert total.dtype == torch.float32
    total.fill_(torch.nan)
    a, b = torch.ones(2, 4, dtype=dtype), torch.full((4, 3), 2.0, dtype=dtype)
    for place in range(2):
        add_product(total, a, b, is_first=place == 0)
        assert total.tolist() == [[8.0 * (place + 1)] * 3] * 2


def test_a_factor_that_is_not_on_the_cpu_is_not_waited_for() -> None:
    """ "meta" stands for whatever is no CPU: there is no value to look at."""
    x = torch.zeros(3, device="meta", requires_grad=True)
    with_gradients(torch.zeros((), device="meta"), [x], [torch.ones(3, device="meta")]).backward()
    assert x.grad is not None and x.grad.shape == (3,)
