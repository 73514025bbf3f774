"""A run that begins with the settings of another, out of its folder: what makes it no repetition of that one."""

from pathlib import Path

from trainer.config import RunConfig
from trainer.curves import Curves
from trainer.initial import folder_sha256
from trainer.run_files import read_record


def repetition_notes(run: Path, config: RunConfig) -> list[str]:
    """What is to be said where a run of this configuration begins with that in the folder `run`, a line for each."""
    record = read_record(run)
    notes = [
        f"{run} went on with other settings {each}; what begins with its last ones is not the same run"
        for each in Curves(run, record, config, ()).continued()
    ]
    folder, began_with = config.run.init_from, record.get("initial_sha256")
    if folder and began_with and folder_sha256(folder) != began_with:
        notes.append(f"run.init_from={folder} holds other weights than those that {run} began with")
    return notes
