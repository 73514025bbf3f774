"""What all ranks must have alike: one configuration, one store, one folder of the run.

Each rank reads files of its own node. Where these differ, nothing would stop: half of a batch would come from other
texts, or one rank would end before the others.
"""

import json
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.output import listed
from trainer.config import ConfigError, flatten
from trainer.distributed import Launch, hosts, together
from trainer.run_files import CHECKPOINTS

SHOWN = 3
"""Differences that an error names."""


def refuse_different(run_dir: Path, identity: Mapping[str, Any], launch: Launch, device: torch.device) -> None:
    """Raise ConfigError, on one rank while the others end, where a rank is of another run or sees another folder.

    All ranks call this, before anything is written but what rank 0 has made of run_dir.

    identity: what this rank's checkpoints would say about the run.
    """
    if launch.world_size == 1:
        return
    # Named as a save that was interrupted, so that it is removed if this process dies before that.
    trace = run_dir / CHECKPOINTS / f".partial-seen-{uuid.uuid4().hex}"
    found: list[Any] = [None] * launch.world_size
    dist.all_gather_object(found, (trace.name, flatten(json.loads(json.dumps(identity)))))
    names, identities = zip(*found, strict=True)
    where = [f"rank {rank} on {host}" for rank, host in enumerate(hosts())]

    def compare() -> None:
        if launch.rank:
            return
        for rank, other in enumerate(identities):
            if other != identities[0]:
                raise ConfigError(_difference(identities[0], other, where[rank], where[0]))
        try:
            trace.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"cannot write to run.dir={run_dir}: {error.strerror}: choose another folder") from None

    def look() -> None:
        if not trace.with_name(names[0]).is_dir():
            raise ConfigError(
                f"{where[launch.rank]} does not see in run.dir={run_dir} what {where[0]} writes there: have all nodes "
                "see the same folder"
            )

    together(compare, launch, device)
    together(look, launch, device)
    if not launch.rank:
        with suppress(OSError):
            trace.rmdir()


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], where: str, where_first: str) -> str:
    names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
    what = listed([f"{name} is {other.get(name)!r} and not {first.get(name)!r}" for name in names], SHOWN, "; ")
    return (
        f"{where} has another run than {where_first}: {what}. Have all nodes see the same configuration and the same "
        "store"
    )
