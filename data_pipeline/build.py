"""A build, as it is asked for: alone or with others, from the beginning or from where a build was killed.

Everybody who takes part goes through the same stages (`stages.py`) in the same work directory (`jobs.py`), and what
they make is a pure function of the inputs and settings: the store is the same to the byte for any number of
processes, ranks or interruptions.
"""

import errno
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import zarr

from data_pipeline import jobs, stages
from data_pipeline.blocks import BLOCK_BYTES
from data_pipeline.config import BuildSettings
from data_pipeline.documents import Reading
from data_pipeline.errors import DataError, InputChanged
from data_pipeline.files import find_files
from data_pipeline.inputs import check_same_input, check_same_policies, check_splits, check_unchanged, new_files
from data_pipeline.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, StoreSettings, settings_differences
from data_pipeline.progress import Progress
from data_pipeline.scratch import RECORD_SUFFIX
from data_pipeline.stages import Work
from data_pipeline.staging import check_writable, partial_path, read_json
from data_pipeline.store import Store, part_path
from data_pipeline.team import Team, find_team
from data_pipeline.tokenizer import PIECE_CHARS, Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_BELOW = 'put the call of build() below `if __name__ == "__main__":`, in a script that is a file (docs/library.md)'
_ONE_CODEC_THREAD = {"threading.max_workers": 1}
"""Of Zarr, where processes are the parallelism."""


@dataclass(frozen=True)
class BuildResult:
    """A finished store, and what the user should know about how it came to be, but for what was logged before."""

    store: Store
    already_built: bool
    notes: tuple[str, ...]
    team: Team


def build(settings: BuildSettings) -> BuildResult:
    """Builds the store that `settings` describe, or finds that it is there; as one process of a team, if there is one.

    What was done when it is interrupted is kept, in a directory beside the output, for the next time. Raises DataError
    for input or settings that make no store, when the output is there but was made of other input or settings, when
    another job is building it, and in a process that multiprocessing is starting, unless the store is there.
    """
    team = find_team(os.environ)
    if settings.output.is_symlink():  # which a rename cannot put a store in place of
        settings = replace(settings, output=settings.output.resolve())
    decisive = store_settings(settings, load_tokenizer(settings.tokenizer, settings.vocab_size))
    folder = partial_path(settings.output)
    is_alone = not folder.exists()
    if (finished := _finished(settings, decisive, team, contents=is_alone)) is not None and is_alone:
        jobs.remove_gone(folder)
        return finished
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing asks it itself
        raise DataError(f"a process that was started to work for this script runs it, and would build too: {_BELOW}")
    published = False

    def keep() -> bool:
        return not published and any((folder / "tokens").glob(f"*{RECORD_SUFFIX}"))

    with jobs.membership(folder, team.job, settings.output, keep), _explained(folder, keep):
        if (
            finished := _finished(settings, decisive, team, contents=True)
        ) is not None:  # by others, or before we were killed
            published = _holds(finished.store, folder)
            return finished
        if settings.append:  # in the store itself, which nobody writes to before the end
            check_writable(settings.output, f"--output {settings.output}")
        work = _describe(settings, decisive, folder)
        with Progress(work, shown=team.rank == 0):
            _go_through(work, team)
        notes = read_json(folder / "plan" / f"{jobs.record_name(0)}.json")["notes"]
        published = True
    return BuildResult(Store.open(settings.output), False, tuple(notes), team)


def store_settings(settings: BuildSettings, tokenizer: Tokenizer) -> StoreSettings:
    """What of the settings decides the bytes of the store."""
    return StoreSettings.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "seq_len": settings.seq_len,
            "packing": settings.packing,
            "stride": settings.stride or settings.seq_len,
            "bos": settings.bos,
            "eos": settings.eos,
            "split": dict(sorted(settings.split.items())),
            "rows_per_shard": settings.shard_rows,
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "text": settings.text,
            "duplicates": settings.duplicates,
            "near_threshold": settings.near_threshold,
            "block_bytes": BLOCK_BYTES,
            "piece_chars": PIECE_CHARS,
        }
    )


def _finished(settings: BuildSettings, decisive: StoreSettings, team: Team, contents: bool) -> BuildResult | None:
    """The output, if it is already what is asked for. Raises DataError, before any long work, if it is not.

    contents: whether what the inputs hold is compared too, by the one of the team that reports.
    """
    output = settings.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        if settings.append:
            raise DataError(f"--append: {output} does not exist. Build it first, without --append")
        return None
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(f"{output} exists and is not a store: choose another --output, or remove it")
    differences = settings_differences(Manifest.read(output), decisive)
    if differences:
        own = "To --append, give the options that it was built with. Otherwise b" if settings.append else "B"
        raise DataError(
            f"{output} was built otherwise: {'; '.join(differences)}. {own}uild into another --output, or delete this "
            "one first"
        )
    existing = Store.open(output)
    notes: list[str] = []
    files = find_files(settings.inputs, settings.held_out, decisive.tokenizer_kind == "integers", notes)
    fresh = new_files(files, existing.parts) if settings.append else []
    contents = contents and team.rank == 0
    if not settings.append:
        check_same_input(output, existing.parts[0], files, contents)
    elif not fresh and contents:  # otherwise by whoever begins to append
        check_unchanged(files, existing.parts)
        check_splits(files, existing.parts)
    reading = Reading(settings.text, decisive.tokenizer_kind, settings.vocab_size or 0, settings.policies)
    for part in existing.parts:
        check_same_policies(output, part, files, reading)
    return None if fresh else BuildResult(existing, True, tuple(notes), team)


def _holds(store: Store, folder: Path) -> bool:
    """Whether what a work directory was to make is in the store: not where it is of an append that is unfinished."""
    job = folder / "job.json"
    files = read_json(job)["files"] if job.exists() else {}
    return files.keys() <= {record.name for record in store.inputs}


def _describe(settings: BuildSettings, decisive: StoreSettings, folder: Path) -> Work:
    if not settings.append:
        return Work(folder, settings, decisive, settings.output, None)
    number = len(Manifest.read(settings.output).parts) + 1
    return Work(folder, settings, decisive, part_path(settings.output, f"{number:04d}"), settings.output)


@contextmanager
def _explained(folder: Path, keep: Callable[[], bool]) -> Iterator[None]:
    """What the system's errors mean here, and a changed input where `keep()` says that work of before it is there."""
    try:
        yield
    except InputChanged as error:
        if not keep():
            raise
        raise DataError(
            f"{error.what}, and {folder} was begun with it as it was. Put it back, time of modification included, and "
            f"run the same command again, or remove {folder} to start afresh"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no room is left on the disk of {folder.parent} ({error.strerror}): make room and run the same command "
            "again. What is done is kept"
        ) from error


def _go_through(work: Work, team: Team) -> None:
    stages.begin(work)  # here, so that what is wrong with the input is known before processes start
    if team.rank == 0:
        for note in read_json(work.folder / "start" / f"{jobs.record_name(0)}.json")["notes"]:
            logger.warning("note: %s", note)
    if work.settings.workers > 1:
        _go_through_in_processes(work, work.settings.workers)
        return
    if team.size > 1:
        zarr.config.set(_ONE_CODEC_THREAD)
    stages.go_through(work)


def _go_through_in_processes(work: Work, workers: int) -> None:
    """Goes through the stages in this process and `workers` - 1 more. Raises what one of them raised; all stop then."""
    # spawn: a forked child would inherit Zarr's threads as dead locks
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers - 1, mp_context=context, initializer=_start_worker, initargs=(work.folder, stop))
    zarr.config.set(_ONE_CODEC_THREAD)
    try:
        # A copy to send: what this process has cached of the work is large, and another thread may be caching it now.
        others = [pool.submit(_work_through, replace(work)) for _ in range(workers - 1)]
        stages.go_through(work, lambda: any(other.done() and other.exception() for other in others))
        for other in others:
            other.result()
    except BrokenProcessPool as error:
        if getattr(sys.modules["__main__"], "__spec__", None) is None:  # not python -m
            raise DataError(f"a worker process ended: if memory ran out, take fewer workers; else {_BELOW}") from error
        raise DataError(
            "a worker process was killed, perhaps because memory ran out: run the same command again, with fewer "
            "--workers. What is done is kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_stop: Event
_membership: object
"""Of a worker process, held as long as it lives."""


def _start_worker(folder: Path, stop: Event) -> None:
    """Workers are the parallelism: each keeps to one codec thread, and none outlives its parent."""
    global _stop, _membership
    _stop, _membership = stop, jobs.join(folder)
    zarr.config.set(_ONE_CODEC_THREAD)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _work_through(work: Work) -> None:
    stages.go_through(work, _stop.is_set)


def _exit_with_parent() -> None:
    """A pool's workers would wait forever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
