"""Documents that are trained on although evaluations hold them out: reported, not refused, as it may be meant."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.config import ConfigError, DataConfig
from trainer.exported import read_origin

MOST_DOCUMENTS = 5_000_000
"""More would take minutes to read, for which other ranks would wait."""


def leaks(data: DataConfig, stores: Mapping[str, Store]) -> list[str]:
    """A note for each source of the mixture that trains on documents which evaluations hold out, byte for byte.

    Of one store, `inspect` says it. A table of documents that is damaged, which training does not need, is a note too,
    and one of more than MOST_DOCUMENTS is not read.
    """
    try:
        return list(_leaks(data, stores))
    except DataError as error:
        return [f"whether the mixture trains on held-out documents is not known: {error}"]


def _leaks(data: DataConfig, stores: Mapping[str, Store]) -> Iterator[str]:
    own, *of_sources = [(read.split, stores[name]) for name, read in data.evaluated.items()]
    # One of these may be data.store, which is named then.
    evaluated = {(split, one.manifest.fingerprint): one for split, one in [*of_sources, own]}
    sources = {name: stores[name] for name in data.mixture}
    held_out = {
        at: set(_hashes(one, at[0]))
        for at, one in evaluated.items()
        if _n_documents(one) <= MOST_DOCUMENTS
        and any(source.manifest.fingerprint != one.manifest.fingerprint for source in sources.values())
    }
    for name, source in sources.items():
        others = {at: one for at, one in evaluated.items() if one.manifest.fingerprint != source.manifest.fingerprint}
        looked_for = {at: others[at] for at in held_out if at in others and _n_documents(source) <= MOST_DOCUMENTS}
        for at in others.keys() - looked_for.keys():
            yield f"data.mixture.{name} has too many documents to look for held-out ones of {others[at].path} there"
        split, shared = data.trained[name].split, {at: set[str]() for at in looked_for}
        for sha256 in _hashes(source, split) if looked_for else ():
            for at, found in shared.items():
                if sha256 in held_out[at]:
                    found.add(sha256)
        for at in (at for at, found in shared.items() if found):
            yield (
                f"{len(shared[at]):,} of the {len(held_out[at]):,} documents that evaluations hold out ({at[0]!r} of "
                f"{others[at].path}) are in {split!r} of data.mixture.{name}, {source.path}, too: the run is trained "
                "on them"
            )


def inherited(folder: Path, store: Store, split: str) -> list[str]:
    """A note for each store that the model in an exported folder was trained on, if it has documents of this split of
    `store`, byte for byte, or if that is not known: it may have been moved since, or have too many to look at.

    Of other splits of `store` itself `inspect` says it. Nothing is said of a folder without origin.json.
    """
    notes = []
    unknown = f"whether the model in {folder} was trained on documents of {split!r} of {store.path} is not known: "
    for path, trained, fingerprint in _trained_on(folder):
        if fingerprint == store.manifest.fingerprint:
            if trained == split:
                notes.append(f"the model in {folder} was trained on {split!r} of {store.path}: it is no held-out text")
            continue
        try:
            source = Store.open(path)
        except DataError:
            notes.append(f"{unknown}{path}, which it was trained on, is no store now")
            continue
        try:
            if source.manifest.fingerprint != fingerprint:
                raise DataError(f"{path} is another store now, or was added to")
            if max(map(_n_documents, (source, store))) > MOST_DOCUMENTS:
                raise DataError(f"{path} or {store.path} has too many documents to look for them")
            scored = set(_hashes(store, split))
            shared = scored.intersection(_hashes(source, trained))
        except DataError as error:
            notes.append(f"{unknown}{error}")
            continue
        if shared:
            notes.append(
                f"{len(shared):,} of the {len(scored):,} documents of {split!r} of {store.path} are in {trained!r} of "
                f"{source.path}, on which the model in {folder} was trained: they are no held-out text for it"
            )
    return notes


def _trained_on(folder: Path) -> list[tuple[Path, str, str]]:
    """The stores that an exported model was trained on, by their folders then, with the split and the fingerprint."""
    try:
        run = read_origin(folder)["run"]
        data, fingerprints = DataConfig(**run["data"]), run["store_fingerprint"]
        found = [
            (read.store, read.split, fingerprints[f"{name}.store"] if name else fingerprints)
            for name, read in data.trained.items()
        ]
    except (ValueError, KeyError, TypeError, ConfigError):  # not of launch/export.py, or of another version
        return []
    return found


def _n_documents(store: Store) -> int:
    return sum(split.documents for split in store.manifest.splits.values())


def _hashes(store: Store, split: str) -> Iterator[str]:
    """The sha256 of each document of a split that is not empty."""
    return (each.sha256 for each in store.each_document() if each.split == split and each.n_bytes)
