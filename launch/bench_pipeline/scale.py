"""A corpus of which only the sizes exist, for `launch/benchmark.py pipeline --parts scale`.

Documents are log-normal in size, so that most are small and a few are larger than a shard. What the tokenize stage
would have left behind is made up from the sizes, at 4 bytes per token.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipeline.build import store_settings
from data_pipeline.config import BuildSettings
from data_pipeline.documents import Span
from data_pipeline.files import InputFile
from data_pipeline.planning import Plan
from data_pipeline.scratch import Columns
from data_pipeline.stages import Work
from data_pipeline.tokenizer import load_tokenizer

BYTES_PER_TOKEN = 4
SPREAD = 1.5
"""Standard deviation of the logarithm of a size: 1% of the documents have a tenth of the bytes."""


def write_files(folder: Path, n_documents: int, n_bytes: int) -> Work:
    """A build that has found so many text files of so many bytes in all, as the stage `start` leaves it."""
    weights = np.random.default_rng(0).lognormal(0, SPREAD, n_documents)
    sizes = (weights * (n_bytes / weights.sum())).astype(np.int64) + 1
    sizes[-1] += max(n_bytes - int(sizes.sum()), 0)
    with (folder / "files.jsonl").open("w", encoding="utf-8") as lines:
        for number, size in enumerate(sizes.tolist()):
            name = f"{number % 1000:03d}/document-{number:09d}.txt"
            file = InputFile(name, f"/corpus/{name}", size, number, None)
            lines.write(json.dumps([*asdict(file).values()]) + "\n")
    settings = BuildSettings(
        inputs=("/corpus",), tokenizer="bytes", output=folder / "store", split={"val": 0.01, "test": 0.01}
    )
    decisive = store_settings(settings, load_tokenizer("bytes"))
    return Work(folder, settings, decisive, settings.output, None)


def made_columns(tasks: list[list[Span]]) -> Columns:
    """What the tokenize stage would have found: one entry for each span."""
    file = np.fromiter((span.file for task in tasks for span in task), np.int64)
    n_bytes = np.fromiter((span.stop - span.start for task in tasks for span in task), np.int64)
    first = np.concatenate(([True], file[1:] != file[:-1]))
    zeros = np.zeros(len(file), np.int8)
    sha256 = np.random.default_rng(1).integers(0, 256, (len(file), 32), np.uint8)
    return Columns(
        file=file,
        first=first,
        record=np.full(len(file), -1),
        n_bytes=n_bytes,
        n_tokens=n_bytes // BYTES_PER_TOKEN + 2 * first,
        n_byte_fallback=np.zeros(len(file), np.int64),
        bad=zeros,
        replaced=zeros,
        sha256=sha256,
        minhash=np.zeros((len(file), 0), np.uint32),
    )


def planned_shards(plan: Plan, rows_per_shard: int) -> int:
    """Finds the segments of every shard, as its writer does. Returns how many shards there are."""
    first_rows = range(0, plan.n_rows, rows_per_shard)
    for first_row in first_rows:
        np.searchsorted(plan.segments.row, (first_row, min(first_row + rows_per_shard, plan.n_rows)))
    return len(first_rows)
