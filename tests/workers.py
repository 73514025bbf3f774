"""A script in several processes that are the ranks of one process group, which meet through a file."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import warm_start

TESTS = Path(__file__).parent


def run_workers(script: Path, folder: Path, arguments: Sequence[Sequence[object]], timeout_s: float = 400) -> None:
    """`python SCRIPT ARGUMENTS` for each list of arguments, side by side and started warm, until all have ended well.

    They run in `folder` and write to the file `log` in it, whose end is the message of the AssertionError otherwise.
    """
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_PERTURB_": "170",  # Memory that nobody has written to is not zero by chance (glibc).
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    }
    log = folder / "log"
    log.touch()
    workers = [warm_start.start([str(script), *map(str, each)], folder, environ, log, log) for each in arguments]
    try:
        codes = warm_start.exit_codes(workers, timeout_s)
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * len(workers), f"exit codes {codes}\n{log.read_text()[-5000:]}"


def run_cases(script: Path, folder: Path, cases: Sequence[object], n_ranks: int) -> list[Any]:
    """What each rank leaves of `python SCRIPT CASES RENDEZVOUS OUTPUT RANK`; CASES and OUTPUT are of torch.save.

    Of several processes of pytest with one folder, the first that asks has it done; the others wait.
    """
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"rank{rank}" for rank in range(n_ranks)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not outputs[-1].exists():
            torch.save(cases, folder / "cases")
            arguments = [(folder / "cases", folder / "rendezvous", output, rank) for rank, output in enumerate(outputs)]
            run_workers(script, folder, arguments)
    return [torch.load(output, weights_only=False) for output in outputs]


def join_ranks(rendezvous: str, rank: int, n_ranks: int) -> None:
    """In a worker: be this rank of a group of gloo, for DeepSpeed too."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_RANK=str(rank), LOCAL_SIZE=str(n_ranks))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n_ranks)
