"""Who we are, from the environment that each launcher makes; no process group is started."""

import pytest

from trainer.config import ConfigError
from trainer.distributed import Launch, detect, first_host


def test_no_launcher() -> None:
    launch = detect({"PATH": "/bin", "SLURM_JOB_ID": "7"})
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (0, 1, 0, 1)
    assert str(launch) == "no launcher: 1 process, 1 on this node"


@pytest.mark.parametrize("local_size", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_deepspeed_and_torchrun(local_size: str) -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", local_size: "4", "MASTER_ADDR": "a"}
    environ |= {"MASTER_PORT": "29500", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    launch = detect(environ)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size) == (5, 8, 1, 4)
    assert (launch.master_addr, launch.master_port) == ("a", 29500)


def test_srun() -> None:
    environ = {
        "SLURM_JOB_ID": "123456",
        "SLURM_PROCID": "6",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "7",
        "SLURM_NODEID": "3",
        "SLURM_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_NODELIST": "gpu[003-005,009]",
    }
    assert detect(environ) == Launch("SLURM job 123456", 6, 7, 0, 1, "gpu003", 23456)
    assert detect(environ | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}).local_world_size == 2
    assert detect(environ | {"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}).local_world_size == 4


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
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, "SLURM_NTASKS=None"),
    ],
)
def test_a_half_set_environment_is_an_error(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(environ)
