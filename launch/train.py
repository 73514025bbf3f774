"""Train a Reformer.

    python launch/train.py --config launch/configs/demo_cpu.toml                                  one process
    deepspeed --num_accelerators 2 launch/train.py --config launch/configs/demo_cpu.toml          two, one machine
    mpirun -n 2 python launch/train.py --config launch/configs/demo_cpu.toml                      the same by MPI
    srun python launch/train.py --config launch/configs/books_64k.toml                            a SLURM cluster

Any value can be overridden on the command line: run.steps=100 deepspeed.zero_optimization.stage=3
Everything is checked before the processes join each other, so a mistake ends all of them at once.

Before it is queued, from any machine that sees the store: --check 64 checks the same as 64 processes would, and says
what the run would be.

The same command resumes from the newest sound checkpoint in run.dir, on any number of processes. With the folder of a
run in place of the file, as --config runs/demo, it goes on with the settings that it was last started with. SIGUSR1,
SIGUSR2, SIGTERM and Ctrl-C stop it after the current step, with a checkpoint; a second Ctrl-C stops it at once.

Exit codes: 0 finished, 2 an error in configuration or data (printed), 75 stopped by a signal, 70 ended by the watchdog.
"""

import os
import signal

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
# The imports below take seconds. A signal meanwhile waits until the trainer listens to it, instead of ending us.
signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
# Nothing that we use is compiled: DeepSpeed has PyTorch load its compiler for one optimizer, a second of each start.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# A thread that waits for others looks so often before it sleeps. By default it looks for milliseconds, and where other
# processes have the cores, a step takes ten times as long; fewer cost nothing where they have not (benchmarks/LOG.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch.distributed as dist  # noqa: E402

from data_pipeline.errors import DataError  # noqa: E402
from data_pipeline.output import INTERRUPTED, as_path, positive, print_utf8  # noqa: E402
from trainer.config import ConfigError  # noqa: E402
from trainer.distributed import Launch, detect, end_by  # noqa: E402
from trainer.job import read_job  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.outline import outline  # noqa: E402
from trainer.resume import refuse_another_run  # noqa: E402
from trainer.run_folder import make_folders, refuse_other_files, refuse_unwritable  # noqa: E402
from trainer.run_lock import hold  # noqa: E402
from trainer.template import template  # noqa: E402
from trainer.terminal import show  # noqa: E402

PATIENCE_S = 10
"""How long other ranks than 0 hold back an error before all have joined, so that rank 0 reports it."""


class Template(argparse.Action):
    """Prints a file to begin with, as --help prints what to type."""

    def __call__(
        self, parser: argparse.ArgumentParser, given: argparse.Namespace, folder: object, option: object = None
    ) -> None:
        if given.config or any(word.startswith("--config") for word in sys.argv):
            parser.error("--template prints a file to begin with, and reads none: leave out --config")
        try:
            print(template(Path(folder) if isinstance(folder, str) else None), end="")
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
        parser.exit()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        type=as_path,
        required=True,
        metavar="FILE.toml",
        help="model, data and run; or the folder of a run",
    )
    parser.add_argument(
        "--deepspeed_config", type=as_path, metavar="FILE.json", help="in place of run.deepspeed_config"
    )
    parser.add_argument("--new", action="store_true", help="refuse to continue: run.dir must not hold a run yet")
    parser.add_argument(
        "--check",
        type=positive,
        metavar="RANKS",
        help="check all that so many processes would, say what the run would be, and start nothing",
    )
    parser.add_argument(
        "--template",
        action=Template,
        nargs="?",
        metavar="FOLDER",
        help="print a FILE.toml with every key, and what it means; with a FOLDER that run.init_from takes, one that "
        "begins with the model in it",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment rules
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the files")
    return parser.parse_intermixed_args()


def main() -> int:
    print_utf8()
    arguments = parse_arguments()
    rank = 0
    try:
        if arguments.check:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # there is nothing to save
            launch = Launch("--check", world_size=arguments.check)
        else:
            launch = detect(os.environ)
        rank = launch.rank
        job, notes = read_job(arguments.config, arguments.overrides, launch, arguments.deepspeed_config)
        for note in notes if rank == 0 else ():
            show(f"note: {note}")
        folder = job.config.run.dir
        refuse_other_files(folder)
        if arguments.check:
            refuse_unwritable(folder)
            known = refuse_another_run(folder, job.identity, arguments.new)
            show(outline(replace(job, identity=known)))
            return 0
        with hold(folder) if rank == 0 else nullcontext():
            make_folders(folder)
            # Not before: whoever held it until now may have begun another run.
            known = refuse_another_run(folder, job.identity, arguments.new)
            return train(replace(job, identity=known))
    except (ConfigError, DataError) as error:
        # All ranks check the same things: rank 0 has most likely said it, and its launcher is about to end us.
        told = rank != 0 and not dist.is_initialized() and signal.sigtimedwait(STOPPING, PATIENCE_S)
        if not told:
            host = socket.gethostname()
            place = f" (rank {rank} on {host}; if rank 0 has no such error: do all nodes see the same files?)"
            show(f"error: {error}{place if rank and not dist.is_initialized() else ''}", error=True)
        return 2
    except KeyboardInterrupt:  # before the run listens to it, or the second one
        show("error: interrupted", error=True)
        return INTERRUPTED


if __name__ == "__main__":
    end_by(main)
