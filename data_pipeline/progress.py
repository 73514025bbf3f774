"""How far a build is, for the user: a bar at a terminal, a line now and then in a log file.

Looks at the records that all workers leave, wherever they run, so it shows the whole build and not one process.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from data_pipeline.bar import LINE_EVERY_S, how_far
from data_pipeline.jobs import done_tasks, record_name
from data_pipeline.scratch import RECORD_SUFFIX, read_record
from data_pipeline.stages import Work
from data_pipeline.tokenizer import token_dtype

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_LOOKING_SHARE = 0.05
"""Of the time, at most, may go to looking: a large build has thousands of records."""
_SUFFIXES = {"tokens": RECORD_SUFFIX, "shards": ".json"}


class Progress:
    """Shows the progress of `work` for as long as its block lasts, if `shown`."""

    def __init__(self, work: Work, shown: bool) -> None:
        self._work = work
        self._before = {stage: _done(work.folder / stage, suffix) for stage, suffix in _SUFFIXES.items()}
        """Done by a run that was killed."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if shown else None

    def __enter__(self) -> "Progress":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        if not self._wait_for("start"):
            return
        sizes = [sum(span.stop - span.start for span in task) for task in self._work.tasks]
        self._show("tokenize", "tokens", sizes, self._tokens_of)
        if not self._wait_for("plan"):
            return
        n_rows, settings = self._work.n_rows, self._work.decisive
        bounds = [min(row, n_rows) for row in range(0, n_rows + settings.rows_per_shard, settings.rows_per_shard)]
        tokens = [(stop - start) * settings.seq_len for start, stop in pairwise(bounds)]
        itemsize = token_dtype(settings.vocab_size).itemsize
        self._show("write", "shards", [n * itemsize for n in tokens], tokens.__getitem__)

    def _show(self, stage: str, records: str, sizes: Sequence[int], tokens_of: Callable[[int], int]) -> None:
        """Follows a stage to its end: `sizes` of its tasks in bytes, and what each of them is in tokens."""
        seen = self._before[records] & _done(self._work.folder / records, _SUFFIXES[records])
        resumed = sum(sizes[task] for task in seen)
        tokens, begun, looking_s = 0, time.monotonic(), 0.0
        next_line = begun + LINE_EVERY_S
        bar = tqdm(desc=stage, total=sum(sizes), initial=resumed, unit="B", unit_scale=True, disable=None)
        with bar:
            while len(seen) < len(sizes):
                closed = self._closed.wait(max(_POLL_S, looking_s / _LOOKING_SHARE))
                looked = time.monotonic()
                fresh = _done(self._work.folder / records, _SUFFIXES[records]) - seen
                seen |= fresh
                tokens += sum(map(tokens_of, fresh))
                looking_s = time.monotonic() - looked
                elapsed = time.monotonic() - begun
                bar.set_postfix_str(f"{tokens / elapsed:,.0f} tokens/s", refresh=False)
                bar.update(sum(sizes[task] for task in fresh))
                if bar.disable and time.monotonic() > next_line:
                    next_line += LINE_EVERY_S
                    done = sum(sizes[task] for task in seen)
                    logger.info(how_far(stage, done, sum(sizes), "B", elapsed, before=resumed))
                if closed:
                    break
        if len(seen) == len(sizes):
            elapsed = time.monotonic() - begun
            logger.info("%s: %s bytes, %s tokens, %.1f s", stage, f"{sum(sizes) - resumed:,}", f"{tokens:,}", elapsed)

    def _tokens_of(self, task: int) -> int:
        record = self._work.folder / "tokens" / f"{record_name(task)}{RECORD_SUFFIX}"
        return int(read_record(record).columns.n_tokens.sum())

    def _wait_for(self, stage: str) -> bool:
        """Follows a stage of one task, which says nothing itself. Whether it came to its end."""
        record = self._work.folder / stage / f"{record_name(0)}.json"
        begun = time.monotonic()
        next_line = begun + LINE_EVERY_S
        with tqdm(desc=stage, bar_format="{desc}: {elapsed}", delay=1, leave=False, disable=None) as bar:
            while not record.exists():
                if self._closed.wait(_POLL_S / 10):
                    return record.exists()
                bar.update(0)
                if bar.disable and time.monotonic() > next_line:
                    next_line += LINE_EVERY_S
                    logger.info("%s: %s so far", stage, tqdm.format_interval(time.monotonic() - begun))
        return True


def _done(records: Path, suffix: str) -> set[int]:
    return done_tasks(records, suffix) if records.exists() else set()
