"""Whether a folder can be that of a run: nothing else is in it, and it can be written to."""

import errno
import os
from pathlib import Path

from data_pipeline.kinds import is_document
from data_pipeline.manifest import MANIFEST_NAME, STORE_FILES
from reformer.config import ConfigError
from reformer.weights import WEIGHTS_FILE
from trainer.run_files import CHECKPOINTS, RUN_FILES

OTHERS = {MANIFEST_NAME, WEIGHTS_FILE}
"""What tells a store's folder, and a model's."""


def refuse_other_files(run_dir: Path) -> None:
    """Raise ConfigError where the folder is a corpus, a store or a model's and no run's: what is written there would be
    taken for a part of it."""
    try:
        names = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    except OSError as error:
        raise ConfigError(f"cannot read run.dir={run_dir}: {error.strerror}: choose another folder") from None
    if names & RUN_FILES:
        return
    above = Path(os.path.realpath(run_dir)).parents
    if store := next((each for each in above if all((each / name).is_file() for name in STORE_FILES)), None):
        raise ConfigError(f"run.dir={run_dir} is in the store {store}, all of which is hashed: choose another folder")
    if data := sorted(name for name in names if is_document(name) or name in OTHERS):
        raise ConfigError(
            f"run.dir={run_dir} has something else in it ({data[0]}, for one) and no run: give it a folder of its own"
        )


def make_folders(run_dir: Path) -> None:
    """Raises ConfigError where they cannot be made."""
    try:
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={run_dir}: {error.strerror}: choose another folder") from None


def refuse_unwritable(run_dir: Path) -> None:
    """Raise ConfigError where `make_folders` is not going to work, as far as that is seen without trying."""
    folder = (run_dir / CHECKPOINTS).absolute()
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        reason = os.strerror(errno.EACCES if there.is_dir() else errno.ENOTDIR)
        raise ConfigError(f"cannot write to run.dir={run_dir}: {there}: {reason}: choose another folder")
