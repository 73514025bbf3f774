"""Documents out of arrays of integers: images, music, anything that comes as numbers below a declared vocabulary.

An array of two or more dimensions is a document for each item of the first, its values in C order; an array of one
dimension is one document. False and True are 0 and 1. Values are read as they are needed: an array may be larger than
memory.
"""

import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO, cast

import numpy as np

from data_pipeline.blocks import BLOCK_BYTES
from data_pipeline.errors import BadDocument
from data_pipeline.tokenizer import value_dtype

_MOST_NAMED = 3
"""Other arrays of an archive, in the advice to read one of them."""
_MOST_TRIED = 100
"""Other arrays that are looked at for it."""
_ONLY = "array"
"""What the array of an .npy file is called; those of an archive have names."""
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Array:
    """An array of integers in a stream that can be wound forward."""

    def __init__(self, stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, label: str) -> None:
        self.n_items = shape[0] if len(shape) > 1 else 1
        self.ended_early = False
        """Whether the stream was found to end before the array does: later items are not there."""
        self._stream = stream
        self._label = label
        self._dtype = dtype
        self._item_values = math.prod(shape[1:] if len(shape) > 1 else shape)
        self._start = stream.tell()

    def read_item(self, item: int, n_values: int) -> Iterator[bytes]:
        """The values of an item in blocks, as bytes of the tokenizer's `value_dtype(n_values)`.

        Raises BadDocument("encoding") for a value outside 0 to n_values - 1, and ("truncated") after the values that
        there are.
        """
        dtype = value_dtype(n_values)
        block_values = BLOCK_BYTES // dtype.itemsize
        item_start = self._start + item * self._item_values * self._dtype.itemsize
        for first in range(0, self._item_values, block_values):
            wanted = min(block_values, self._item_values - first)
            data = self._read(item_start + first * self._dtype.itemsize, wanted * self._dtype.itemsize)
            values = np.frombuffer(data[: len(data) - len(data) % self._dtype.itemsize], self._dtype)
            _check_values(values, first, n_values, self._where(item))
            if len(values):
                yield values.astype(dtype).tobytes()
            if len(values) < wanted:
                self.ended_early = True
                raise BadDocument(
                    "truncated",
                    f"ends early{self._where(item)}: {first + len(values)} values are there instead of "
                    f"{self._item_values}",
                )

    def is_followed(self) -> bool:
        """Whether the stream goes on after the array."""
        end = self._start + self.n_items * self._item_values * self._dtype.itemsize
        return not self.ended_early and bool(self._read(end, 1))

    def _where(self, item: int) -> str:
        """Of an archive, whose documents are numbered through all of its arrays."""
        return "" if self._label == _ONLY else f", item {item} of its {self._label}"

    def _read(self, place: int, n_bytes: int) -> bytes:
        """The bytes at a place of the stream, fewer where it ends."""
        try:
            self._stream.seek(place)
            return self._stream.read(n_bytes)
        except MemoryError:  # says nothing of the file
            raise
        except Exception as error:  # storage clients raise errors of their own
            raise BadDocument("unreadable", f"cannot be read: {error}") from error


def _check_values(values: np.ndarray, first: int, n_values: int, where: str) -> None:
    if not len(values) or (values.min() >= 0 and values.max() < n_values):
        return
    place = np.flatnonzero((values < 0) | (values >= n_values))[0]
    raise BadDocument(
        "encoding", f"has the value {values[place]} at place {first + place}{where}: expected 0 to {n_values - 1}"
    )


def open_arrays(stream: BinaryIO, is_archive: bool, member: str | None) -> Iterator[Array | BadDocument]:
    """The array of an .npy file, or those of an archive (.npz) in their order, or `member` of it.

    Each is to be read before the next. One that cannot be read comes as what is wrong with it, and so does what follows
    one in its stream. Raises BadDocument for a file that is no such file.
    """
    if not is_archive:
        yield from _arrays_of(stream, _ONLY)
        return
    head = stream.read(4)
    stream.seek(0)
    try:
        archive = zipfile.ZipFile(stream)
    except zipfile.BadZipFile as error:
        problem = "truncated" if head == b"PK\3\4" else "unreadable"
        raise BadDocument(problem, f"is not a whole .npz file ({error})") from error
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # zipfile does not foresee all that a damaged directory may say
        raise BadDocument("unreadable", f"is not an .npz file, or is damaged ({error})") from error
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if member is not None and member not in names:
            raise BadDocument("unreadable", f"has no array {member!r} but {', '.join(names)}: name one with --field")
        for name in names if member is None else [member]:
            others = [other for other in names if other != name][:_MOST_TRIED]
            yield from _open_member(archive, name, partial(_readable, archive, others))


def _readable(archive: zipfile.ZipFile, names: Sequence[str]) -> list[str]:
    """Those of some members that are arrays of integers, as their headers say."""
    found = []
    for name in names:
        with suppress(Exception), archive.open(f"{name}.npy") as stream:  # of which zipfile has many kinds
            if isinstance(_open_array(cast(BinaryIO, stream), name), Array):
                found.append(name)
    return found


def _open_member(
    archive: zipfile.ZipFile, name: str, others: Callable[[], Sequence[str]]
) -> Iterator[Array | BadDocument]:
    """The array in a member of an archive; others: names of those that could be read in its place.

    The member is read to its end before any of it is used: there stands the checksum, which is of all items together,
    so that none of them can be trusted when it is wrong. To read twice takes time, but no memory whatever the size.
    """
    try:
        with archive.open(f"{name}.npy") as stream:
            while stream.read(BLOCK_BYTES):
                pass
        stream = archive.open(f"{name}.npy")
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        why = str(error) or "it ends early"
        yield BadDocument("truncated", f"its array {name} is corrupt, and there is no telling where ({why})")
        return
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # no array, not to be expanded here, or an error of a storage client's own
        yield BadDocument("unreadable", f"has a member {name} that is no array that can be read ({error})")
        return
    with stream:
        yield from _arrays_of(cast(BinaryIO, stream), f"array {name}", others)


def _arrays_of(
    stream: BinaryIO, label: str, others: Callable[[], Sequence[str]] = tuple
) -> Iterator[Array | BadDocument]:
    """The array that a stream holds, and after it what is wrong where the stream holds more."""
    array = _open_array(stream, label, others)
    yield array
    if isinstance(array, Array) and array.is_followed():
        yield BadDocument(
            "unreadable",
            f"goes on after its {label}: save each array in a file of its own, or under a name of its own in an .npz",
        )


def _open_array(stream: BinaryIO, label: str, others: Callable[[], Sequence[str]] = tuple) -> Array | BadDocument:
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADERS:
            raise ValueError(f"format version {version[0]}.{version[1]} is not for integers")
        shape, fortran_order, dtype = _HEADERS[version](stream)
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # numpy reads a header as Python, and lets the errors of its parser pass
        return BadDocument("unreadable", f"holds no {label} that can be read ({error})")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize >= 1 << 63:
        return BadDocument(
            "unreadable", f"its {label} has the shape {shape}: expected lengths from 0 on, and in all below 2**63 bytes"
        )
    if dtype.kind == "b":
        dtype = np.dtype(np.uint8)  # as which it is stored
    if dtype.kind not in "iu":
        convert = "save each piece as an array of its own, numpy.savez(file, *pieces)"
        way_out = convert if dtype.hasobject else "convert it to integers"
        if names := others():
            named = " or ".join([*names[:_MOST_NAMED], *["another"] * (len(names) > _MOST_NAMED)])
            way_out = f"name the one to read, --field {named}" + (f", or {convert}" if dtype.hasobject else "")
        where = "" if label == _ONLY else f" in its {label}"
        return BadDocument("unreadable", f"holds {_describe(dtype)}{where}, not integers: {way_out}")
    if fortran_order and len(shape) > 1:
        return BadDocument(
            "unreadable", f"has its {label} in Fortran order: save numpy.ascontiguousarray(array) instead"
        )
    return Array(stream, shape, dtype, label)


def _describe(dtype: np.dtype) -> str:
    return "Python objects" if dtype.hasobject else f"values of type {dtype}"
