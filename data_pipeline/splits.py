"""Which document is held out: decided by its content alone.

A document belongs to a split by the hash of its bytes, so it stays where it is when other documents are added,
renamed or reordered, and exact copies of one text never end up on both sides of a split.
"""

from collections.abc import Mapping, Sequence

from data_pipeline.errors import DataError


def assign_splits(digests: Sequence[str], split: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The split of each document, given the sha256 (hex) of its content and the share of each held-out split.

    Returns the names, and notes for the user: a split that the hash left empty takes the document with the lowest
    hash instead. Raises DataError when there are too few different documents for that, or none is left to train on.
    """
    names = [_split_by_hash(digest, split) for digest in digests]
    notes = []
    for name in sorted(split):
        if name in names:
            continue
        candidates = sorted({d for d, current in zip(digests, names, strict=True) if current == "train"})
        if len(candidates) < 2:
            raise DataError(
                f"--split {name}={split[name]:g} needs more different documents than the {len(set(digests))} there "
                "are: add documents, name held-out files with --val-input, or drop --split"
            )
        names = [name if digest == candidates[0] else old for digest, old in zip(digests, names, strict=True)]
        notes.append(
            f"{name}={split[name]:g} caught none of {len(digests)} documents: took the one with the lowest hash"
        )
    if "train" not in names:
        raise DataError("--split leaves no document for train: lower its fractions or add documents")
    return names, notes


def _split_by_hash(digest: str, split: Mapping[str, float]) -> str:
    point = int(digest[:16], 16) / 2**64  # uniform in [0, 1)
    for name in sorted(split):
        point -= split[name]
        if point < 0:
            return name
    return "train"
