"""Who we are among the processes of a run: found in the environment, then joined to the others.

`detect` is a pure function from an environment to a `Launch`, so every launcher (none, DeepSpeed's, torchrun's, srun,
mpirun) is tested without starting one. A single process joins itself through memory: no port, no address. Under mpirun,
MPI says where rank 0 is, and does nothing else.
"""

import os
import random
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from data_pipeline.config import available_cpus
from data_pipeline.errors import DataError
from data_pipeline.output import counted
from data_pipeline.team import mpi_world
from trainer.config import ConfigError

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others to appear; a missing one should be told soon."""
COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a collective waits: a step on a million tokens, an evaluation or a checkpoint may take many minutes."""

_PORTS = range(10_000, 20_000)
"""Below those that systems give away (Linux: from 32768), and those that follow from the numbers of SLURM jobs."""
_CHOICE = random.SystemRandom()
"""Jobs of one seed on one node must not choose the same port."""

_RANK_0 = "longhand/rank 0"
"""A key that rank 0 sets in the store: torchrun's own store is there before rank 0 is."""

MPIRUN = "mpirun"
MPI_VARIABLES = {
    "OMPI_COMM_WORLD_LOCAL_RANK": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MV2_COMM_WORLD_LOCAL_RANK": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPI_LOCALRANKID": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
}
"""Rank on the node -> rank, processes, processes on the node: Open MPI's, MVAPICH's, and those of MPICH and Intel MPI.
The first of each is set by mpirun alone; srun may set PMI's too."""


@dataclass(frozen=True)
class Launch:
    """The place of this process in the run, in plain integers."""

    launcher: str
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    """Where rank 0 listens. Of mpirun's processes only MPI knows it, which `start` asks."""
    master_port: int = 0

    def __str__(self) -> str:
        place = f" at {self.master_addr}:{self.master_port}" if self.world_size > 1 and self.master_addr else ""
        return f"{self.launcher}: {counted(self.world_size, 'process')}, {self.local_world_size} on this node{place}"


def detect(environ: Mapping[str, str]) -> Launch:
    """The launcher whose variables are there. DeepSpeed's and torchrun's first, then MPI's, since these may run inside
    a SLURM job. Raises ConfigError for variables that contradict each other or are missing.
    """
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
    in_step = "SLURM_STEP_ID" in environ
    for local_rank in MPI_VARIABLES:
        if local_rank in environ or (MPI_VARIABLES[local_rank][0] in environ and not in_step):
            return _mpi_launch(environ, local_rank)
    if in_step:
        return _slurm_launch(environ)
    if "SLURM_PROCID" in environ and (n_tasks := _slurm_job_tasks(environ)) > 1:
        raise ConfigError(
            f"this is the batch shell of SLURM job {environ.get('SLURM_JOB_ID')}, beside its {n_tasks} tasks: put srun "
            "before the command, as launch/slurm/train.sbatch does"
        )
    return Launch(launcher="no launcher")


def _mpi_launch(environ: Mapping[str, str], local_rank: str) -> Launch:
    rank, size, local_size = MPI_VARIABLES[local_rank]
    return Launch(
        launcher=MPIRUN,
        rank=_number(environ, rank),
        world_size=_number(environ, size),
        local_rank=_number(environ, local_rank),
        local_world_size=_number(environ, local_size),
    )


def _slurm_launch(environ: Mapping[str, str]) -> Launch:
    """What srun says of the step; MASTER_ADDR and MASTER_PORT, if set, say where rank 0 listens."""
    # Every rank must arrive at the same free port by itself: the numbers of job, step and restart are what they share.
    # Jobs on one node differ in the first, steps that run side by side in the second; a job that was requeued does not
    # meet what is left of its former self. Below 32768, where systems begin to give ports away.
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    restart = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    port = 20_000 + (job + 1009 * step + 101 * restart) % 10_000
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    return Launch(
        launcher=f"SLURM job {job}",
        rank=_number(environ, "SLURM_PROCID"),
        world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_slurm_local_tasks(environ),
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes),
        master_port=_number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port,
    )


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `n[01-03,07],m2` is n01, n02, n03, n07, m2."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    if first is None:
        raise ConfigError(f"SLURM's list of nodes, '{nodelist}', names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def _slurm_local_tasks(environ: Mapping[str, str]) -> int:
    """Tasks on this node."""
    per_node = _per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1")
    return per_node[min(int(environ.get("SLURM_NODEID", "0")), len(per_node) - 1)]


def _slurm_job_tasks(environ: Mapping[str, str]) -> int:
    """Tasks that srun would start in this job; their number is there only if the job asked for one."""
    if "SLURM_NTASKS" in environ:
        return _number(environ, "SLURM_NTASKS")
    return sum(_per_node(environ.get("SLURM_TASKS_PER_NODE") or "1"))


def _per_node(tasks: str) -> list[int]:
    """`2(x3),1` is two on each of the first three nodes, one on the fourth."""
    per_node: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        per_node += [int(count)] * int(repeats or 1)
    return per_node


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError):
        value = environ.get(name)
        raise ConfigError(
            f"the launcher set {name}={value!r}, which should be a number: start with deepspeed, torchrun, srun, "
            "mpirun, or none"
        ) from None


def meet(launch: Launch) -> tuple[Launch, dist.Store]:
    """Wait for rank 0, and for all ranks if this is it. Returns where that is, and the store through which the ranks
    learn of each other.

    Raises ConfigError when the processes cannot find each other, or DataError when mpi4py does not see them.
    """
    if launch.launcher == MPIRUN and launch.world_size > 1:
        launch = _located_by_mpi(launch)
    # DeepSpeed asks the environment, whoever launched us.
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        MASTER_ADDR=launch.master_addr,
        MASTER_PORT=str(launch.master_port),
    )
    return launch, dist.HashStore() if launch.world_size == 1 else _shared_store(launch)


def start(launch: Launch, store: dist.Store) -> torch.device:
    """Join the processes that have met; afterwards collectives work. Returns the device of this process."""
    device = _claim_device(launch)
    # DeepSpeed takes this for the number of the device.
    os.environ["LOCAL_RANK"] = str(device.index or 0 if device.type == "cuda" else launch.local_rank)
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


def _located_by_mpi(launch: Launch) -> Launch:
    """With the address and a free port of rank 0's node. Collective; MPI has ended afterwards.

    Raises DataError when mpi4py does not see what mpirun started.
    """
    from mpi4py import MPI

    world = mpi_world(launch.world_size)
    hosts = world.allgather(socket.gethostname())
    place = (local_address(hosts), free_port()) if launch.rank == 0 else None
    address, port = world.bcast(place, root=0)
    # Left to mpi4py, MPI would end with the process: one that fails would wait for the others, which wait for it.
    MPI.Finalize()
    return replace(launch, master_addr=address, master_port=port)


def local_address(hosts: Sequence[str]) -> str:
    """An address of this host, the first, that the others reach: that from which a packet to one of them would leave.

    What a host's own name stands for is often an address that only this host reaches.
    """
    others = [host for host in hosts if host != hosts[0]]
    if not others:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(others[0], 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError:
        return hosts[0]


def free_port() -> int:
    """A port of this host that nothing listens on, and that the system does not give to a connection meanwhile.

    Raises ConfigError where there is none.
    """
    for port in _CHOICE.sample(_PORTS, len(_PORTS)):
        try:
            with socket.create_server(("", port)):
                return port
        except OSError as error:
            reason = error.strerror
    raise ConfigError(f"no port from {min(_PORTS)} to {max(_PORTS)} can be listened on: {reason}")


def _shared_store(launch: Launch) -> dist.Store:
    """The store that rank 0 or torchrun has, when rank 0 is there."""
    place = f"{launch.master_addr}:{launch.master_port}"
    try:
        socket.getaddrinfo(launch.master_addr, launch.master_port)
    except OSError as error:
        raise ConfigError(
            f"rank {launch.rank} finds no address for '{launch.master_addr}', the node of rank 0 ({error.strerror}): "
            "set MASTER_ADDR to an address that all nodes reach"
        ) from None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
        if launch.rank == 0:
            store.set(_RANK_0, "is here")
        else:
            store.wait([_RANK_0])
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if launch.rank == 0 and "EADDRINUSE" in reason:
            raise ConfigError(
                f"port {launch.master_port} of rank 0's node is taken by another program: start again with another one "
                "in MASTER_PORT (deepspeed: --master_port; in a SLURM job it follows from the job's number)"
            ) from None
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} did not meet the others at {place}: {reason}. Has every one of "
            "them started, and do all nodes reach that address? MASTER_ADDR can name another"
        ) from None
    return store


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
    """One line on what was found. Collective: the nodes are counted."""
    nodes = int(all_sum([launch.local_rank == 0], device)[0])
    return f"{launch}, {counted(nodes, 'node')} in all; {device_name(device)}, {dist.get_backend()}"


def device_name(device: torch.device) -> str:
    """What this process computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')} per process"


def stop() -> None:
    """Leave the run in order."""
    dist.destroy_process_group()


def end_by(main: Callable[[], int]) -> NoReturn:
    """End this process with the exit code of `main`.

    Where it has joined a run and not left it in order, the interpreter is not taken down: threads of gloo may still
    hold tensors of the last collective, which then abort the process, whose exit code is lost (pytorch/pytorch#179291).
    """
    try:
        sys.exit(main())
    except BaseException as end:
        if not dist.is_initialized():
            raise
        code = end.code if isinstance(end, SystemExit) else 1
        if not isinstance(end, SystemExit):
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError):  # it is closed, or its reader has left
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def hosts() -> list[str]:
    """The host's name of each process, by rank. All call this."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, socket.gethostname())
    return found


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


def raise_together(error: DataError | ConfigError, launch: Launch, device: torch.device) -> None:
    """Raise an error that all ranks have come to, on one of them; the others end quietly."""

    def complain() -> None:
        raise error

    together(complain, launch, device)


def _all_reduce(
    values: Iterable[float | torch.Tensor], device: torch.device, op: dist.ReduceOp.RedOpType
) -> list[float]:
    tensors = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
    total = torch.stack(tensors)
    dist.all_reduce(total, op=op)
    return total.tolist()
