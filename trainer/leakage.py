"""Documents that a mixture trains on although evaluations hold them out: reported, not refused, as it may be meant."""

from collections.abc import Iterator, Mapping

from data_pipeline.errors import DataError
from data_pipeline.store import Store
from trainer.config import DataConfig

MOST_DOCUMENTS = 5_000_000
"""More would take minutes to read, for which other ranks would wait."""


def leaks(data: DataConfig, store: Store, sources: Mapping[str, Store]) -> list[str]:
    """A note for each source of the mixture that trains on documents which evaluations hold out, byte for byte.

    Of one store, `inspect` says it. A table of documents that is damaged, which training does not need, is a note too,
    and one of more than MOST_DOCUMENTS is not read.
    """
    try:
        return list(_leaks(data, store, sources))
    except DataError as error:
        return [f"whether the mixture trains on held-out documents is not known: {error}"]


def _leaks(data: DataConfig, store: Store, sources: Mapping[str, Store]) -> Iterator[str]:
    of_sources = [(split, sources[name]) for name, split in data.eval_splits.items()]
    # One of these may be data.store.
    evaluated = {(split, one.manifest.fingerprint): one for split, one in [*of_sources, (data.eval_split, store)]}
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
        split, shared = data.train_splits[name], {at: set[str]() for at in looked_for}
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


def _n_documents(store: Store) -> int:
    return sum(split.documents for split in store.manifest.splits.values())


def _hashes(store: Store, split: str) -> Iterator[str]:
    """The sha256 of each document of a split that is not empty."""
    for part in store.parts:
        for document in part.documents():
            if document.split == split and document.n_bytes:
                yield document.sha256
