"""Who we are among the processes of a run: found in the environment, then joined to the others.

What is special: `detect` is a pure function from an environment to a `Launch`, so every launcher (none, DeepSpeed's,
torchrun's, srun) is tested without starting one. A single process joins itself through memory: no port, no address.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from data_pipeline.config import available_cpus
from data_pipeline.errors import DataError
from trainer.config import ConfigError

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others to appear; a missing one should be told soon."""
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a collective waits: a step on a million tokens, an evaluation or a checkpoint may take many minutes."""


@dataclass(frozen=True)
class Launch:
    """The place of this process in the run, in plain integers."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0

    def __str__(self) -> str:
        place = f" at {self.master_addr}:{self.master_port}" if self.world_size > 1 else ""
        return f"{self.launcher}: {_count(self.world_size, 'process')}, {self.local_world_size} on this node{place}"


def detect(environ: Mapping[str, str]) -> Launch:
    """Find the launcher's variables: DeepSpeed's and torchrun's first, since they may run inside a SLURM job."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world_size = _number(environ, "WORLD_SIZE")
        local_sizes = [name for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if name in environ]
        return Launch(
            launcher="environment of deepspeed or torchrun",
            rank=_number(environ, "RANK"),
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK"),
            local_world_size=_number(environ, local_sizes[0]) if local_sizes else world_size,
            master_addr=environ.get("MASTER_ADDR", ""),
            master_port=_number(environ, "MASTER_PORT"),
        )
    if "SLURM_PROCID" in environ:
        return Launch(
            launcher=f"SLURM job {environ.get('SLURM_JOB_ID', '?')}",
            rank=_number(environ, "SLURM_PROCID"),
            world_size=_number(environ, "SLURM_NTASKS"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_slurm_local_tasks(environ),
            master_addr=first_host(environ.get("SLURM_JOB_NODELIST", "localhost")),
            # Every rank must arrive at the same free port by itself: the job id is what they share.
            master_port=20_000 + _number(environ, "SLURM_JOB_ID") % 10_000,
        )
    return Launch(launcher="no launcher")


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `n[01-03,07],m2` is n01, n02, n03, n07, m2."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ConfigError(f"SLURM_JOB_NODELIST='{nodelist}' names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _slurm_local_tasks(environ: Mapping[str, str]) -> int:
    """Tasks on this node out of `2(x3),1`: two on each of the first three nodes, one on the fourth."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    per_node: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        per_node += [int(count)] * int(repeats or 1)
    return per_node[min(int(environ.get("SLURM_NODEID", "0")), len(per_node) - 1)]


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        value = environ.get(name)
        raise ConfigError(
            f"the launcher set {name}={value!r}, which should be a number: start with deepspeed, srun, or neither"
        ) from None


def start(launch: Launch) -> torch.device:
    """Join the other processes; afterwards collectives work. Returns the device of this process."""
    device = _claim_device(launch)
    # DeepSpeed asks the environment, whoever launched us. It takes LOCAL_RANK for the number of the device.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(device.index or 0 if device.type == "cuda" else launch.local_rank),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    if launch.world_size == 1:
        store: dist.Store = dist.HashStore()
    else:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    # DeepSpeed communicates through groups of its own, which it makes with torch's default of 10 or 30 minutes.
    distributed_c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
    distributed_c10d.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" and launch.world_size > 1 else None,
    )
    return device


def _claim_device(launch: Launch) -> torch.device:
    """A GPU of our own, or a fair share of the cores, as DeepSpeed has decided."""
    if get_accelerator().device_name() == "cuda":
        # SLURM may show each task only its own GPU, as number 0.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cpus() // launch.local_world_size))
    return torch.device("cpu")


def describe(launch: Launch, device: torch.device) -> str:
    """One line on what was found."""
    return f"{launch}; {device_name(device)}, {dist.get_backend()}"


def device_name(device: torch.device) -> str:
    """What this process computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {_count(torch.get_num_threads(), 'thread')} per process"


def stop() -> None:
    """Leave the run in order."""
    dist.destroy_process_group()


def barrier(device: torch.device) -> None:
    """Wait until every process is here."""
    all_sum([0], device)


def all_sum(values: Iterable[float | torch.Tensor], device: torch.device) -> list[float]:
    """The sums of several numbers over all processes, in float64: counts stay exact."""
    return _all_reduce(values, device, dist.ReduceOp.SUM)


def all_max(value: float, device: torch.device) -> float:
    """The largest of a number over all processes."""
    return _all_reduce([value], device, dist.ReduceOp.MAX)[0]


def all_gather(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """The numbers of every process, by rank, in float64; each has equally many."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [tensor.tolist() for tensor in found]


def together(action: Callable[[], T], launch: Launch, device: torch.device) -> T:
    """The result of `action`, which may raise a DataError or a ConfigError on some ranks only.

    Then one of these raises it and the others end quietly, instead of waiting for it in the next collective.
    """
    error: Exception | None = None
    try:
        result = action()
    except (DataError, ConfigError) as caught:
        error = caught
    speaker = -all_max(-launch.rank if error else -launch.world_size, device)
    if error and speaker == launch.rank:
        raise error
    if speaker < launch.world_size:
        time.sleep(10)  # the speaker ends at once, and its launcher ends us
        sys.exit(2)
    return result


def _all_reduce(
    values: Iterable[float | torch.Tensor], device: torch.device, op: dist.ReduceOp.RedOpType
) -> list[float]:
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    total = torch.stack(tensors)
    dist.all_reduce(total, op=op)
    return total.tolist()


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"
