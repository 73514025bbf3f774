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
    evaluated_splits = {
        (split, evaluated.manifest.fingerprint): evaluated
        for split, evaluated in [
            *((split, sources[name]) for name, split in data.eval_splits.items()),
            (data.eval_split, store),  # which may be one of these
        ]
    }
    for (eval_split, _), evaluated in evaluated_splits.items():
        held_out: set[str] | None = None
        for name, source in sources.items():
            if source.manifest.fingerprint == evaluated.manifest.fingerprint:
                continue
            if max(_n_documents(source), _n_documents(evaluated)) > MOST_DOCUMENTS:
                yield f"data.mixture.{name} has too many documents to look for held-out ones of {evaluated.path} there"
                continue
            held_out = set(_hashes(evaluated, eval_split)) if held_out is None else held_out
            split = data.train_splits[name]
            if n_shared := len(held_out.intersection(_hashes(source, split))):
                yield (
                    f"{n_shared:,} of the {len(held_out):,} documents that evaluations hold out ({eval_split!r} of "
                    f"{evaluated.path}) are in {split!r} of data.mixture.{name}, {source.path}, too: the run is "
                    "trained on them"
                )


def _n_documents(store: Store) -> int:
    return sum(split.documents for split in store.manifest.splits.values())


def _hashes(store: Store, split: str) -> Iterator[str]:
    """The sha256 of each document of a split that is not empty."""
    for part in store.parts:
        for document in part.documents():
            if document.split == split and document.n_bytes:
                yield document.sha256
