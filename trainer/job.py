"""`Job`: all that a run is made of, read and checked, before anything of it begins."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.dataset import Samples
from data_pipeline.store import Store
from trainer.config import RunConfig
from trainer.distributed import Launch


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
    """What its checkpoints say about it: see continuation.identity."""
    sources: Collection[Store] = ()
    """The stores of data.mixture."""
