"""Which documents are copies of an earlier one: exactly, by hash, or nearly, by MinHash.

Exact copies are found by the sha256 of their bytes. Near copies (another printing of the same novel, a page with
another header) are texts that share most of their shingles, runs of five words. A MinHash signature of 128 numbers
estimates which share (their Jaccard similarity J), with a standard error of sqrt(J (1 - J) / 128), 0.045 at most.
datasketch makes the signatures. The search for pairs is ours: datasketch's index takes 5 KB a document.

Signatures are computed on bytes, without decoding: 18 MB/s on one core (measured, English novels). Words are runs of
letters and digits of any script, in lower case if ASCII; between them lie spaces, punctuation and symbols (ASCII,
U+0080-00BF, U+2000-2FFF); each character of U+3000-9FFF, of scripts that put no spaces, is a word of its own. Nothing
depends on the process or the platform: no hash() of Python, no floating point before the threshold.
"""

import importlib.metadata
from array import array
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.rolling import BASE, powers

N_PERMUTATIONS = 128
"""Numbers in a signature: 512 MB for a million documents, which a build has in memory twice for a moment."""

_SHINGLE_WORDS = 5
_EMPTY = np.uint32(2**32 - 1)  # what datasketch starts from: a signature of nothing else has seen no shingle
_BATCH_SHINGLES = 2048  # 2048 x 128 uint32 stay in the processor's cache
_SKETCH_BITS = 4  # of each number: of 16 numbers that differ, 15 are told apart without a look at the signatures
_SPREAD = np.uint32(0x9E3779B1)  # the upper bits of the product depend on all bits of a number
_FEW = 128  # members of its buckets with which a document is compared at once: sketches of so few save no time

_SEPARATOR, _WORD, _LONE, _SYMBOL = range(4)
_COMBINE = np.array([pow(0xD6E8FEB86659FD93, k + 1, 2**64) for k in range(_SHINGLE_WORDS)], np.uint64)


def _byte_classes() -> bytes:
    """What each byte, at the start of a character, makes of it."""
    classes = bytearray(_WORD if byte >= 0x80 or chr(byte).isalnum() else _SEPARATOR for byte in range(256))
    classes[0xE3:0xEA] = bytes([_LONE]) * 7  # U+3000-9FFF
    classes[0xC2] = classes[0xE2] = _SYMBOL  # U+0080-00BF, U+2000-2FFF
    return bytes(classes)


_CLASSES = _byte_classes()
_LOWER = bytes(range(256)).lower()


class Known(NamedTuple):
    """Documents that a store holds already, which stay, whatever is found."""

    sha256: np.ndarray
    """uint8 [m, 32]"""
    signatures: np.ndarray
    """uint32 [n, 128]: of those that have one."""


def exact(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each document the first earlier one of the same content.

    digests: uint8 [n, 32], the sha256 of each document. known: uint8 [m, 32], of documents that are there already.
    Returns int64 [n]: an index below the document's own, or -1 where there is none, or -2 where it is in `known`.
    """
    words = np.ascontiguousarray(np.concatenate((known, digests)), np.uint8).view(np.uint64)
    order = np.lexsort(words.T)  # stable: copies stay in the order in which they came
    starts_group = np.ones(len(order), bool)
    starts_group[1:] = (words[order[1:]] != words[order[:-1]]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts_group][np.cumsum(starts_group) - 1]
    first = first[len(known) :] - len(known)
    return np.where(first < 0, -2, np.where(first == np.arange(len(first)), -1, first))


def near(signatures: np.ndarray, threshold: float, known: np.ndarray) -> np.ndarray:
    """For each document the first earlier one that is kept and, by the estimate, similar to at least `threshold`.

    signatures: uint32 [n, 128]. known: uint32 [m, 128], of documents that are there already. Returns int64 [n]: an
    index below the document's own, or -1 where there is none, in which case the document is kept, or -2 where one in
    `known` is similar. A document without words is like no other. Of the pairs at the threshold at least 9 in 10 are
    compared, of more similar ones more (`_bands`). Raises DataError for a threshold outside 0.5 to 1.

    Texts on one template that are not quite similar share bands all the same, a fifth or a half of all pairs: of these,
    `_n_shared` and `_sketches` rule out nearly all without a look at the signatures.
    """
    if not 0.5 <= threshold <= 1:
        raise DataError(f"--near-threshold is {threshold:g}: expected 0.5 to 1")
    n_known = len(known)
    if n_known:
        signatures = np.concatenate((known, signatures))
    buckets = _shared_buckets(signatures, *_bands(threshold))
    members = np.flatnonzero((buckets >= 0).any(axis=1))
    least_equal = threshold * N_PERMUTATIONS
    members = members[_n_shared(signatures, members) >= least_equal]
    sketches = _sketches(signatures, members)
    original = np.full(len(signatures), -1, np.int64)
    kept: dict[int, array[int]] = defaultdict(lambda: array("i"))  # bucket -> the kept members in it
    for member, i in enumerate(members.tolist()):
        mine = [bucket for bucket in buckets[i].tolist() if bucket >= 0]
        if i >= n_known:
            candidates = members[_candidates([kept[bucket] for bucket in mine], member, sketches, least_equal)]
            similar = candidates[(signatures[candidates] == signatures[i]).sum(axis=1) >= least_equal]
            if len(similar):
                original[i] = similar.min()
                continue
        for bucket in mine:
            kept[bucket].append(member)
    found = original[n_known:]
    return np.select([found < 0, found < n_known], [-1, -2], found - n_known)


def _bands(threshold: float) -> tuple[int, int]:
    """Number of bands and numbers in each: the longest bands of which a pair at the threshold shares one at 0.9.

    A pair of similarity s shares all of a band of r numbers with the probability s**r, and so one band of b or more
    with 1 - (1 - s**r)**b: at 0.8 that is 16 bands of 8, which find 0.95 of the pairs at 0.8 and 0.001 of those at 0.3.
    """
    n_numbers = max(r for r in range(1, 65) if 1 - (1 - threshold**r) ** (N_PERMUTATIONS // r) >= 0.9)
    return N_PERMUTATIONS // n_numbers, n_numbers


def _shared_buckets(signatures: np.ndarray, n_bands: int, n_numbers: int) -> np.ndarray:
    """int32 [n, n_bands]: a number for each content of each band, equal for equal ones; -1 where no other has it.

    As most texts are like no other, what is left to remember of them while duplicates are looked for is little.
    """
    with_words = (signatures != _EMPTY).any(axis=1)
    buckets = np.full((len(signatures), n_bands), -1, np.int32)
    n_buckets = 0
    for band in range(n_bands):
        key = np.zeros(len(signatures), np.uint64)
        for column in range(band * n_numbers, (band + 1) * n_numbers):
            key = key * np.uint64(BASE) + signatures[:, column]
        _, bucket, size = np.unique(key, return_inverse=True, return_counts=True)
        shared = size > 1
        number = np.where(shared, n_buckets + np.cumsum(shared) - 1, -1)
        buckets[:, band] = np.where(with_words, number[bucket], -1)
        n_buckets += int(shared.sum())
    return buckets


def _candidates(alike: Sequence["array[int]"], member: int, sketches: np.ndarray, least_equal: float) -> np.ndarray:
    """int64: the members in the buckets `alike` of this one, but for those that are sure to share too few numbers.

    One that is in several buckets may be returned several times.
    """
    if sum(map(len, alike)) <= _FEW:
        return np.fromiter(set().union(*alike), np.int64)
    candidates = np.concatenate(alike, dtype=np.int64)
    return candidates[_most_equal(sketches, candidates, member) >= least_equal]


def _n_shared(signatures: np.ndarray, members: np.ndarray) -> np.ndarray:
    """int64 [n_members]: how many numbers of each have an equal one, at the same place, in another of the members.

    As many as that it can share with another document, and no more. Of texts on one template few have enough.
    """
    n_shared = np.zeros(len(members), np.int64)
    for column in range(N_PERMUTATIONS):
        _, value, size = np.unique(signatures[members, column], return_inverse=True, return_counts=True)
        n_shared += size[value] > 1
    return n_shared


def _sketches(signatures: np.ndarray, members: np.ndarray) -> np.ndarray:
    """uint64 [2, _SKETCH_BITS, n_members]: a hash of a few bits of each number, for a first comparison.

    The bit k of the words [half, bit] is that bit of the hash of number 64 * half + k.
    """
    sketches = np.zeros((2, _SKETCH_BITS, len(members)), np.uint64)
    for column in range(N_PERMUTATIONS):
        half, place = divmod(column, 64)
        hashed = signatures[members, column] * _SPREAD >> np.uint32(32 - _SKETCH_BITS)
        for bit in range(_SKETCH_BITS):
            sketches[half, bit] |= (hashed >> np.uint32(bit) & np.uint32(1)).astype(np.uint64) << np.uint64(place)
    return sketches


def _most_equal(sketches: np.ndarray, candidates: np.ndarray, member: int) -> np.ndarray:
    """uint8 [n_candidates]: how many numbers of each candidate can at most be equal to those of `member`."""
    n_different = np.zeros(len(candidates), np.uint8)
    for half in sketches:
        different = np.zeros(len(candidates), np.uint64)
        for words in half:
            different |= words.take(candidates) ^ words[member]
        n_different += np.bitwise_count(different)
    return N_PERMUTATIONS - n_different


class Signature:
    """The MinHash signature of a document, or of a part of one, that comes in blocks of bytes.

    The signature of a whole is the elementwise minimum of its parts' but for words and shingles across each seam.
    """

    def __init__(self) -> None:
        self._minhash = _minhash(np.full(N_PERMUTATIONS, _EMPTY))
        self._last_words = np.zeros(0, np.uint64)
        self._open = np.zeros(0, np.uint64)
        """The hash of a word that reaches to the end of the last block, and may go on in the next one."""
        self._open_bytes = 0

    def update(self, block: bytes) -> None:
        """Takes in the next block: words and shingles reach from one into the next."""
        if not block:
            return
        words = _hash_words(block)
        hashes, n_open = words.hashes, words.n_open
        if words.goes_on and len(self._open):
            hashes[:1] = self._open + hashes[:1] * np.uint64(pow(BASE, self._open_bytes, 2**64))
            n_open += self._open_bytes if len(hashes) == 1 and n_open else 0
        else:
            hashes = np.concatenate((self._open, hashes))
        closed = len(hashes) - bool(n_open)
        self._open, self._open_bytes = hashes[closed:], n_open
        self._last_words = _add_shingles(self._minhash, np.concatenate((self._last_words, hashes[:closed])))

    def value(self, is_whole: bool = True) -> np.ndarray:
        """uint32 [128]. A whole document of fewer than five words counts as one shingle, one of none as no shingle."""
        minhash = self._minhash.copy()
        words = np.concatenate((self._last_words, self._open))
        _add_shingles(minhash, words)
        if is_whole and minhash.is_empty() and len(words):
            _add(minhash, _mix((words * _COMBINE[: len(words)]).sum(keepdims=True)))
        return minhash.digest()


def _add_shingles(minhash: Any, words: np.ndarray) -> np.ndarray:
    """Adds each run of five words; returns the last four, with which the next ones make more."""
    if len(words) >= _SHINGLE_WORDS:
        _add(minhash, _mix(np.lib.stride_tricks.sliding_window_view(words, _SHINGLE_WORDS) @ _COMBINE))
    return words[-(_SHINGLE_WORDS - 1) :]


class _Words(NamedTuple):
    """Of a block."""

    hashes: np.ndarray
    """uint64 [n_words]."""
    goes_on: bool
    """Whether the first begins the block, and may be the rest of one in the block before."""
    n_open: int
    """Bytes of the last where it ends the block, and may go on in the next; 0 where none does."""


def _hash_words(block: bytes) -> _Words:
    """A hash of each word: sum of (byte_i + 1) * BASE**i modulo 2**64, for all words at once."""
    classes = np.frombuffer(block.translate(_CLASSES), np.uint8)
    in_word = (classes == _WORD) | (classes == _LONE)
    symbol = np.frombuffer(block, np.uint8) == 0xE2
    in_word[1:] &= classes[:-1] != _SYMBOL  # the second byte of a symbol
    in_word[2:] &= ~symbol[:-2]  # and the third, which only U+2000-2FFF have
    begins = in_word.copy()
    begins[1:] &= ~in_word[:-1] | (classes == _LONE)[1:]
    begins[3:] |= in_word[3:] & (classes == _LONE)[:-3]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return _Words(np.zeros(0, np.uint64), False, 0)
    goes_on = starts[0] == 0 and classes[0] == _WORD
    n_open = len(block) - int(starts[-1]) if in_word[-1] and classes[starts[-1]] == _WORD else 0
    up, down = powers(len(block))
    letters = (np.frombuffer(block.translate(_LOWER), np.uint8).astype(np.uint64) + np.uint64(1)) * in_word
    # Each word is summed with the powers of its place in the block; its own start is then divided out.
    return _Words(np.add.reduceat(letters * up, starts) * down[starts], bool(goes_on), n_open)


def _mix(hashes: np.ndarray) -> np.ndarray:
    """uint64 -> uint32, such that every bit of the one decides about every bit of the other (as MurmurHash3 ends)."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return (hashes >> np.uint64(32)).astype(np.uint32)


def _add(minhash: Any, hashes: np.ndarray) -> None:
    for start in range(0, len(hashes), _BATCH_SHINGLES):
        minhash.update_batch(hashes[start : start + _BATCH_SHINGLES].tolist())


def _minhash(values: np.ndarray) -> Any:
    """datasketch's MinHash with these values, uint32 [128]; it takes shingles that are hashes already."""
    library = _datasketch()
    return library.MinHash(hashvalues=values, permutations=_permutations(), scheme="affine32", hashfunc=int)


@cache
def _permutations() -> np.ndarray:
    return _datasketch().MinHash(N_PERMUTATIONS, seed=1, scheme="affine32").permutations


@cache
def _datasketch() -> Any:
    """The library. Signatures of version 1 are other numbers, so they would make other stores."""
    way_out = "pip install 'longhand[corpus]'"
    try:
        import datasketch
    except ImportError:
        raise DataError(f"--duplicates near needs the package datasketch: {way_out}") from None
    version = importlib.metadata.version("datasketch")
    if int(version.split(".")[0]) < 2:
        raise DataError(f"--duplicates near needs datasketch 2.0 or later, and {version} is installed: {way_out}")
    return datasketch
