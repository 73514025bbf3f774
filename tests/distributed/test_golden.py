"""A run computes what it always has: one that an earlier version began goes on as if nothing had been.

Initial weights, hash rotations, dropout, the order of the samples, the course of the learning rate: whatever changes
one of them changes these numbers, and runs that have been begun then go on as others. Where that is meant, the file is
to be replaced by what the failure prints, and users are to be told.
"""

import json
from pathlib import Path

import pytest
from distributed.conftest import Train

GOLDEN = Path(__file__).parents[1] / "golden" / "run.json"
TAGS = ("train/loss", "train/grad_norm", "train/lr", "eval/loss", "eval/loss_without_lsh", "lsh/layer01/recovered_mass")
SETTINGS = ("model.dropout=0.1", "model.attn_dropout=0.1", "model.n_layers=3", "run.ablation_rows=5")
ROOM = 1e-4
"""Relative: rounding differs from processor to processor, and what is another function is further away."""


def test_a_run_computes_what_it_always_has(train: Train, tmp_path: Path) -> None:
    run = train(1, tmp_path / "run", *SETTINGS)
    assert run.code == 0, run.errors
    found = {tag: run.column(tag) for tag in TAGS}
    expected = json.loads(GOLDEN.read_bytes())
    for tag in TAGS:
        same = tag in expected and found[tag] == pytest.approx(expected[tag], rel=ROOM)
        assert same, f"{tag} is another; all of them now:\n{json.dumps(found)}"
