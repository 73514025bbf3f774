"""The cluster of these tests is one: two nodes, steps and arrays, and nothing that outlives its job or its tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import psutil
from slurm.cluster import NODES, Cluster, wait_until

TESTS = Path(__file__).parents[1]


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(("#!/bin/bash", *lines, "")))
    return path


def test_a_step_has_a_task_on_each_node(cluster: Cluster) -> None:
    result = cluster.run("srun", "-N2", "-n2", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"{rank} {node}" for rank, node in enumerate(NODES)]


def test_an_array_of_which_one_fails(cluster: Cluster, tmp_path: Path) -> None:
    fails = script(tmp_path / "job", "exit $((SLURM_ARRAY_TASK_ID == 1))")
    job = cluster.submit("--array=0-2", "--output=/dev/null", fails)
    assert cluster.wait(job) == ["COMPLETED", "FAILED", "COMPLETED"]
    assert {element["NodeList"] for element in cluster.jobs(job)} == set(NODES)


def test_a_cancelled_job_leaves_no_process(cluster: Cluster, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    job = cluster.submit("--output=/dev/null", script(tmp_path / "job", f"echo $$ > {pid}", "sleep 60"))
    wait_until(lambda: pid.exists() and pid.read_text(), "the job runs", 20, cluster.show)
    cluster.run("scancel", job)
    assert cluster.wait(job) == ["CANCELLED"]
    assert not alive(int(pid.read_text()))


def test_daemons_end_with_a_process_that_is_killed(cluster: Cluster) -> None:
    """Those of a second cluster, beside that of the fixture."""
    hold = "from slurm.cluster import *\nwith running_cluster() as cluster: print(cluster.folder, flush=True); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().decode().strip())
        daemons = psutil.Process(holder.pid).children()
        assert [daemon.name() for daemon in daemons] == ["munged", "slurmctld", "slurmd", "slurmd"]
        holder.kill()
    _, left = psutil.wait_procs(daemons, timeout=10)
    assert not left
    shutil.rmtree(folder)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
