"""A run that begins with the settings of another, out of its folder: what makes it no repetition of that one."""

from collections.abc import Mapping
from pathlib import Path

from data_pipeline.store import Store
from trainer.config import RunConfig
from trainer.curves import continued
from trainer.initial import folder_sha256
from trainer.run_files import read_record


def repetition_notes(run: Path, config: RunConfig, stores: Mapping[str, Store]) -> list[str]:
    """What is to be said where a run of this configuration begins with that in the folder `run`, a line for each.

    stores: data.store, as "", and those of data.mixture by name.
    """
    record = read_record(run)
    notes = [
        f"{run} went on with other settings {each}; what begins with its last ones may be another run"
        for each in continued(record)
    ]
    samples = record.get("samples", {})
    before = {name: samples.get(f"{name}.store") for name in stores} | {"": record.get("store", {}).get("fingerprint")}
    others = [store.path for name, store in stores.items() if before[name] not in (None, store.manifest.fingerprint)]
    notes += [
        f"{path} is not the store that {run} read: it was built anew, or added to" for path in dict.fromkeys(others)
    ]
    folder, began_with = config.run.init_from, record.get("initial_sha256")
    if folder and began_with and folder_sha256(folder) != began_with:
        notes.append(f"run.init_from={folder} holds other weights than those that {run} began with")
    return notes
