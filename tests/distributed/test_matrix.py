"""The same losses, gradient norms and updates under every ZeRO stage as from plain autograd in one process.

What is special: all cases run in two processes that are started once, since DeepSpeed takes longer to import than a
case to run, and each case is a test of its own. With -s a table of all of them is printed at the end.

In fp32 the plain run goes its own way from the same initial weights. In bf16 a difference in the last bit moves tokens
to other buckets, and two runs part after a step, however exact both are: there each step is compared by itself, from
the weights that the run under DeepSpeed had. Each rank's gradient is then rounded to bf16 for every micro-batch, and
once more for being summed over ranks, where the plain one is rounded once.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nvme
import pytest
import torch
from workers import run_cases
from zero_matrix import (
    CLIP,
    LR_FACTORS,
    MATRIX,
    RANKS,
    Case,
    mean_of_means,
    plain_run,
    ratios,
    sample_by_sample,
    whole_batch,
)

LIMITS = {False: (1e-6, 1e-6, 1e-4, 1e-6), True: (2e-4, 5e-3, 0.1, 2.5e-3)}
"""Of loss, norm, update and the update's scale, in fp32 and in bf16. Seen: 1.9e-7, 2.3e-7, 3.5e-5 (an update is a
hundredth of the weight that it is subtracted from), 8.1e-8 and 1.7e-7, 1.9e-3, 4.0e-2, 5.1e-4; 3.5e-5 of the loss where
a token changed buckets."""
VARIANTS = [
    Case(stage, 2, bf16, 0.1, True, variant, n_parts=n_parts)
    for bf16 in (False, True)
    for variant, stages in {
        "overlap": (1, 2),  # the default is not to overlap under ZeRO 1 and 2, and to do so under ZeRO-3
        "no-overlap": (3,),
        "prefetch": (3,),
        "cpu-optimizer": (1, 2, 3),
        "cpu-parameters": (3,),
    }.items()
    for stage in stages
    for n_parts in ((1, RANKS) if variant in ("overlap", "prefetch") else (1,))
]
NVME = [
    Case(3, 2, bf16, 0.1, False, f"nvme-{part}", large=True)
    for bf16, part in ((False, "optimizer"), (True, "optimizer"), (True, "parameters"))
]
"""Not parameters in fp32: on a CPU without fp16, DeepSpeed would round them to bf16, so that is refused."""

Ratios = tuple[float, float, float, float]
Result = dict[str, Any]
"""What a rank saw of a case: see matrix_worker.run."""


@pytest.fixture(scope="session")
def results(shared_folder: Path) -> dict[Case, list[Result]]:
    """What each rank saw of each case, computed by the first of pytest's processes that asks; the others wait."""
    return by_case([*MATRIX, *VARIANTS], shared_folder / "matrix")


@pytest.fixture(scope="session")
def nvme_results(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, list[Result]]:
    """The same of the cases that offload to a drive."""
    if reason := nvme.why_not():
        pytest.skip(reason)
    return by_case(NVME, tmp_path_factory.mktemp("nvme"))


def by_case(cases: list[Case], folder: Path) -> dict[Case, list[Result]]:
    ranks = run_cases(Path(__file__).with_name("matrix_worker.py"), folder, cases, RANKS)
    return {case: [rank[case] for rank in ranks] for case in cases}


@cache
def plain(case: Case) -> Any:
    return plain_run(case)


def measure(case: Case, ranks: list[Result]) -> Ratios:
    """A case's differences to plain autograd, after what must be equal bit for bit."""
    for rank in ranks:
        assert not isinstance(rank, str), rank  # the error that ended it
        for name, master in rank["masters"].items():
            weight = rank["weights"][name]
            assert torch.equal(weight, master.to(weight.dtype)), f"{name} is not what the optimizer made of it"
    outcome = ranks[0]["outcome"]
    for other in ranks[1:]:  # under ZeRO-0 each rank updates masters of its own: nothing but this finds them apart
        assert other["outcome"].norms == outcome.norms, "ranks clip by different norms"
        seen = zip([*outcome.starts, ranks[0]["masters"]], [*other["outcome"].starts, other["masters"]], strict=True)
        for step, (ours, theirs) in enumerate(seen):
            apart = [name for name in ours if not torch.equal(ours[name], theirs[name])]
            assert not apart, f"ranks differ after {step} steps in {apart}"
    assert min(outcome.norms) > CLIP, "clipping is not active"
    expected = plain_run(case, outcome.starts) if case.bf16 else plain(case.plain)
    return ratios(outcome, expected)


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, Ratios]]:
    """Filled by the tests and printed when they are done."""
    rows: dict[str, Ratios] = {}
    yield rows
    print(f"\n\n{'case':62}{'loss':>9}{'norm':>9}{'update':>9}{'scale':>9}")
    for name, numbers in rows.items():
        print(f"{name:62}" + "".join(f"{number:9.1e}" for number in numbers))


@pytest.mark.parametrize("case", [*MATRIX, *VARIANTS], ids=str)
def test_zero_equals_plain_autograd(results: dict[Case, list[Result]], table: dict[str, Ratios], case: Case) -> None:
    found = table[str(case)] = measure(case, results[case])
    print(f"\n{case}: loss {found[0]:.1e}, norm {found[1]:.1e}, update {found[2]:.1e}, scale {found[3]:.1e}")
    assert all(ratio < limit for ratio, limit in zip(found, LIMITS[case.bf16], strict=True)), found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_rank_that_ends_elsewhere_is_found(results: dict[Case, list[Result]], bf16: bool) -> None:
    case = Case(0, bf16=bf16)
    first, second = results[case]
    masters = {name: 3 * master for name, master in second["masters"].items()}
    weights = {name: masters[name].to(weight.dtype) for name, weight in second["weights"].items()}
    with pytest.raises(AssertionError, match="ranks differ after 3 steps"):
        measure(case, [first, {**second, "masters": masters, "weights": weights}])


@pytest.mark.parametrize("case", NVME, ids=str)
def test_offloaded_to_a_drive(nvme_results: dict[Case, list[Result]], table: dict[str, Ratios], case: Case) -> None:
    found = table[str(case)] = measure(case, nvme_results[case])
    assert nvme_results[case][0]["bytes_on_drive"].keys() >= {"optimizer", case.variant.removeprefix("nvme-")}
    assert all(ratio < limit for ratio, limit in zip(found, LIMITS[case.bf16], strict=True)), found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_what_the_limits_tell_apart(table: dict[str, Ratios], bf16: bool) -> None:
    """The order of additions is within them; a mean of means, bf16 for fp32, and a clip 5% too low are far outside.

    In bf16 nothing but the scale tells the last one from rounding.
    """
    case = Case(0, bf16=bf16)
    expected = plain_run(case)
    reordered = table[f"plain {case}, sample by sample"] = ratios(
        plain_run(case, expected.starts, sample_by_sample), expected
    )
    wrong = table[f"plain {case}, mean of means"] = ratios(plain_run(case, expected.starts, mean_of_means), expected)
    other = table[f"plain {case}, other dtype"] = ratios(
        plain_run(replace(case, bf16=not bf16), expected.starts, whole_batch), expected
    )
    clipped = table[f"plain {case}, clipped to 5% less"] = ratios(
        plain_run(case, expected.starts, whole_batch, clip=0.95 * CLIP), expected
    )
    assert all(ratio < limit for ratio, limit in zip(reordered, LIMITS[bf16], strict=True)), reordered
    assert all(ratio > 3 * limit for ratio, limit in zip(wrong, LIMITS[bf16], strict=True)), wrong
    assert other[2] > 3 * LIMITS[bf16][2], other
    assert clipped[3] > 10 * LIMITS[bf16][3], clipped


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_gradient_is_handed_over_once_per_backward(results: dict[Case, list[Result]], stage: int) -> None:
    """Hooks on the parameters themselves count, beside DeepSpeed's own, which it registers in the same way."""
    for case, ranks in results.items():
        if case.stage == stage:
            for rank in ranks:
                calls = rank["gradient_calls"]
                assert calls == dict.fromkeys(rank["weights"], case.accumulation * len(LR_FACTORS)), case


def test_zero_3_fetches_ahead_and_lets_go(results: dict[Case, list[Result]]) -> None:
    """Each parameter is gathered anew in most passes, and most are asked for before their layer needs them."""
    for case, ranks in results.items():
        if case.variant == "prefetch":
            n_parameters = sum(weight.numel() for weight in ranks[0]["weights"].values())
            fetched = ranks[0]["fetched"]
            assert fetched["forward_all_gather"] > 5 * n_parameters
            assert fetched["forward_prefetch_submit"] > fetched["forward_all_gather"] / 2
