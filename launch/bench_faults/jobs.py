"""Starting a run of launch/train.py in every way that there is, and killing or signalling it.

Whoever started them, the ranks of a run are found by their command line, which has the run's folder.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
from bench.process import AS_ROOT

from trainer import checkpoint
from trainer.distributed import free_port
from trainer.run_files import Line, read_metrics_tail

ROOT = Path(__file__).parents[2]
POLL_S, ASK_S = 0.002, 0.2
"""How often a run's folder is looked at, and how often a cluster is asked about a job."""
PATIENCE_S = 300.0
"""After this long a run must have ended, well or not."""
MODES = {"process": 1, "deepspeed": 2, "mpirun": 2, "srun": 2, "sbatch": 2, "sbatch deepspeed": 2}
"""Ways of starting a run, and their ranks; the two ranks of the last three are on two nodes of a SLURM cluster."""
SBATCH = {"sbatch": "train.sbatch", "sbatch deepspeed": "train_deepspeed.sbatch"}
"""Files of launch/slurm."""
INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Run:
    """What is started again and again: one configuration and one folder."""

    config: Path
    dir: Path
    changes: tuple[str, ...] = ()

    @property
    def script(self) -> list[str]:
        """launch/train.py and its arguments."""
        return [str(ROOT / "launch" / "train.py"), *self.arguments]

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.config), f"run.dir={self.dir}", *self.changes]

    @property
    def partials(self) -> list[str]:
        """Names of checkpoints that are being written or removed, or were when the run was killed."""
        with suppress(FileNotFoundError):
            return [path.name for path in (self.dir / "checkpoints").iterdir() if path.name.startswith(".partial-")]
        return []

    @property
    def last(self) -> Line:
        """The last whole line of metrics.jsonl; empty without any."""
        lines = read_metrics_tail(self.dir)
        return lines[-1] if lines else {}

    @property
    def newest(self) -> int:
        """Step of the newest published checkpoint; 0 without any."""
        saved = checkpoint.published(self.dir)
        return saved[-1].step if saved else 0

    def ranks(self) -> list[psutil.Process]:
        """The processes that train it, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = [word for word in process.cmdline()[1:3] if word != "-u"]
                if words[:1] and words[0].endswith("launch/train.py") and f"run.dir={self.dir}" in process.cmdline():
                    found.append(process)
        return found


class Job(Protocol):
    """A run that was started."""

    log: Path
    """What it prints."""

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""

    def started(self) -> bool:
        """Whether it is more than an entry in a queue."""

    def kill(self) -> None:
        """SIGKILL to all of it."""

    def signal(self, number: int) -> None:
        """A signal by the way that a user or a cluster would send it."""

    def requeued(self) -> int:
        """How often a cluster has put it back into its queue."""


class LocalJob:
    """A command of this machine with all that it started.

    past: signals that the launcher does not hand on, or not well, so that they are sent to the ranks.
    """

    def __init__(
        self, words: Sequence[str], run: Run, log: Path, environ: dict[str, str], past: Sequence[int] = ()
    ) -> None:
        self.log, self._run, self._past = log, run, past
        with log.open("wb") as file:
            self._process = psutil.Popen(
                list(words), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environ
            )

    def code(self) -> int | None:
        return self._process.poll()

    def started(self) -> bool:
        return True

    def kill(self) -> None:
        for process in self._everyone():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def signal(self, number: int) -> None:
        for process in self._run.ranks() if number in self._past else [self._process]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def requeued(self) -> int:
        return 0

    def _everyone(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []


class BatchJob:
    """A job of one of the files in launch/slurm."""

    def __init__(self, cluster: Any, file: str, run: Run, log: Path) -> None:
        self.log, self._cluster = log, cluster
        log.touch()
        sizes = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        script = ROOT / "launch" / "slurm" / file
        options = (*sizes, f"--chdir={ROOT}", f"--output={log}", "--open-mode=append")
        self.id = cluster.submit(*options, script, str(run.config), *run.arguments[2:])

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says of it: JobState, Restarts, ExitCode, …"""
        return self._cluster.jobs(self.id)[0]

    def code(self) -> int | None:
        facts = self.facts()
        if facts["JobState"] in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}:
            return None
        code, number = (int(part) for part in facts["ExitCode"].split(":"))
        return code or -number or int(facts["JobState"] != "COMPLETED")

    def started(self) -> bool:
        return self.facts()["JobState"] == "RUNNING"

    def requeued(self) -> int:
        return int(self.facts()["Restarts"])

    def kill(self) -> None:
        self.signal(signal.SIGKILL, "--full")

    def signal(self, number: int, *options: str) -> None:
        self._cluster.run("scancel", *options, f"--signal={signal.Signals(number).name[3:]}", self.id)


def start(mode: str, run: Run, log: Path, cluster: Any) -> Job:
    """Starts a run in one of MODES; `cluster` is a running one for srun and sbatch, None for the others."""
    inherited = {name: value for name, value in os.environ.items() if name not in INHERITED}
    environ = {**inherited, **AS_ROOT, "OMP_NUM_THREADS": "1"}
    if mode in SBATCH:
        return BatchJob(cluster, SBATCH[mode], run, log)
    bin_dir, python = Path(sys.executable).parent, [sys.executable, "-u", *run.script]
    if mode == "process":
        return LocalJob(python, run, log, environ)
    if mode == "deepspeed":
        # It dies of USR1 and USR2, and ends with 1 of TERM, whatever the ranks end with.
        port = str(free_port())  # by itself it would take the same one for every run
        words = [str(bin_dir / "deepspeed"), "--num_accelerators", "2", "--master_port", port, *run.script]
        return LocalJob(words, run, log, environ, past=(signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM))
    if mode == "mpirun":
        # It gives the ranks a second after TERM, and ends with 1.
        words = [str(bin_dir / "mpirun"), "--oversubscribe", "-n", "2", *python]
        return LocalJob(words, run, log, environ, past=(signal.SIGTERM,))
    # srun kills the ranks upon a TERM of its own; `scancel --signal=TERM` sends one to the ranks.
    words = ["srun", "-N2", "-n2", "--kill-on-bad-exit=1", *python]
    return LocalJob(words, run, log, environ | cluster.environment, past=(signal.SIGTERM,))


def cluster_tools() -> Any:
    """The module that starts a SLURM cluster of two nodes on this machine, for the tests and for this."""
    spec = importlib.util.spec_from_file_location("slurm_cluster", ROOT / "tests" / "slurm" / "cluster.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait(job: Job, run: Run, seconds: float = PATIENCE_S) -> int | None:
    """The exit code, once all ranks are gone too. What is left after so many seconds is killed: then None."""
    deadline = time.monotonic() + seconds
    code = None
    while time.monotonic() < deadline:
        code = job.code() if code is None else code
        if code is not None and not run.ranks():
            return code
        time.sleep(0.1)
    job.kill()
    for process in run.ranks():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return None


def begun(job: Job) -> int:
    """How often a run has gone through its start-up: once, or, if it is requeued, again and again."""
    return len(re.findall(r"^(starting anew in|continuing from) ", job.log.read_text(errors="replace"), re.MULTILINE))


def tail(job: Job) -> str:
    """The end of what a run printed."""
    return job.log.read_text(errors="replace")[-600:]
