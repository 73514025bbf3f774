"""A run that only reports, and is killed: python tests/metrics_writer.py RUN STEPS KILLS

Like the trainer it logs every step, evaluates every fourth, and then, every fifth, says that it is saved by renaming
a file; it starts from what that file says. It is started so many times and killed at a random moment each time, and
once more to its end. SMALL_DISK in the environment is a limit to the size of the files, in bytes: what does not fit is
reported on standard output and left out, and after half of the steps the limit is gone.
"""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from trainer.metrics import Metrics


def value(step: int) -> float:
    """What is reported of a step, whichever start gets there."""
    return 1.0 / (1 + step)


def run(run_dir: Path, steps: int) -> None:
    saved = run_dir / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    metrics = Metrics(run_dir, first)
    metrics.text(metrics.first_step, "run/config", f"from step {metrics.first_step}")
    if not first:
        metrics.write(0, {"eval/loss": value(0)})
    limit_files(int(os.environ.get("SMALL_DISK", resource.RLIM_INFINITY)))
    for step in range(first + 1, steps + 1):
        if step == steps // 2:
            limit_files(resource.RLIM_INFINITY)
        try:
            time.sleep(0.001)
            metrics.write(step, {"train/loss": value(step), "train/lr": float(step)})
            if step % 4 == 0:
                metrics.write(step, {"eval/loss": value(step)})
                metrics.text(step, "sample", f"text of step {step}")
                metrics.histogram(step, "gradients/w", torch.full((3,), value(step)))
        except OSError as error:
            print(f"step {step}: {error}", flush=True)
        if step % 5 == 0:
            saved.with_suffix(".partial").write_text(str(step))
            saved.with_suffix(".partial").replace(saved)
    metrics.close()


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def killed(run_dir: Path, steps: int, after_s: float) -> None:
    """Start a process of its own, by forking, which is quicker than to import everything again; kill it."""
    child = os.fork()
    if not child:
        run(run_dir, steps)
        os._exit(1)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)


if __name__ == "__main__":
    folder, n_steps = Path(sys.argv[1]), int(sys.argv[2])
    now = time.time
    for i in range(int(sys.argv[3])):
        time.time = lambda i=i: now() + 10 * i  # no start comes within the second of the one before
        killed(folder, n_steps, random.uniform(0.0, 0.06))
    time.time = lambda: now() + 10 * int(sys.argv[3])
    run(folder, n_steps)
