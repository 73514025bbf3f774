"""`Job`: all that a run is made of, read and checked, before anything of it begins."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.dataset import Samples
from data_pipeline.store import Store
from trainer.batches import open_stores, training_samples
from trainer.check import StoreFacts, check, remarks
from trainer.checkpoint import published
from trainer.config import RunConfig, load
from trainer.deepspeed_settings import is_bf16
from trainer.distributed import Launch
from trainer.initial import check_initial
from trainer.leakage import inherited, leaks
from trainer.repetition import repetition_notes
from trainer.resume import EVAL_STORE, identity


@dataclass(frozen=True)
class Job:
    """A run whose parts have been checked against each other."""

    config: RunConfig
    deepspeed: Mapping[str, Any]
    stores: Mapping[str, Store]
    """data.store, as "", and those of data.mixture by name."""
    samples: Samples
    """What to train on, and in which order."""
    launch: Launch
    identity: Mapping[str, Any]
    """What its checkpoints say about it: see resume.identity."""

    @property
    def store(self) -> Store:
        """data.store, which evaluations read."""
        return self.stores[""]

    @property
    def precision(self) -> str:
        """What the model computes in, as peaks.py calls it."""
        return "bf16" if is_bf16(self.deepspeed) else "fp32"


def read_job(
    path: Path, overrides: Iterable[str], launch: Launch, deepspeed_path: Path | None = None
) -> tuple[Job, list[str]]:
    """The job that the two files and the overrides describe, for this process, and notes for the user.

    Nothing is written, and no other process is asked. Raises ConfigError or DataError for what is wrong or missing.
    """
    config, deepspeed = load(path, overrides, deepspeed_path)
    stores = open_stores(config.data)
    facts = {name: StoreFacts.of(store) for name, store in stores.items()}
    check(config, deepspeed, facts, launch.world_size)
    notes = remarks(config, facts)
    is_new = not published(config.run.dir)
    if config.run.init_from and is_new:  # a run that goes on has weights of its own
        notes += check_initial(config.run.init_from, config.model, config.data.store, facts[""].tokenizer_sha256)
    if config.run.eval_every and is_new and launch.rank == 0:  # who alone says it, and reads tables for that
        notes += leaks(config.data, stores)
        if config.run.init_from:
            for name, read in config.data.evaluated.items():
                notes += inherited(config.run.init_from, stores[name], read.split)
    if path.is_dir() and is_new and launch.rank == 0:
        notes += repetition_notes(path, config, stores)
    samples = training_samples(config.data, stores, config.run.seed)
    store_fingerprint = samples.identity if config.data.mixture else facts[""].fingerprint
    own = identity(config, deepspeed, store_fingerprint, launch.world_size)
    if config.data.mixture:  # then evaluations alone read data.store: nothing else would tell that it is another one
        own[EVAL_STORE] = facts[""].fingerprint
    return Job(config, deepspeed, stores, samples, launch, own), notes
