"""Train a Reformer.

    python launch/train.py --config launch/configs/demo_cpu.toml                                  one process
    deepspeed --num_accelerators 2 launch/train.py --config launch/configs/demo_cpu.toml          two, one machine
    srun python launch/train.py --config launch/configs/books_64k.toml                            a SLURM cluster

Values of the configuration can be changed behind it: run.steps=100 deepspeed.zero_optimization.stage=3
Everything is checked before the processes join each other, so a mistake ends all of them at once.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.batches import open_sources, training_samples
from trainer.check import StoreFacts, check
from trainer.checkpoint import identity, starting_point
from trainer.config import ConfigError, load
from trainer.distributed import detect
from trainer.loop import Job, train

PATIENCE_S = 10
"""How long another rank than 0 keeps an error to itself before the processes have joined each other."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE.toml", help="model, data and run")
    parser.add_argument("--deepspeed_config", type=Path, metavar="FILE.json", help="in place of run.deepspeed_config")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment rules
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace those of the files")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        launch = detect(os.environ)
        config, deepspeed = load(arguments.config, arguments.overrides, arguments.deepspeed_config)
        store = Store.open(config.data.store)
        sources = open_sources(config.data)
        facts = {name: StoreFacts.of(source) for name, source in sources.items()}
        check(config, deepspeed, StoreFacts.of(store), launch.world_size, facts)
        samples = training_samples(config.data, store, sources, config.run.seed)
        fingerprint = samples.identity if sources else store.manifest.fingerprint
        own = identity(config, deepspeed, fingerprint, launch.world_size)
        start = starting_point(config.run.dir, own, arguments.resume)
        train(Job(config, deepspeed, store, samples, launch, own, arguments.resume, start))
    except (ConfigError, DataError) as error:
        if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0" and not dist.is_initialized():
            # All ranks check the same things: rank 0 has most likely said it, and its launcher is about to end us.
            time.sleep(PATIENCE_S)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
