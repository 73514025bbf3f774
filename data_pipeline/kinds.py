"""What kind of file it is, as the suffix of its name says: in lower or upper case, under that of a compression or not.

Which files of a folder are the input follows from that alone; those that are not are counted, so that a build can say
what it has left out.
"""

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable

from data_pipeline.compression import COMPRESSIONS

_KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".npy": "array",
    ".npz": "array",
    **dict.fromkeys((".fa", ".fas", ".fasta", ".fna", ".faa", ".ffn", ".frn"), "fasta"),
}
_FORMATS = (
    *(".json", ".csv", ".tsv", ".xml", ".html", ".htm", ".epub", ".pdf", ".docx"),
    *(".arrow", ".feather", ".h5", ".hdf5", ".zip", ".tar", ".tgz", ".bz2", ".7z", ".rar"),
    *(".png", ".jpg", ".jpeg", ".gif", ".wav", ".mp3", ".mid", ".mp4", ".bin", ".db", ".pkl", ".pt", ".safetensors"),
    *(".fai", ".gzi", ".2bit", ".dict", ".tbi", ".csi", ".fastq", ".fq", ".bam", ".sam", ".cram", ".vcf", ".bcf"),
    *(".bed", ".gff", ".gff3", ".gtf"),
)
"""Suffixes of what is hardly meant to be read as it is: tables, books in other formats, archives, media, and what lies
beside genomes."""
_MOST_NAMED = 5
"""Suffixes of files in a note on them."""


def compression_of(path: str) -> str:
    """`.gz`, `.bgz`, `.zst`, `.xz`, or nothing."""
    suffix = posixpath.splitext(path)[1].lower()
    return suffix if suffix in COMPRESSIONS else ""


def without_compression(path: str) -> str:
    """The path less the suffix of a compression."""
    return path[: len(path) - len(compression_of(path))]


def kind_of(path: str) -> str:
    """What documents a file holds: "text" (it is one), "jsonl", "parquet", "fasta" or "array"."""
    return _KINDS.get(_suffix(path), "text")


def is_document(path: str) -> bool:
    """Whether it would be read where its folder is an input, of text or of arrays."""
    return _suffix(path) in _KINDS


def _suffix(path: str) -> str:
    """In lower case, less that of a compression."""
    return posixpath.splitext(without_compression(path))[1].lower()


class Wanted:
    """The files of folders that are input, of text or of arrays, and a count of the others."""

    def __init__(self, arrays: bool) -> None:
        self.arrays = arrays
        self._suffixes = {suffix for suffix, kind in _KINDS.items() if (kind == "array") == arrays}
        self._others: dict[str, str] = {}  # the folder of each, by location

    def has(self, location: str, folder: str) -> bool:
        """Whether a file of a folder, which was asked for as an input, is of the kind that is read."""
        if _suffix(location) in self._suffixes:
            return True
        self._others[location] = folder
        return False

    def notes(self, read: Collection[str]) -> list[str]:
        """For the user: what was left out, and what is read as text that is hardly any.

        read: the locations of all inputs, since a file of another kind may be named itself.
        """
        return [note for note in (self._left_out(read), _formats_among(read)) if note]

    def _left_out(self, read: Collection[str]) -> str:
        left_out = self._others.keys() - read
        if not left_out:
            return ""
        first, *others = sorted({self._others[location] for location in left_out})
        n_files = len(left_out)
        return (
            f"left out {n_files:,} {'file' if n_files == 1 else 'files'} of other kinds in {first}"
            f"{f' and {len(others):,} more' if others else ''}: {_counts(left_out)}"
        )


def _formats_among(read: Collection[str]) -> str:
    found = sorted(location for location in read if _suffix(location) in _FORMATS)
    if not found:
        return ""
    others = f" (likewise {_counts(found[1:])})" if found[1:] else ""
    return (
        f"{found[0]} is one document, read as it is, {_suffix(found[0])} and all{others}: records are read out of "
        ".jsonl, .parquet and FASTA"
    )


def _counts(locations: Iterable[str]) -> str:
    """How many of each suffix, the most frequent first."""
    by_suffix = Counter(_suffix(path) + compression_of(path) or "without suffix" for path in locations)
    ranked = sorted(by_suffix.items(), key=lambda item: (-item[1], item[0]))
    counts = [f"{n_files:,} {suffix}" for suffix, n_files in ranked[:_MOST_NAMED]]
    if rest := sum(n_files for _, n_files in ranked[_MOST_NAMED:]):
        counts.append(f"{rest:,} more")
    return ", ".join(counts)
