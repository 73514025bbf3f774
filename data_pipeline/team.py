"""Who works on this build: this process alone, the ranks of an MPI job, the tasks of a SLURM step, or a SLURM array.

All of them start the same command. What they need to know of each other is little: the name of the job, by which they
recognise each other at the output (`jobs.membership`), and which of them reports to the user.
"""

import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipeline.config import available_cpus
from data_pipeline.errors import DataError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Processes that mpirun started: Open MPI's variable, and MVAPICH's."""


class Team(NamedTuple):
    """The place of this process in the job that it is part of."""

    job: str
    """The same in all processes of the job, and in no other job."""
    rank: int
    """The process with rank 0 reports."""
    size: int
    launcher: str
    """For people: "this process", "MPI", "srun" or "SLURM array"."""


def find_team(environ: Mapping[str, str]) -> Team:
    """The team that the launcher's environment variables tell of. Under MPI this is a collective call.

    Raises DataError when mpirun started several processes that mpi4py does not see.
    """
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_STEP_ID" in environ else 1
    elements = _number(environ, "SLURM_ARRAY_TASK_COUNT", 1) if "SLURM_ARRAY_JOB_ID" in environ else 1
    if elements > 1:  # independent jobs, of one or several processes
        rank = _number(environ, "SLURM_ARRAY_TASK_ID") - _number(environ, "SLURM_ARRAY_TASK_MIN", 0)
        rank += _number(environ, "OMPI_COMM_WORLD_RANK", _number(environ, "SLURM_PROCID", 0))
        return Team(f"slurm-array-{environ['SLURM_ARRAY_JOB_ID']}", rank, elements, "SLURM array")
    for size in _MPI_SIZES:
        if (n_processes := _number(environ, size, 1)) > 1:
            return _mpi_team(n_processes)
    if tasks > 1:  # before PMI's variables, which srun sets as well
        job = (environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"], environ.get("SLURM_RESTART_COUNT", "0"))
        return Team(f"slurm-{'.'.join(job)}", _number(environ, "SLURM_PROCID"), tasks, "srun")
    if (n_processes := _number(environ, "PMI_SIZE", 1)) > 1:
        return _mpi_team(n_processes)
    return Team(uuid.uuid4().hex, 0, 1, "this process")


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable that a launcher sets; the default, if there is one, where it is not there or empty."""
    value = environ.get(name, "")
    try:
        return int(value) if value or default is None else default
    except ValueError:
        raise DataError(f"{name}={value!r} in the environment should be a number: unset it, or correct it") from None


def mpi_world(size: int) -> Any:
    """MPI's communicator of the `size` processes that mpirun started. Raises DataError where mpi4py sees others."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size != size:
        raise DataError(
            f"mpirun started {size} processes, but mpi4py sees {world.size}: it was built for another MPI than this "
            f"mpirun's ({MPI.Get_library_version().splitlines()[0]}). Reinstall mpi4py with this MPI, or use srun"
        )
    return world


def _mpi_team(size: int) -> Team:
    world = mpi_world(size)
    job = world.bcast(uuid.uuid4().hex if world.rank == 0 else None, root=0)
    return Team(f"mpi-{job}", world.rank, world.size, "MPI")


def default_workers(environ: Mapping[str, str]) -> int:
    """Processes for each command: all cores that it may use, but one core for a rank that shares its node with others
    and was given no share of its own (`--cpus-per-task`)."""
    if n_cpus := _number(environ, "SLURM_CPUS_PER_TASK", 0):
        return min(n_cpus, available_cpus())
    sizes = (*_MPI_SIZES, "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return 1 if any(_number(environ, size, 1) > 1 for size in sizes) else available_cpus()
