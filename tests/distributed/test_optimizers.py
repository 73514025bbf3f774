"""Adafactor computes what torch's does on plain autograd; weight decay is for matrices, under every ZeRO stage.

What is special: one pair of processes takes the steps of all cases. That Adafactor goes on from a checkpoint to the bit
is in test_state.py.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from workers import run_cases
from zero_matrix import CLIP, LR_FACTORS, OPTIMIZERS, RANKS, Case, Outcome, plain_run, ratios

LIMITS = {False: (1e-6, 1e-6, 1e-4, 1e-6), True: (2e-4, 5e-3, 0.1, 2.5e-3)}
"""Of loss, norm, update and the update's scale, in fp32 and in bf16, as in test_matrix.py."""
ADAFACTOR = partial(Case, 0, optimizer="Adafactor")
LEARNING = [ADAFACTOR(accumulation, bf16, 0.1) for accumulation in (1, 2) for bf16 in (False, True)]
DECAYING = [*(Case(stage) for stage in (0, 1, 2, 3)), ADAFACTOR()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Case, bool], list[Outcome]]:
    """What each rank saw, by case and whether there was something to learn."""
    jobs = [*((case, True) for case in LEARNING), *((case, False) for case in DECAYING)]
    worker = Path(__file__).with_name("optimizer_worker.py")
    by_rank = run_cases(worker, tmp_path_factory.mktemp("optimizers"), jobs, RANKS)
    return dict(zip(jobs, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, tuple[float, ...]]]:
    """Filled by the tests and printed when they are done."""
    rows: dict[str, tuple[float, ...]] = {}
    yield rows
    print(f"\n\n{'Adafactor':40}{'loss':>9}{'norm':>9}{'update':>9}{'scale':>9}")
    for name, numbers in rows.items():
        print(f"{name:40}" + "".join(f"{number:9.1e}" for number in numbers))


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_adafactor_equals_torchs_on_plain_autograd(results: Any, table: Any, case: Case) -> None:
    outcome, other = results[case, True]
    assert outcome.norms == other.norms
    for ours, theirs in zip(outcome.starts, other.starts, strict=True):  # each rank updates weights of its own
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert min(outcome.norms) > CLIP, "clipping is not active"
    # In bf16 two runs part when a token moves to another bucket: there each step is compared by itself.
    expected = plain_run(case.plain, outcome.starts if case.bf16 else None)
    found = table[str(case)] = ratios(outcome, expected)
    assert all(ratio < limit for ratio, limit in zip(found, LIMITS[case.bf16], strict=True)), found


def test_what_the_limits_tell_apart() -> None:
    """A clip 5% too low, second moments that are not factored, and ones that are of the last step alone."""
    case = LEARNING[0]
    expected = plain_run(case)
    clipped = ratios(plain_run(case, expected.starts, clip=0.95 * CLIP), expected)
    flat = ratios(plain_run(case, expected.starts, make_optimizer=flattened), expected)
    forgetful = partial(torch.optim.Adafactor, **OPTIMIZERS["Adafactor"], beta2_decay=0.0)
    forgotten = ratios(plain_run(case, expected.starts, make_optimizer=forgetful), expected)
    assert clipped[3] > 10 * LIMITS[False][3], clipped
    assert min(forgotten[2:]) > 10 * LIMITS[False][3], forgotten
    assert min(flat[2:]) > 10 * LIMITS[False][3], flat


def flattened(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adafactor on parameters that are vectors, as those of ZeRO are."""
    whole = [parameter for group in groups for parameter in group["params"]]
    flat = [parameter.data.view(-1) for parameter in whole]
    for vector, parameter in zip(flat, whole, strict=True):
        vector.grad = parameter.grad.view(-1)
    return torch.optim.Adafactor(flat, **OPTIMIZERS["Adafactor"])


@pytest.mark.parametrize("case", DECAYING, ids=str)
def test_weight_decay_is_for_matrices(results: Any, case: Case) -> None:
    """With gradients of zero, decay is all there is: a factor on each matrix, and nothing on the rest."""
    settings = OPTIMIZERS[case.optimizer]
    for outcome in results[case, False]:
        for step, factor in enumerate(LR_FACTORS):
            before, after = outcome.starts[step : step + 2]
            kept = 1 - factor * settings["lr"] * settings["weight_decay"]
            for name, weight in before.items():
                if weight.ndim > 1 and "embedding" not in name and "position" not in name:
                    assert torch.allclose(after[name], weight * kept, rtol=1e-6, atol=0), name
                else:
                    assert torch.equal(after[name], weight), name
