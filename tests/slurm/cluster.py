"""A real SLURM cluster of two nodes on this one machine, for tests.

Real is everything that decides something: controller, node daemons, munge, scheduler, srun, sbatch. Not real are the
nodes' sizes and GPUs, which let the files of launch/slurm run as they are, and confinement: jobs share the machine's
cores. The names of the nodes are SLURM's alone, so the environment has the address where the ranks of a job meet.
A cluster has folders and ports of its own, so that several may run side by side, as they do in tests that run in
several processes. Its daemons end with the process that started them.

Needs Debian's slurm-wlm and munge, and to be root, which munge and node daemons insist on.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from side_by_side import free_port, own_share

NODES = ("n0", "n1")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "sinfo", "setpriv")
RESTARTS_AFTER_S = 5
"""A job that was requeued waits for so long before it starts again: SLURM's least; its default is two minutes."""
RUNNING = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}
JOB_VARIABLES = re.compile(r"SLURM_|SBATCH_|OMPI_|PMIX?_")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire={restarts_after_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU,CR_LLN
FirstJobId={first_job}
SchedulerParameters=batch_sched_delay=0,sched_interval=1
JobRequeue=1
KillWait=10
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=tests Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=131072 Gres=gpu:8 State=UNKNOWN"


def reason_for_none() -> str | None:
    """Why there can be no cluster here; None if there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "a SLURM cluster needs root"


class Cluster:
    """The commands of a running cluster, and its nodes."""

    def __init__(self, folder: Path, configuration: Path, daemons: ExitStack) -> None:
        self.folder, self.configuration, self.daemons = folder, configuration, daemons
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        inherited = {name: value for name, value in os.environ.items() if not JOB_VARIABLES.match(name)}
        own = {"SLURM_CONF": str(configuration), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        self.environment = inherited | own

    def start_node(self, name: str) -> None:
        """Its daemon, which takes part as soon as it has registered."""
        command = ("slurmd", "-D", "-N", name, "-f", str(self.configuration))
        self.nodes[name] = self.daemons.enter_context(daemon(self.folder / f"slurmd-{name}.out", *command))

    @contextmanager
    def lost_node(self, name: str) -> Iterator[None]:
        """Within, a node is as if its power had gone: it does nothing and says nothing, not even that it ends. SLURM
        has noticed. Afterwards the node has started again.
        """
        processes = self.processes(name)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")
        try:
            yield
        finally:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.nodes[name].wait()
            self.start_node(name)

    def processes(self, node: str) -> list[psutil.Process]:
        """The daemon of a node, and whatever runs there for jobs."""
        found = [psutil.Process(self.nodes[node].pid)]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                places = (environment.get("SLURMD_NODENAME"), environment.get("SLURM_CONF"))
                if places == (node, str(self.configuration)):
                    parent = process.parent()
                    found += [process, *([parent] if parent and parent.name().startswith("slurmstepd") else [])]
        return found

    def run(
        self, *command: str | Path, environment: Mapping[str, str] | None = None, timeout_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command, such as `srun -N2 hostname`, to its end, whatever its exit code."""
        words = [str(word) for word in command]
        variables = {**self.environment, **(environment or {})}
        return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=timeout_s)

    def submit(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
        """`sbatch` with these arguments. Returns the number of the job."""
        result = self.run("sbatch", "--parsable", *arguments, environment=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What `scontrol` says of a job: a dictionary for each element of an array, one for any other job."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).stdout.splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]

    def states(self, job: str) -> list[str]:
        """COMPLETED, FAILED, RUNNING, … of each element of an array in the order of their numbers, or of the job."""
        jobs = sorted(self.jobs(job), key=lambda job: int(re.sub(r"\D.*", "", job.get("ArrayTaskId", "0"))))
        return [job["JobState"] for job in jobs]

    def wait(self, job: str, timeout_s: float = 90) -> list[str]:
        """Waits for a job and all elements of an array to end. Returns their states."""
        wait_until(lambda: not RUNNING & set(self.states(job)), f"job {job} ends", timeout_s, self.show)
        return self.states(job)

    def show(self) -> str:
        """What the queue, the nodes and the daemons say, for a test that failed."""
        said = [self.run("squeue", "--long").stdout, self.run("sinfo", "--long").stdout]
        logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join(said + logs)


def wait_until(
    condition: Callable[[], object], what: str, timeout_s: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Asks again and again. AssertionError when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}\n{explain()}"
        time.sleep(0.05)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster whose nodes are idle; afterwards all its jobs and daemons have ended and its folder is gone."""
    # Not pytest's folder: that one is for root alone, and too deep for the name of a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as name, ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)
        configuration = write_configuration(folder)
        cluster = Cluster(folder, configuration, daemons)
        daemons.enter_context(daemon(folder / "munge.out", *munge(folder)))
        wait_until((folder / "munge/socket").exists, "munge answers", 20, (folder / "munge.out").read_text)
        daemons.enter_context(daemon(folder / "slurmctld.out", "slurmctld", "-D", "-f", str(configuration)))
        for node in NODES:
            cluster.start_node(node)
        wait_until(lambda: idle_nodes(cluster) == len(NODES), "both nodes are idle", 30, cluster.show)
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root", "--quiet")
            wait_until(lambda: idle_nodes(cluster) == len(NODES), "jobs end", 30, cluster.show)


def idle_nodes(cluster: Cluster) -> int:
    """Nodes that wait for work."""
    return cluster.run("sinfo", "--Node", "--partition=tests", "--noheader", "--format=%T").stdout.split().count("idle")


def write_configuration(folder: Path) -> Path:
    """slurm.conf, with ports that are free now. Jobs are counted from a random number: it decides where ranks meet, and
    other processes of pytest have clusters on this machine."""
    (folder / "state").mkdir()
    free = {free_port() for _ in range(3 * len(NODES))}  # more than are needed: two may be the same
    controller_port, *ports = [free.pop() for _ in ("controller", *NODES)]
    path = folder / "slurm.conf"
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    path.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            controller_port=controller_port,
            first_job=random.choice(own_share(range(1, 10_000))),
            folder=folder,
            restarts_after_s=RESTARTS_AFTER_S,
            nodes="\n".join(NODE.format(name=name, port=port) for name, port in zip(NODES, ports, strict=True)),
        )
    )
    return path


def munge(folder: Path) -> list[str]:
    """How setpriv starts munge's daemon, with a key of its own; it wants a user and a folder of its own."""
    home = folder / "munge"
    home.mkdir(mode=0o755)
    (home / "key").write_bytes(os.urandom(128))
    (home / "key").chmod(0o400)
    for path in (home, home / "key"):
        shutil.chown(path, "munge", "munge")
    paths = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={home / name}" for option, name in paths.items()]
    return ["--reuid=munge", "--regid=munge", "--clear-groups", "munged", "--foreground", *options]


@contextmanager
def daemon(output: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a daemon in the foreground of a process that ends with this one, even if this one is killed."""
    with output.open("ab") as file:
        process = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *command], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
