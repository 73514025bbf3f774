"""Which document is held out: decided by its content alone.

A document belongs to a split by the hash of its bytes, so it stays where it is when other documents are added,
renamed or reordered, and exact copies of one text never end up on both sides of a split. The one exception is a split
that the hash left empty, see `assign_splits`.
"""

from collections.abc import Mapping

import numpy as np

from data_pipeline.errors import DataError


def assign_splits(
    digests: np.ndarray, split: Mapping[str, float], fill_empty: bool = True
) -> tuple[np.ndarray, list[str], list[str]]:
    """The split of each document, given the sha256 of its content and the share of each held-out split.

    Shares are laid end to end in the order of their names, so one whose name comes last moves none of the others.

    digests: uint8 [n, 32]. Returns a code per document, int64 [n]; the names that the codes number, "train" first;
    and notes for the user. With `fill_empty`, a split that the hash left empty takes the document with the lowest
    hash, and its copies, from train: the only way in which adding documents can move one. Without it (for documents
    added to a store that has its splits) a split, train too, may catch none.

    Raises DataError, with `fill_empty` only, when no document is left for train, or for one of the others.
    """
    names = ["train", *sorted(split)]
    words = np.ascontiguousarray(digests, np.uint8).view(">u8")  # [n, 4], in the order of the bytes
    codes = _split_by_hash(words, [split[name] for name in names[1:]])
    if not fill_empty:
        return codes, names, []
    notes = []
    for code, name in enumerate(names[1:], start=1):
        if (codes == code).any():
            continue
        codes[_lowest_of_train(words, codes, split)] = code
        notes.append(f"{name}={split[name]:g} caught none of {len(codes)} documents: took the one with the lowest hash")
    if not (codes == 0).any():
        raise _nothing_for_train(words, split)
    return codes, names, notes


def _split_by_hash(words: np.ndarray, fractions: list[float]) -> np.ndarray:
    """Codes, int64 [n]: 1 for the first fraction of the unit interval, 2 for the next, ..., 0 for the rest."""
    point = words[:, 0].astype(np.float64) / 2**64  # uniform in [0, 1]
    codes = np.zeros(len(words), np.int64)
    for code, fraction in enumerate(fractions, start=1):
        point -= fraction
        codes[(codes == 0) & (point < 0)] = code
    return codes


def _lowest_of_train(words: np.ndarray, codes: np.ndarray, split: Mapping[str, float]) -> np.ndarray:
    """A mask, bool [n], of the document of train with the lowest hash and its copies. Train must keep another."""
    train = words[codes == 0]
    if len(train):
        lowest = train[np.lexsort(train.T[::-1])[0]]
        found = (words == lowest).all(axis=1)
        if found.sum() < len(train):
            return found
    raise _nothing_for_train(words, split)


def _nothing_for_train(words: np.ndarray, split: Mapping[str, float]) -> DataError:
    n_different = len(np.unique(words, axis=0))
    if n_different > len(split):
        return DataError("--split leaves no document for train: lower its fractions or add documents")
    shares = ",".join(f"{name}={share:g}" for name, share in split.items())
    return DataError(  # lower fractions would not help
        f"--split {shares} needs more different documents than the {n_different} there are: add documents, name "
        "held-out files with --val-input or --test-input, or drop --split"
    )
