"""The gradients that histograms show are those of plain autograd, under every ZeRO stage, on each of two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import relative_error
from workers import run_cases
from zero_matrix import RANKS, Case, run_config, whole_batch

from reformer import Reformer

CASES = [
    *(Case(stage, accumulation=2, bf16=bf16) for bf16 in (False, True) for stage in (0, 1, 2, 3)),
    *(Case(stage, accumulation=2, variant="cpu-optimizer") for stage in (2, 3)),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, list[dict[str, Any]]]]:
    """What each rank saw of each case."""
    worker = Path(__file__).with_name("gradients_worker.py")
    return run_cases(worker, tmp_path_factory.mktemp("gradients"), CASES, RANKS)


def plain_gradients(case: Case, step: int) -> dict[str, torch.Tensor]:
    """Of the whole global batch in one process, from the initial weights."""
    torch.manual_seed(run_config(case).run.seed)
    model = Reformer(run_config(case).model).to(torch.bfloat16 if case.bf16 else torch.float32)
    sum(whole_batch(model, step)).backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_plain_autograd(seen: list[dict[Case, list[dict[str, Any]]]], case: Case) -> None:
    limit = 0.1 if case.bf16 else 1e-5  # seen: less than 0.04 and 2e-6
    for step in (0, 1):
        expected = plain_gradients(case, step)
        floor = 1e-3 * max(gradient.abs().max().item() for gradient in expected.values())
        for rank in seen:
            actual, norm = rank[case][step]["gradients"], rank[case][step]["norm"]
            assert actual.keys() == expected.keys()
            for name, gradient in expected.items():
                assert actual[name].shape == gradient.shape
                assert relative_error(actual[name], gradient, floor) < limit, name
            total = torch.nn.utils.get_total_norm([gradient.double() for gradient in actual.values()])
            assert norm == pytest.approx(total.item(), rel=1e-2 if case.bf16 else 1e-5)
