"""Ranks whose nodes see other files than those of rank 0 do not train together."""

import sys
from pathlib import Path

from distributed.conftest import free_port, run, script


def test_a_rank_with_another_configuration(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, *script(config, tmp_path / "run"), "run.eval_every=0"]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    done = run([command, [*command, "run.seed=7"]], tmp_path / "run", ranks)
    assert done.code == 2
    (line,) = (line for line in done.errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1 on ") and "run.seed is 7 and not 0. Have all nodes see the same" in line
    assert "Traceback" not in done.errors


def test_what_only_another_rank_does_not_see_names_it(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, *script(config, tmp_path / "run")]
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run([[*command, "data.store=nowhere"]], tmp_path / "run", [job | {"RANK": "1", "LOCAL_RANK": "1"}])
    assert done.code == 2
    assert (
        "error: " in done.errors and "; if rank 0 has no such error: do all nodes see the same files?)" in done.errors
    )
