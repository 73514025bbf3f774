"""`Job`: all that a run is made of, read and checked, before anything of it begins."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.dataset import Samples
from data_pipeline.store import Store
from trainer.batches import open_sources, training_samples
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
    store: Store
    """data.store, which evaluations read."""
    samples: Samples
    """What to train on, and in which order."""
    launch: Launch
    identity: Mapping[str, Any]
    """What its checkpoints say about it: see resume.identity."""
    sources: Mapping[str, Store] = field(default_factory=dict)
    """The stores of data.mixture, by name."""

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
    store, sources = Store.open(config.data.store), open_sources(config.data)
    facts = StoreFacts.of(store)
    of_sources = {name: StoreFacts.of(each) for name, each in sources.items()}
    check(config, deepspeed, facts, launch.world_size, of_sources)
    notes = remarks(config, facts, of_sources)
    is_new = not published(config.run.dir)
    if config.run.init_from and is_new:  # a run that goes on has weights of its own
        notes += check_initial(config.run.init_from, config.model, store.path, facts.tokenizer_sha256)
    if config.run.eval_every and is_new and launch.rank == 0:  # who alone says it, and reads tables for that
        notes += leaks(config.data, store, sources)
        if config.run.init_from:
            evaluated = [(store, config.data.eval_split)]
            evaluated += [(sources[name], split) for name, split in config.data.eval_splits.items()]
            notes += [note for each in evaluated for note in inherited(config.run.init_from, *each)]
    if path.is_dir() and is_new and launch.rank == 0:
        notes += repetition_notes(path, config, store, sources)
    samples = training_samples(config.data, store, sources, config.run.seed)
    own = identity(config, deepspeed, samples.identity if sources else facts.fingerprint, launch.world_size)
    if sources:  # then evaluations alone read data.store, and nothing else would tell that it is another one
        own[EVAL_STORE] = facts.fingerprint
    return Job(config, deepspeed, store, samples, launch, own, sources), notes
