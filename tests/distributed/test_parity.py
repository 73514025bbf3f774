"""One process and two compute the same run, under every ZeRO stage, clipping included, on rows of unequal content."""

import math
from pathlib import Path

import pytest
import torch

from data_pipeline.dataset import RowDataset
from data_pipeline.store import Store
from reformer import Reformer, ReformerConfig
from trainer.batches import drawn

TOLERANCE = 1e-5
"""Relative; the differences seen are below 5e-7."""
BF16 = ("deepspeed.bf16.enabled=true", "deepspeed.data_types.grad_accum_dtype=fp32")
DIAGNOSTICS = ("largest_bucket_over_mean", "empty_buckets", "recovered_mass")
CURVES = (
    *("train/loss", "train/grad_norm", "train/bits_per_byte", "eval/loss", "eval/bits_per_byte"),
    *(f"lsh/layer01/{name}" for name in DIAGNOSTICS),
)


def largest_difference(a, b, tag: str) -> float:
    first, second = a.column(tag), b.column(tag)
    assert len(first) == len(second) > 0
    return max(abs(x / y - 1) for x, y in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """The run that all others must equal: one process, no ZeRO."""
    run = train(1, tmp_path_factory.mktemp("reference") / "run", "deepspeed.zero_optimization.stage=0")
    assert run.code == 0, run.errors
    return run


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (2, 2), (3, 1), (3, 2)])
def test_every_stage_and_number_of_ranks_gives_the_same_run(train, reference, tmp_path: Path, stage: int, ranks: int):
    run = train(ranks, tmp_path / "run", f"deepspeed.zero_optimization.stage={stage}")
    assert run.code == 0, run.errors
    differences = {tag: largest_difference(run, reference, tag) for tag in CURVES}
    print(f"\nZeRO {stage}, {ranks} ranks:", {tag: f"{value:.1e}" for tag, value in differences.items()})
    assert max(differences.values()) < TOLERANCE
    assert min(reference.column("train/grad_norm")) > 0.5, "clipping is not active"
    errors = run.column("reversible/reconstruction_error")
    assert len(errors) == 2 and min(errors) > 0 and max(errors) < 1e-4


def test_zero_3_without_parameters_that_stay_gives_the_same_run(train, reference, tmp_path: Path):
    """By default ZeRO-3 keeps parameters as small as these on every rank; here all are gathered for each use."""
    threshold = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
    run = train(2, tmp_path / "run", "deepspeed.zero_optimization.stage=3", threshold)
    assert run.code == 0, run.errors
    assert max(largest_difference(run, reference, tag) for tag in CURVES) < TOLERANCE
    assert max(run.column("reversible/reconstruction_error")) < 1e-4


@pytest.mark.parametrize("changes", [("deepspeed.train_micro_batch_size_per_gpu=2",), ("model.dropout=0.1",)])
def test_micro_batch_size_and_dropout_do_not_depend_on_the_ranks(train, tmp_path: Path, changes):
    one, two = (train(ranks, tmp_path / f"run{ranks}", *changes) for ranks in (1, 2))
    assert max(largest_difference(one, two, tag) for tag in CURVES) < 10 * TOLERANCE


def test_what_is_seen_of_a_run_changes_nothing_in_it(train, tmp_path: Path):
    """Evaluations, samples and histograms, under ZeRO-3, which remembers the order of a step's passes."""
    changes = ("model.dropout=0.1", "deepspeed.zero_optimization.stage=3", "run.save_every=0")
    seen = ("run.eval_every=2", "run.histogram_every=2", "run.sample_tokens=3")
    runs = [
        train(2, tmp_path / name, *changes, *more)
        for name, more in (("seen", seen), ("unseen", ("run.eval_every=0", "run.diagnostics=false")))
    ]
    for tag in ("train/loss", "train/grad_norm", "train/param_norm"):
        first, second = (run.column(tag) for run in runs)
        assert first == second and len(first) == 4, [run.errors for run in runs]
    assert len(runs[0].column("eval/loss")) == 3 and not runs[1].column("eval/loss")


def test_bf16_with_overlapping_communication(train, reference, tmp_path: Path):
    changes = (*BF16, "deepspeed.zero_optimization.overlap_comm=true")
    one, two = (train(ranks, tmp_path / f"run{ranks}", *changes) for ranks in (1, 2))
    assert largest_difference(one, two, "train/loss") < 2e-3
    assert largest_difference(two, reference, "train/loss") < 1e-2


def test_bf16_without_zero_takes_no_step_too_many(train, tmp_path: Path):
    """DeepSpeed's wrapper does (see build_engine), and the second loss shows it."""
    plain, sharded = (
        train(1, tmp_path / f"run{stage}", "deepspeed.bf16.enabled=true", f"deepspeed.zero_optimization.stage={stage}")
        for stage in (0, 1)
    )
    assert largest_difference(plain, sharded, "train/loss") < 1e-4


def test_evaluation_is_exact(reference, store: Path):
    """The first evaluation again, by hand: unequal rows, drawn, as many as two ranks cannot share evenly."""
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=258,
        max_seq_len=256,
        d_model=32,
        n_layers=2,
        n_heads=2,
        n_hashes=2,
        lsh_chunk_len=32,
        local_chunk_len=32,
    )
    model = Reformer(config).eval()
    opened = Store.open(store)
    rows = RowDataset(opened, "val")
    nll = n_tokens = n_bytes = 0.0
    counts = set()
    with torch.no_grad():
        for sample in (rows[i] for i in drawn(len(rows), 5)):
            valid = sample.labels[sample.labels >= 0]
            logits = model(sample.tokens[None], segment_ids=sample.segment_ids[None])[0]
            log_probs = logits.double().log_softmax(-1)[sample.labels >= 0]
            nll -= log_probs.gather(1, valid[:, None]).sum().item()
            n_tokens += len(valid)
            n_bytes += opened.token_bytes[valid.numpy()].sum()
            counts.add(len(valid))
    assert len(counts) > 1
    first = reference.metrics[0]
    assert first["step"] == 0
    assert first["eval/loss"] == pytest.approx(nll / n_tokens, rel=1e-6)
    assert first["eval/bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)


def test_srun_gives_the_same_run(train_by_srun, reference, tmp_path: Path):
    """Two processes that find each other through SLURM's variables alone, as srun would start them."""
    run = train_by_srun(2, tmp_path / "run")
    assert run.code == 0, run.errors
    assert run.output.startswith("SLURM job ")
    assert max(largest_difference(run, reference, tag) for tag in CURVES) < TOLERANCE
