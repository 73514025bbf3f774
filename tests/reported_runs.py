"""Runs that launch/report.py reads, written without a training, and the command itself."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from report import main

from data_pipeline.store import Store


def lsh(*recovered: float) -> dict[str, float]:
    """What an evaluation says of LSH layers 1, 3, …"""
    masses = {f"lsh/layer{2 * i + 1:02d}/recovered_mass": mass for i, mass in enumerate(recovered)}
    return {**masses, "lsh/layer01/empty_buckets": 0.0}


def make_run(folder: Path, store: Path) -> None:
    folder.mkdir(parents=True)
    fingerprint = Store.open(store).manifest.fingerprint
    config = {
        "model": {"vocab_size": 258, "max_seq_len": 100},
        "data": {"store": str(store), "mixture": {"web": {"store": str(store), "weight": 1, "eval_split": "val"}}},
        "run": {"dir": str(folder), "deepspeed_config": "x.json", "steps": 2},
    }
    record = {
        "config": config,
        "continued": [],
        "deepspeed": {},
        "store": {"fingerprint": fingerprint, "seq_len": 100},
        "samples": {"web.store": fingerprint},
        "launch": {"device": "cpu", "world_size": 1},
        "evaluated": {name: {"rows": "a", "n_hashes": None, "since": 0} for name in ("", "web")},
        "versions": {},
        "git_commit": None,
    }
    (folder / "run.json").write_text(json.dumps(record))
    speed = {"speed/tokens_per_s": 100.0, "memory/peak_gib": 1.25, "speed/mfu": 0.3125, "speed/save_share": 0.0625}
    health = {"train/skipped_steps": 3, "train/spikes": 4}
    lines = [
        {"step": 0, "eval/loss": 5.5, "eval/bits_per_byte": 8.125, "eval/loss_at/00016K": 5.75, **lsh(0.25, 0.5)},
        {"step": 1, "train/loss": 5.25, "train/bits_per_byte": 8.25, **speed},
        {"step": 2, "train/loss": 2.5, "train/bits_per_byte": 3.75, **speed, **health},
        {"step": 2, "eval/loss": 2.75, "eval/bits_per_byte": 4.0625, "eval/loss_at/00016K": 2.25, "eval/lsh_gain": 0.5}
        | {"eval/source/web/loss": 3.0, "eval/source/web/bits_per_byte": 5.5}
        | lsh(0.75, 0.875),
    ]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(whole + '{"step": 3, "train/lo')  # the run goes on, or was killed


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, in this process: a new one would import for two seconds."""
    words, out, errors = ["launch/report.py", *map(str, arguments)], io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(errors):
        code = main()
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())
