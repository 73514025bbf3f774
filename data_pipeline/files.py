"""Which files are the input, and their bytes: on disk or behind an fsspec URL, compressed or not.

A file's name, which the store records, is its path below the folder that was asked for, so that the same corpus gives
the same store wherever it lies, and however it is compressed: `a.txt.gz` is named `a.txt`. Everything is read as
bytes, in order and in bounded memory; a file that is not what it was when it was found is an error, never a surprise.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import BinaryIO

from data_pipeline.compression import FEED_BYTES, expand
from data_pipeline.errors import BadDocument, DataError, InputChanged
from data_pipeline.finding import find
from data_pipeline.kinds import Wanted, compression_of, kind_of, without_compression
from data_pipeline.urls import described, file_system, mtime_ns

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input as it was found. Its size and time tell later whether it changed since."""

    name: str
    """Path below the folder that was asked for, with forward slashes, less the suffix of a compression; unique."""
    location: str
    """Path on this machine, or URL."""
    n_bytes: int
    """As stored: compressed, if it is."""
    mtime_ns: int | None
    """None where the file system keeps no time."""
    split: str | None
    """The split that its documents form: "val" of --val-input, "test" of --test-input; None: as --split says."""

    def document_name(self, record: int) -> str:
        """The name of a document in it: its own, or that of record number `record`, if that is not negative."""
        return self.name if record < 0 else f"{self.name}/{record}"

    @property
    def option(self) -> str:
        """How it came in."""
        return f"--{self.split}-input" if self.split else "--input"

    @property
    def kind(self) -> str:
        """What documents it holds: "text" (it is one), "jsonl", "parquet", "fasta" or "array"."""
        return kind_of(self.location)

    @property
    def compression(self) -> str:
        """`.gz`, `.bgz`, `.zst`, `.xz`, or nothing."""
        return compression_of(self.location)


def find_files(
    inputs: Sequence[str], held_out: Mapping[str, Sequence[str]], arrays: bool, notes: list[str] | None = None
) -> list[InputFile]:
    """All files of the inputs, and of those that form splits of their own, by its name; sorted by their names.

    An input is a file, a folder, a glob, `@LIST` (a text file with an input on each line), or an fsspec URL of a file,
    folder or glob. A folder is searched for text (.txt, .jsonl, .parquet, FASTA), or with `arrays` for .npy and .npz,
    but not for what is hidden or in a store; a file that is named, or that a glob matches, counts whatever its suffix.
    `notes` gets a line about files of folders that were left out, if any were.

    Raises DataError for an input that is missing or unreadable or holds no such file, for a name that occurs twice, for
    text where arrays are wanted or the reverse, and for inputs without a single byte.
    """
    wanted = Wanted(arrays)
    by_split: list[tuple[str | None, Sequence[str]]] = [(None, inputs), *held_out.items()]
    files = [
        InputFile(without_compression(found.below), found.location, found.n_bytes, found.mtime_ns, split)
        for split, sources in by_split
        for source in sources
        for found in find(source, wanted)
    ]
    files.sort(key=lambda file: file.name)
    for one, other in pairwise(files):
        if one.name == other.name:
            check_held_out((one, other), {one.name})
            raise DataError(
                f"two files are named {one.name!r}: {one.location} and {other.location}. Names are paths below what is "
                "given, without the suffix of a compression; give a folder that holds both, or @LIST (a text file with "
                "the folders in it, which are a part of the names then), or rename one"
            )
    check_folders(locations := {file.name: file.location for file in files}, locations)
    for file in files:
        _check_kind(file, arrays)
    for option in {file.option for file in files}:
        if not any(file.n_bytes for file in files if file.option == option):
            raise DataError(f"every file of {option} is empty: there is nothing to read")
    if notes is not None:
        notes.extend(wanted.notes(read=set(locations.values())))
    return files


def check_held_out(files: Sequence[InputFile], fresh: Collection[str]) -> None:
    """Raises DataError for a file that comes in by two options, be it by a link, under a name that is `fresh`."""
    real_folder = cache(os.path.realpath)

    def place(file: InputFile) -> str:
        path = file.location.removeprefix("file://")
        if "://" in path:
            return path
        folder, name = os.path.split(path)
        path = os.path.join(real_folder(folder), name)  # noqa: PTH118 (a Path for each file, as below)
        return os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114 (as above)

    held_out = {place(file): file for file in files if file.split}
    for file in files if held_out else ():
        other = held_out.get(place(file))
        if other and other.split != file.split and not {file.name, other.name}.isdisjoint(fresh):
            raise DataError(
                f"one file is given twice: {file.location} by {file.option}, named {file.name!r}, and {other.location} "
                f"by {other.option}, named {other.name!r}. Give it once: move what is held out to a folder outside "
                f"{file.option}, or give {file.option} a glob or @LIST without it"
            )


def check_folders(files: Mapping[str, str], fresh: Collection[str]) -> None:
    """Raises DataError where a document of one file may be named as another file, one of the two being `fresh`.

    files: where each is, by name.
    """
    for name, location in files.items():
        folder = name
        while folder := folder.rpartition("/")[0]:
            if folder in files and kind_of(folder) != "text" and (name in fresh or folder in fresh):
                raise DataError(
                    f"{location} is in a folder with the name of another input, {folder!r}, whose documents "
                    f"are named {folder}/0, {folder}/1, ...: rename one of them"
                )


def _check_kind(file: InputFile, arrays: bool) -> None:
    try:
        file.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the file name {file.name!a} is not valid UTF-8: rename it") from None
    if arrays and file.kind != "array":
        raise DataError(
            f"{file.location} is not an array: --tokenizer integers reads .npy and .npz. For text use a SentencePiece "
            "model or --tokenizer bytes"
        )
    if file.kind == "array" and not arrays:
        raise DataError(f"{file.location} is an array: use --tokenizer integers with --vocab-size")


def _unreadable(error: Exception) -> BadDocument:
    if isinstance(error, MemoryError):  # says nothing of the file
        raise error
    return BadDocument("unreadable", f"cannot be read: {described(error)}")


def _changed(file: InputFile) -> InputChanged:
    return InputChanged(f"{file.location} changed while it was being read")


@contextmanager
def open_raw(file: InputFile) -> Iterator[BinaryIO]:
    """The file's bytes as stored, seekable.

    Raises BadDocument("unreadable") when it cannot be opened, InputChanged when it is not what was found before.
    """
    try:
        stream, n_bytes, mtime_ns = _open(file.location)
    except FileNotFoundError:
        raise InputChanged(f"{file.location} was removed meanwhile") from None
    except DataError:
        raise
    except Exception as error:  # storage clients raise errors of their own
        raise _unreadable(error) from error
    with stream:
        if (n_bytes, mtime_ns) != (file.n_bytes, file.mtime_ns):
            raise _changed(file)
        yield stream


def _open(location: str) -> tuple[BinaryIO, int, int | None]:
    if "://" in location:
        system, path = file_system(location)
        info = system.info(path)
        return system.open(path, "rb"), info["size"], mtime_ns(info)
    stream = open(location, "rb")  # noqa: PTH123, SIM115 (as above; the caller closes it)
    status = os.fstat(stream.fileno())
    return stream, status.st_size, status.st_mtime_ns


@contextmanager
def open_seekable(file: InputFile) -> Iterator[BinaryIO]:
    """The file's content, seekable: what is compressed is expanded into a temporary file. Raises as `read_content`."""
    if not file.compression:
        with open_raw(file) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as expanded:
        try:
            expanded.writelines(read_content(file))
            expanded.seek(0)
        except OSError as error:
            raise DataError(
                f"cannot expand {file.location} in {tempfile.gettempdir()}: {error.strerror}. Make room, or set TMPDIR"
            ) from error
        yield expanded


def read_content(file: InputFile, start: int = 0) -> Iterator[bytes]:
    """The file's content, expanded, in chunks, from byte `start` on (0 where the file is compressed).

    Raises BadDocument("truncated") after all that can be expanded of a file that ends early or is corrupt; else as
    `open_raw`, and BadDocument("unreadable") when reading fails.
    """
    with open_raw(file) as stream:
        if file.compression:
            yield from expand(_chunks(file, stream, FEED_BYTES), file.compression)
        else:
            yield from _chunks(file, stream, _CHUNK_BYTES, start)


def hash_file(file: InputFile) -> str:
    """The sha256 (hex) of the file's bytes as stored. Raises DataError when it cannot be read or has changed."""
    digest = hashlib.sha256()
    try:
        with open_raw(file) as stream:
            for chunk in _chunks(file, stream, _CHUNK_BYTES):
                digest.update(chunk)
    except BadDocument as problem:
        raise DataError(f"{file.location} {problem}") from problem
    return digest.hexdigest()


def _chunks(file: InputFile, stream: BinaryIO, most: int, start: int = 0) -> Iterator[bytes]:
    """The stored bytes from `start` on, up to `most` at a time."""
    most = min(most, file.n_bytes + 1)  # room for more than there is would take time to get
    place = start
    try:
        if start:
            stream.seek(start)
        while chunk := stream.read(most):
            yield chunk
            place += len(chunk)
    except Exception as error:  # storage clients raise errors of their own
        raise _unreadable(error) from error
    if place != file.n_bytes:
        raise _changed(file)
