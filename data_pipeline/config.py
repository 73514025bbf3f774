"""What a build is asked to do, checked before any work starts.

These are the values of the command line. What of them decides the bytes of the store is recorded in its manifest
(`manifest.StoreSettings`); paths and the number of workers are not, since the store may not depend on them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.errors import DataError

PACKINGS = ("bestfit", "stream")
MAX_SEQ_LEN = 2**26
"""Rows of 67 million tokens: a sanity bound, far above what any model here can train on."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings of `python -m data_pipeline build`. Raises DataError when one of them makes no sense."""

    inputs: tuple[Path, ...]
    """Text files, or folders that are searched for `.txt` files."""
    tokenizer: str
    """Path of a SentencePiece model, or "bytes"."""
    output: Path
    """The store to make."""
    seq_len: int = 65_536
    """Tokens in a row."""
    packing: str = "bestfit"
    """How documents become rows: see `packing.py`."""
    split: Mapping[str, float] = field(default_factory=dict)
    """Name of each held-out split -> its share of the documents; the rest is "train"."""
    val_inputs: tuple[Path, ...] = ()
    """Files or folders whose documents form the split "val"."""
    rows_per_shard: int = 256
    """Rows in one shard file: 32 MB of uint16 tokens at the default length, before compression."""
    workers: int = 1
    """Processes to use. The store does not depend on it."""

    def __post_init__(self) -> None:
        if not 2 <= self.seq_len <= MAX_SEQ_LEN:
            raise DataError(f"--seq-len is {self.seq_len}: expected 2 to {MAX_SEQ_LEN} tokens")
        if self.packing not in PACKINGS:
            raise DataError(f"--packing is {self.packing!r}: expected one of {', '.join(PACKINGS)}")
        if self.rows_per_shard < 1:
            raise DataError(f"--rows-per-shard is {self.rows_per_shard}: expected at least 1")
        if self.workers < 1:
            raise DataError(f"--workers is {self.workers}: expected at least 1")
        _check_split(self.split)
        if self.val_inputs and "val" in self.split:
            raise DataError("the split val is given twice: drop either --val-input or val= in --split")


def _check_split(split: Mapping[str, float]) -> None:
    for name, fraction in split.items():
        if name == "train":
            raise DataError("--split names train, which is whatever the other splits leave: drop it")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise DataError(f"--split names {name!r}: expected a lower-case word such as val")
        if not 0 < fraction < 1:
            raise DataError(f"--split gives {name} the fraction {fraction:g}: expected between 0 and 1")
    if sum(split.values()) >= 1:
        raise DataError(f"--split gives away {sum(split.values()):g} of the documents: leave some for train")


def parse_split(text: str) -> dict[str, float]:
    """`"val=0.01,test=0.01"` -> `{"val": 0.01, "test": 0.01}`. Raises DataError for anything else."""
    split: dict[str, float] = {}
    for item in text.split(","):
        name, _, fraction = item.strip().partition("=")
        if name in split:
            raise DataError(f"--split names {name} twice")
        try:
            split[name] = float(fraction)
        except ValueError:
            raise DataError(f"--split holds {item!r}: expected NAME=FRACTION, such as val=0.01,test=0.01") from None
    return split


def available_cpus() -> int:
    """The cores that this process may use, which under SLURM are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
