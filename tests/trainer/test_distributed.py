"""Who we are, from the environment that each launcher makes; no process group is started."""

import socket
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from trainer import distributed
from trainer.config import ConfigError
from trainer.distributed import Launch, detect, first_host, free_port, local_address, meet
from trainer.loop import train

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NODEID": "3",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_JOB_NODELIST": "gpu[003-005,009]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
INTEL = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def test_no_launcher() -> None:
    launch = detect({"PATH": "/bin", "SLURM_JOB_ID": "7"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (0, 1, 0, 1)
    assert str(launch) == "no launcher: 1 process, 1 on this node"
    assert detect({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "1"}) == launch, "sbatch --wrap"


@pytest.mark.parametrize("local_size", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_deepspeed_and_torchrun(local_size: str) -> None:
    """In a SLURM job of one task per node, which is how train_deepspeed.sbatch starts them."""
    environ = STEP | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_size: "4", "MASTER_ADDR": "a"}
    launch = detect(environ | {"MASTER_PORT": "29500"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 8, 1, 4)
    assert (launch.master_addr, launch.master_port) == ("a", 29500)


def test_srun() -> None:
    assert detect(STEP) == Launch("SLURM job 123456", 6, 7, 0, 1, "gpu003", 23456)
    assert detect(STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}).local_world_size == 2
    assert detect(STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}).local_world_size == 4
    assert detect(STEP | {"SLURM_STEP_NODELIST": "gpu[004-005]"}).master_addr == "gpu004", "a step on some of the nodes"
    assert detect(STEP | {"SLURM_STEP_NUM_TASKS": "1"}).world_size == 1, "a shell that srun --pty started"
    assert detect(STEP | {"PMI_RANK": "6", "PMI_SIZE": "7"}).launcher == "SLURM job 123456", "srun --mpi=pmi2"


def test_where_the_tasks_of_srun_meet() -> None:
    """On a port that steps, jobs and restarts do not share, and where the user says."""
    others = [STEP, *(STEP | {name: "1"} for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"))]
    others += [STEP | {"SLURM_JOB_ID": str(job)} for job in range(123457, 123460)]
    ports = {detect(environ).master_port for environ in others}
    assert len(ports) == len(others)
    assert all(20_000 <= port < 30_000 for port in ports)
    launch = detect(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize("variables", [OPEN_MPI, INTEL, {f"MV2{k[4:]}": v for k, v in OPEN_MPI.items()}])
@pytest.mark.parametrize("around", [{}, STEP])
def test_mpirun(variables: dict[str, str], around: dict[str, str]) -> None:
    """By itself, and in a SLURM job, where mpirun starts a process on each node through srun."""
    launch = detect(around | variables)
    assert launch == Launch("mpirun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert str(launch) == "mpirun: 8 processes, 4 on this node"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,07]", "n01"),
        ("n[7,9-11],m2", "n7"),
        ("gpu-a[1-2]-ib,x", "gpu-a1-ib"),
        ("rack[2-3]n[05,07]", "rack2n05"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK=None"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1"}, "SLURM_STEP_NUM_TASKS=None"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID=None"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "9"}, "batch shell of SLURM job 9.*put srun"),
        ({"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "1(x4)"}, "batch shell .* beside its 4 tasks"),
    ],
)
def test_a_half_set_environment_is_an_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(environ)


def test_local_address() -> None:
    """That of the interface towards the others; the loopback where there are none; the name where they have none."""
    assert local_address(["here", "here"]) == "127.0.0.1"
    assert local_address(["here", "127.0.0.1"]) == "127.0.0.1"
    assert local_address(["here", "no-such-host.invalid"]) == "here"


def test_a_free_port_is_none_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port()
    with socket.create_server(("", taken)):
        free = free_port()
        monkeypatch.setattr(distributed, "_PORTS", [*[taken] * 99, free])
        assert free_port() == free
        monkeypatch.setattr(distributed, "_PORTS", [taken])
        with pytest.raises(ConfigError, match=f"no port from {taken} to {taken} can be listened on: Address already"):
            free_port()


def two_ranks(rank: int, address: str, port: int) -> Launch:
    return Launch("this test", rank, 2, rank, 2, address, port)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do not wait long for each other, and leave environment and threads as they were."""
    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")


@pytest.mark.usefixtures("impatient")
def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of rank 0's node is taken .* MASTER_PORT"):
            meet(two_ranks(0, "127.0.0.1", port))


@pytest.mark.usefixtures("impatient")
def test_a_node_that_has_no_address_is_said() -> None:
    with pytest.raises(ConfigError, match=r"rank 1 finds no address for 'no-such-host\.invalid'.* set MASTER_ADDR"):
        meet(two_ranks(1, "no-such-host.invalid", 29500))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_meets_says_so(rank: int) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"rank {rank} of 2 did not meet the others at 127.0.0.1:{port}"):
        meet(two_ranks(rank, "127.0.0.1", port))


@pytest.mark.usefixtures("impatient")
def test_torchruns_store_is_no_sign_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may be waiting for the folder, or refuse it."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(ConfigError, match="rank 1 of 2 did not meet the others"):
        meet(two_ranks(1, "127.0.0.1", store.port))
    for rank in range(2):
        meet(two_ranks(rank, "127.0.0.1", store.port))


def test_a_rank_that_has_met_nobody_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may be at work in the folder."""

    def meets_nobody(launch: Launch) -> None:
        raise ConfigError("nobody is there")

    monkeypatch.setattr(distributed, "meet", meets_nobody)
    plan = SimpleNamespace(dir=tmp_path, watchdog_factor=1.0, watchdog_min_s=1.0)
    job: Any = SimpleNamespace(config=SimpleNamespace(run=plan), launch=two_ranks(1, "127.0.0.1", 1))
    with pytest.raises(ConfigError, match="nobody is there"):
        train(job)
    assert not list(tmp_path.iterdir())
