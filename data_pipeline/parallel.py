"""The same `map` over one process or many.

Whoever has work writes `with worker_map(n) as run: for result in run(function, tasks)`. Results come in the order
of the tasks, so that nothing downstream can depend on who finished first. Tasks and results are small (file names,
ranges, lengths): tokens travel through files, never between processes.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

import zarr

from data_pipeline.errors import DataError


class Map(Protocol):
    """Calls `function` on each of `tasks` and yields the results in order."""

    def __call__(self, function: Callable[[Any], Any], tasks: Iterable[Any], /) -> Iterator[Any]: ...


@contextmanager
def worker_map(workers: int) -> Iterator[Map]:
    """Yields a `Map` that runs in `workers` processes, or in this one when `workers` is 1.

    Raises DataError when a worker process is killed, as it is when memory runs out.
    """
    if workers == 1:
        yield map
        return
    # spawn: a forked child would inherit Zarr's threads as dead locks
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed, perhaps because memory ran out: try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Workers are the parallelism: each keeps to one codec thread, and none outlives its parent."""
    zarr.config.set({"threading.max_workers": 1})
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
