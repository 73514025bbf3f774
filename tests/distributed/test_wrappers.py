"""A model in PyTorch's own wrappers, on two ranks, has the gradients of one process: what docs/library.md says."""

from pathlib import Path

import pytest
import torch
from distributed.wrappers_worker import RANKS, STEPS, WRAPPERS, batch
from parity import assert_parity, gradients
from small_models import small_model
from torch import Tensor
from workers import run_workers


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank has, by wrapper."""
    folder = tmp_path_factory.mktemp("wrappers")
    arguments = [(folder / "rendezvous", folder / f"rank{rank}", rank) for rank in range(RANKS)]
    run_workers(Path(__file__).with_name("wrappers_worker.py"), folder, arguments)
    return [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_are_those_of_one_process(seen: list[dict[str, dict[str, Tensor]]], wrapper: str) -> None:
    model = small_model()
    for step in range(STEPS):
        for row in batch(step).split(1):
            (model(row, row, step=step) / RANKS).backward()
    expected = gradients(model)
    for rank in seen:
        assert_parity(rank[wrapper], expected, 1e-9)
