"""A rank's share of every global batch, read ahead in the background and delivered in order.

The only state is the number of samples that all ranks have consumed, since the samples are a pure function of the
position. So a state saved on any number of ranks continues on any other with the same global sequence, and what was
read ahead but not delivered was never consumed.

Threads, not processes: decompression, most of the work, runs without Python's global lock; nothing has to be pickled,
and an error comes through as it is. Each row is read and decoded once, whoever waits for it.
"""

import logging
import operator
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Self, get_args

from data_pipeline.dataset import Sample, Samples
from data_pipeline.errors import DataError, Exhausted
from data_pipeline.order import shares

logger = logging.getLogger(__name__)

OnDamage = Literal["strict", "skip"]
"""What to do about a row that cannot be read: raise its DataError, or put a blank sample in its place."""


class MicroBatch(NamedTuple):
    """Samples that go through the model together."""

    ids: range
    """Index of each in the global batch."""
    samples: list[Sample]


class _Read(NamedTuple):
    sample: Sample
    damage: DataError | None


class Loader(Iterator[list[MicroBatch]]):
    """This rank's micro-batches of each global batch, without end.

    Args:
        samples: a RowDataset or Mixture.
        batch_size: samples in a global batch, on all ranks together.
        micro_batch_size: samples that are dealt out to a rank at a time: see `order.shares`.
        rank, world_size: which share of each global batch to read. Ranks that share the parts of a row count as one.
        part, n_parts: which part of each row to read: see `RowDataset.slice_of`.
        n_consumed: position of the first sample of the first batch.
        on_damage: "strict" raises the DataError of a damaged row when its batch is asked for. "skip" delivers a blank
            sample in its place, counts it in `n_skipped` and logs a warning; the order of all others stays.
        threads: rows that are read at the same time.
        ahead: batches of this rank that are read before they are asked for; what bounds the memory.

    Reading begins with the `with` statement or the first batch. `close`, or the end of the `with` statement, ends the
    threads; after that the loader delivers nothing. It is for one thread of the process that made it.

    Raises:
        ValueError: an option that is out of range. TypeError: what is no integer in the place of one.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        micro_batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        *,
        part: int = 0,
        n_parts: int = 1,
        n_consumed: int = 0,
        on_damage: OnDamage = "strict",
        threads: int = 2,
        ahead: int = 2,
    ) -> None:
        if on_damage not in get_args(OnDamage):
            raise ValueError(f"on_damage={on_damage!r}: choose one of {', '.join(get_args(OnDamage))}")
        part, n_parts, n_consumed, threads, ahead = map(operator.index, (part, n_parts, n_consumed, threads, ahead))
        if n_consumed < 0 or threads < 1 or ahead < 1:
            raise ValueError(
                f"n_consumed={n_consumed} must be at least 0, threads={threads} and ahead={ahead} at least 1"
            )
        self.samples, self.batch_size, self.on_damage = samples, operator.index(batch_size), on_damage
        self.n_consumed = n_consumed
        """Samples that all ranks together have been delivered."""
        self.n_skipped = 0
        """Damaged rows that this loader has delivered a blank sample for."""
        self._shares = shares(batch_size, micro_batch_size, rank, world_size)
        self._part, self._n_parts = part, n_parts
        self._ahead = ahead
        self._batches: deque[list[Future[_Read]]] = deque()
        self._closed, self._pid = False, os.getpid()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")

    def __next__(self) -> list[MicroBatch]:
        """The next batch. Raises the DataError of a damaged row, again and again if asked again, and StopIteration once
        the loader is closed."""
        if self._closed:
            raise StopIteration
        if self._pid != os.getpid():
            raise RuntimeError("this loader was made in another process, and its threads are there: make one here")
        self._read_ahead()
        reads = iter([future.result() for future in self._batches[0]])
        self._batches.popleft()
        self.n_consumed += self.batch_size
        self._read_ahead()
        return [MicroBatch(ids, [self._deliver(next(reads)) for _ in ids]) for ids in self._shares]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as plain JSON values, the same on every rank."""
        return {"n_consumed": self.n_consumed, "samples": dict(self.samples.identity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last batch that was delivered when the state was taken, on whatever number of ranks.

        Raises DataError where the state is of other samples than these, naming the difference.
        """
        n_consumed, before, now = state.get("n_consumed"), state.get("samples"), self.samples.identity
        if type(n_consumed) is not int or n_consumed < 0 or not isinstance(before, Mapping):
            raise DataError(f"{dict(state)} is not what Loader.state_dict() gave: load the state as it was saved")
        if changes := [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]:
            lines = [f"{key} was {before.get(key)!r} and is {now.get(key)!r} now" for key in changes]
            raise DataError(f"the loader's state is of other samples: {'; '.join(lines)}: set it back, or start anew")
        self._forget()
        self.n_consumed = n_consumed

    def close(self) -> None:
        """Ends the threads, each after the row that it is reading."""
        self._closed = True
        self._forget()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        self._read_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        """Sees to it that `ahead` batches, from the next one on, are read or being read."""
        while len(self._batches) < self._ahead:
            first = self.n_consumed + len(self._batches) * self.batch_size
            positions = [first + index for ids in self._shares for index in ids]
            self._batches.append([self._pool.submit(self._read, position) for position in positions])

    def _forget(self) -> None:
        for future in (future for batch in self._batches for future in batch):
            future.cancel()
        self._batches.clear()

    def _read(self, position: int) -> _Read:
        try:
            if self.on_damage == "skip" and self._n_parts > 1:  # what is damaged in one part is left out in all
                self.samples.slice_of(position, 0, 1)
            return _Read(self.samples.slice_of(position, self._part, self._n_parts), None)
        except DataError as error:
            if self.on_damage == "strict" or isinstance(error, Exhausted):
                raise
            return _Read(self.samples.blank_of(position, self._part, self._n_parts), error)

    def _deliver(self, read: _Read) -> Sample:
        if read.damage:
            self.n_skipped += 1
            logger.warning("left out: %s", read.damage)
        return read.sample
