"""A step whose loss or gradient is not finite, on one rank and in one micro-batch only, changes nothing on any rank.

What is special: a run with such steps is compared, bit for bit and after every step, with one in which they are left
out: weights, moments, Adam's count. All cases run in two processes that are started once.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from workers import run_cases
from zero_matrix import RANKS, Case

WORKER = Path(__file__).with_name("nonfinite_worker.py")
FAULTY = [True, False, True, True, False, True, False, True, False]
CASES = [
    Case(stage, 2, bf16, 0.1, True, variant)
    for bf16 in (False, True)
    for variant, stages in {
        "": (0, 1, 2, 3),
        "cpu-optimizer": (1, 2, 3),
        "cpu-parameters": (3,),
    }.items()
    for stage in stages
]


@pytest.fixture(scope="session")
def ranks(shared_folder: Path) -> list[dict[Case, Any]]:
    """What each rank saw of each case, computed by the first of pytest's processes that asks; the others wait."""
    return run_cases(WORKER, shared_folder / "nonfinite", CASES, RANKS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_that_is_not_finite_is_as_if_left_out(ranks: list[dict[Case, Any]], case: Case) -> None:
    for rank, cases in enumerate(ranks):
        found = cases[case]
        assert not isinstance(found, str), found  # the error that ended it
        apart = {step: names for step, names in enumerate(found["differences"]) if names}
        assert not apart, f"rank {rank} differs from the run without the steps, by step: {apart}"
        assert not found["masters"]
        for faulty, result, expected in zip(FAULTY, found["results"], found["expected_results"], strict=True):
            assert result.skipped == faulty
            assert math.isfinite(result.norm) != faulty
            assert faulty or result == expected  # of what was left out there is nothing to compare
        assert found["moved"] == [not faulty for faulty in FAULTY[1:]], "the comparison is of runs that stand still"
        assert found["n_optimizer_tensors"], "no moments were compared"
