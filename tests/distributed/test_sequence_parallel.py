"""Ranks that share each sequence compute the run of one process: through launch/train.py, from the store to the curves.

Gradients and updates, beside plain autograd: the cases of two parts in test_matrix.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from distributed.conftest import Run
from distributed.test_parity import BF16, CURVES, TOLERANCE, largest_difference

SHARED = "run.sequence_parallel=2"
EVALUATED = ("eval/loss_at/00016", "eval/loss_at/00256", "eval/loss_without_lsh", "eval/lsh_gain")
DROPOUT = "model.dropout=0.1"


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(1, tmp_path_factory.mktemp("reference") / "run", "deepspeed.zero_optimization.stage=0", DROPOUT)
    assert run.code == 0, run.errors
    return run


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (2, 2), (3, 2), (2, 4), (3, 4)])
def test_the_run_of_one_process(train, reference: Run, tmp_path: Path, stage: int, ranks: int) -> None:
    """Dropout, rows of unequal content, clipping; with four ranks two sequences at a time."""
    run = train(ranks, tmp_path / "run", SHARED, DROPOUT, f"deepspeed.zero_optimization.stage={stage}")
    assert run.code == 0, run.errors
    assert "2 ranks share each sequence\n" in run.output
    tags = (*CURVES, *EVALUATED, "train/param_norm")
    differences = {tag: largest_difference(run, reference, tag) for tag in tags if tag != "eval/lsh_gain"}
    print(f"\nZeRO {stage}, {ranks} ranks:", {tag: f"{value:.1e}" for tag, value in differences.items()})
    assert max(differences.values()) < TOLERANCE
    gains = zip(run.column("eval/lsh_gain"), reference.column("eval/lsh_gain"), strict=True)
    assert all(ours == pytest.approx(theirs, abs=5 * TOLERANCE) for ours, theirs in gains)  # a small difference
    assert run.column("speed/sequences_per_s") and run.column("data/skipped_rows") == []


def test_in_bf16(train, reference: Run, tmp_path: Path) -> None:
    changes = (*BF16, DROPOUT, "deepspeed.zero_optimization.overlap_comm=true")
    run, alone = (
        train(2, tmp_path / "shared", *changes, SHARED),
        train(1, tmp_path / "alone", *changes),
    )
    assert largest_difference(run, alone, "train/loss") < 2e-3
    assert largest_difference(run, reference, "train/loss") < 1e-2


def test_a_run_goes_on_shared_or_not(train, tmp_path: Path) -> None:
    """Shared again it is the same to the bit; by one process, or by ranks with sequences of their own, within 1e-5."""
    whole = train(2, tmp_path / "run", SHARED, DROPOUT)
    assert whole.code == 0, whole.errors
    for ranks, changes, room in ((2, (SHARED,), 0.0), (2, (), TOLERANCE), (1, (), TOLERANCE)):
        folder = tmp_path / f"{ranks}{len(changes)}"
        shutil.copytree(whole.dir, folder)
        shutil.rmtree(folder / "checkpoints" / "step_00000004")
        again = train(ranks, folder, DROPOUT, *changes)
        assert again.code == 0, again.errors
        assert ("note: run.sequence_parallel was 2 and is 1 now" in again.output) == (not changes)
        for tag in ("train/loss", "train/grad_norm", "train/param_norm", "eval/loss"):
            assert largest_difference(again, whole, tag) <= room, (tag, ranks, changes)


def test_a_damaged_row_is_left_out_by_all_and_counted_once(train, damaged: Path, tmp_path: Path) -> None:
    """As by a rank alone: the run is the same."""

    changes = (f"data.store={damaged}", "data.on_damage=skip", "run.eval_every=0")
    alone, shared = train(1, tmp_path / "alone", *changes), train(2, tmp_path / "shared", *changes, SHARED)
    assert alone.code == shared.code == 0, shared.errors
    assert shared.column("data/skipped_rows") == alone.column("data/skipped_rows")
    assert max(alone.column("data/skipped_rows")) > 0
    assert max(largest_difference(shared, alone, tag) for tag in ("train/loss", "train/grad_norm")) < TOLERANCE
    states = [run.dir / "checkpoints/step_00000004/state.json" for run in (alone, shared)]
    counted = [json.loads(state.read_text())["progress"]["skipped_rows"] for state in states]
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("ranks", "n_parts", "what"), [(1, 2, "the number of ranks, 1"), (3, 3, "model.n_heads, 2 and")]
)
def test_what_cannot_be_shared_is_refused(train, tmp_path: Path, ranks: int, n_parts: int, what: str) -> None:
    run = train(ranks, tmp_path / "run", f"run.sequence_parallel={n_parts}")
    assert run.code == 2
    assert f"error: run.sequence_parallel={n_parts} does not divide {what}" in run.errors
    assert "Traceback" not in run.errors and not run.dir.exists()
