"""The tokenizer in the folder of a run: a copy of its store's, so that its weights are of use where the store is not.

RUN/tokenizer.json, RUN/tokenizer.model   see data_pipeline/tokenizer_folder.py
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.staging import publishing
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_folder import TOKENIZER_MODEL, Ends, read_tokenizer, tokenizer_files
from trainer.config import ConfigError
from trainer.run_files import RECORD, read_record


def keep_tokenizer(run_dir: Path, store: Store, say: Callable[[str], None]) -> None:
    """Write the copy, unless it is there. Training needs none: where the store's is damaged, `say` is told.

    Raises OSError where it cannot be written.
    """
    try:
        files = tokenizer_files(store.tokenizer, Ends(store.manifest.bos, store.manifest.eos))
    except DataError as error:
        say(f"note: no copy of the tokenizer in {run_dir}: {error}")
        return
    if TOKENIZER_MODEL not in files:
        (run_dir / TOKENIZER_MODEL).unlink(missing_ok=True)  # of another run, which this folder had before
    for name, content in reversed(files.items()):  # what says what it is, last
        path = run_dir / name
        if not path.exists() or path.read_bytes() != content:
            with publishing(path) as file:
                file.write(content)


def tokenizer_of(run: Path, store: Path | None, named: Path) -> tuple[Tokenizer, Ends]:
    """The tokenizer that a run was trained with, and what documents began and ended with.

    store: to take it from; if None, from the run's own copy, or else from the store that the run named.

    Raises DataError where it is nowhere, damaged, or not known to be that of the run.
    """
    expected = recorded_tokenizer(run)
    if store is None:
        with suppress(DataError):  # damaged, or not there, as in a run that an earlier version trained
            own = read_tokenizer(run)
            if own[0].sha256 == expected:
                return own
        store = named
    manifest = Manifest.read(store)
    # Without Store.open: a row that is missing is no reason to go without the tokenizer, which checks itself.
    tokenizer = Store(store, manifest).tokenizer
    if tokenizer.sha256 != expected:
        raise DataError(f"the tokenizer of {store} is not the one that {run} was trained with: give that run's store")
    return tokenizer, Ends(manifest.bos, manifest.eos)


def recorded_tokenizer(run: Path) -> str:
    """The hash of the tokenizer that a run was trained with. Raises DataError where its record does not say it."""
    try:
        return str(read_record(run)["store"]["tokenizer_sha256"])
    except ConfigError as error:
        reason = str(error)
    except (KeyError, TypeError):
        reason = f"{run / RECORD} does not say which tokenizer the run was trained with"
    raise DataError(f"{reason}: give a checkpoint in the folder of its run")
