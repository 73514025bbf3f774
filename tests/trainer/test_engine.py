"""What the trainer computes beside DeepSpeed."""

import pytest
import torch
from torch import nn

from trainer.engine import _gradient_norm


def test_the_gradient_norm_of_millions_of_numbers_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1000, 3000), nn.Linear(3000, 10))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) + 0.5
    exact = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    assert float(_gradient_norm(model)) == pytest.approx(exact.item(), rel=1e-12)
