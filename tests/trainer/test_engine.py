"""What the trainer computes beside DeepSpeed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.engine import _gradient_norm, set_learning_rate


def test_the_gradient_norm_of_millions_of_numbers_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 3000), nn.Linear(3000, 10))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) + 0.5
    exact = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert float(_gradient_norm(model)) == pytest.approx(exact.item(), rel=1e-12)


def test_the_learning_rate_is_that_of_both_parts_of_an_optimizer() -> None:
    """ZeRO-3 with `offload_optimizer.ratio` updates what stays on the GPU by an optimizer of its own."""
    weight = nn.Parameter(torch.zeros(1))
    parts = [torch.optim.AdamW([{"params": [weight]}], lr=1.0) for _ in range(2)]
    set_learning_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=parts[0].param_groups)), 0.5)
    assert [part.param_groups[0]["lr"] for part in parts] == [0.5, 1.0]
    both = SimpleNamespace(param_groups=parts[0].param_groups, backup_optimizer=parts[1])
    set_learning_rate(SimpleNamespace(optimizer=both), 0.1)
    assert [part.param_groups[0]["lr"] for part in parts] == [0.1, 0.1]
