"""Ranks whose nodes see other files than those of rank 0 do not train together."""

from pathlib import Path

from distributed.conftest import run_forks, script, torchrun_variables


def test_a_rank_with_another_configuration(config: Path, tmp_path: Path) -> None:
    words = [*script(config, tmp_path / "run"), "run.eval_every=0"]
    done = run_forks([words, [*words, "run.seed=7"]], tmp_path / "run", torchrun_variables(2))
    assert done.code == 2
    (line,) = (line for line in done.errors.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1 on ") and "run.seed is 7 and not 0. Have all nodes see the same" in line
    assert "Traceback" not in done.errors


def test_what_only_another_rank_does_not_see_names_it(config: Path, tmp_path: Path) -> None:
    words = [*script(config, tmp_path / "run"), "data.store=nowhere"]
    done = run_forks([words], tmp_path / "run", torchrun_variables(2)[1:])
    assert done.code == 2
    assert (
        "error: " in done.errors and "; if rank 0 has no such error: do all nodes see the same files?)" in done.errors
    )
