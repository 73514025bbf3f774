"""A rank that is killed takes the others with it, soon, and what they say names what happened."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

LIMIT_S = 60
"""In which the others must have ended; most of it is for machines that are busy with other tests."""


def killed_at_step(run_dir: Path, rank: int, step: int, ended: list[float]) -> None:
    """Kill a rank as soon as it has come to a step, and note when."""
    path = run_dir / "ranks" / f"rank_{rank:05d}.json"
    while not ended:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {"step": 0}
        if state["step"] >= step:
            os.kill(state["pid"], signal.SIGKILL)
            ended.append(time.monotonic())
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["train_by_srun", "train_by_deepspeed"])
def test_a_killed_rank_ends_the_run(launcher: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    train = request.getfixturevalue(launcher)
    ended: list[float] = []
    killer = threading.Thread(target=killed_at_step, args=(tmp_path / "run", 1, 3, ended))
    killer.start()
    # Step 3 begins when the checkpoint after step 2 is there.
    options = ("run.steps=100000", "run.save_every=2", "run.eval_every=0")
    try:
        run = train(2, tmp_path / "run", *options)
        after_s = time.monotonic() - ended[0] if ended else 0.0
    finally:
        ended.append(0.0)
        killer.join()
    assert len(ended) == 2, f"it ended by itself: {run.errors}"
    assert run.code > 0
    assert after_s < LIMIT_S
    assert re.search(r"rank 1 \(pid \d+ on .+\) was killed, .*; last seen in '.+' of step \d+, at ", run.errors), (
        run.errors
    )
    assert f"the same command goes on from {tmp_path / 'run' / 'checkpoints' / 'step_'}" in run.errors
