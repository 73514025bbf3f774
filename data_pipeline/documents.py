"""Documents out of files, as bytes, in blocks: text mode would rewrite line ends and the promise is every byte back.

A text file is one document; a JSON lines file, a Parquet file and an array hold many. A document is cut into blocks
at places that depend on its bytes alone, so that any number of processes tokenize a huge one, each in bounded memory,
to the same ids, and so that it makes no difference how its file is compressed or where it lies.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data_pipeline.config import POLICIES, TextSettings
from data_pipeline.errors import BadDocument
from data_pipeline.files import InputFile, read_content

BLOCK_BYTES = 1 << 20
"""Blocks begin near multiples of this. Larger ones gain nothing in speed, and cost memory."""
BOUNDARY_REACH_BYTES = 1 << 16
"""How far past the multiple a newline is looked for before a block may begin inside a line."""


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    text: TextSettings
    kind: str
    """Of the tokenizer: "sentencepiece" (text must be UTF-8 in the end), "bytes" (nothing is decoded) or "integers"."""
    vocab_size: int = 0
    """With "integers": the number of values."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """What to do about which problem, where it is not the default."""

    def replaces(self, problem: str) -> bool:
        """Whether what can be had of a document with this problem is kept."""
        return self.policies.get(problem, POLICIES[problem][0]) == "replace"


class Span(NamedTuple):
    """A stretch of a file: its blocks, or lines, that begin at byte `start` or later, before `stop`.

    (0, n_bytes) for a file that is not cut. Nominal places: the bytes decide where exactly a block begins.
    """

    file: int
    start: int
    stop: int


class Found(NamedTuple):
    """A problem of a document that is kept all the same."""

    problem: str
    detail: str


@dataclass(slots=True)
class Part:
    """What a span holds of one document. `blocks` is to be consumed before the next part is asked for."""

    record: int = -1
    """-1: the file is the document. Else the number of the line, row or item, from 0 on in this span."""
    first: bool = True
    """Whether the document begins in this span."""
    last: bool = True
    """Whether the document ends in this span. Only text files are ever cut."""
    blocks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    """The document's bytes. Raises BadDocument for a problem that is not replaced, or that leaves nothing to keep."""
    found: list[Found] = field(default_factory=list)
    """What was replaced, filled while the blocks are consumed."""
    offset: int = 0
    """Where the block that was read last begins in the document."""


def splittable(file: InputFile, text: TextSettings) -> bool:
    """Whether a file can be read from the middle."""
    if file.compression or text.encoding != "utf-8":
        return False
    return file.kind == "jsonl" or (file.kind == "text" and not text.normalize)


def plan_tasks(files: Sequence[InputFile], text: TextSettings, task_bytes: int) -> list[list[Span]]:
    """Cuts files into tasks of about `task_bytes`, in order.

    The tasks' spans end to end are the files end to end. A file that can be cut is cut at multiples of BLOCK_BYTES; an
    empty one has one empty span.
    """
    tasks: list[list[Span]] = [[]]
    room = task_bytes
    for number, file in enumerate(files):
        start = 0
        while True:
            stop = file.n_bytes
            if splittable(file, text):
                stop = min(start + max(room // BLOCK_BYTES, 1) * BLOCK_BYTES, stop)
            tasks[-1].append(Span(number, start, stop))
            room -= stop - start + 1  # the 1 keeps tasks short when all files are empty
            if room < BLOCK_BYTES:
                tasks.append([])
                room = task_bytes
            if stop == file.n_bytes:
                break
            start = stop
    return [task for task in tasks if task]


def read_parts(file: InputFile, span: Span, reading: Reading) -> Iterator[Part]:
    """The documents of a span, in order."""
    part = Part(first=span.start == 0, last=span.stop == file.n_bytes)
    part.blocks = _text_blocks(part, file, span, reading)
    yield part


def _text_blocks(part: Part, file: InputFile, span: Span, reading: Reading) -> Iterator[bytes]:
    chunks = read_content(file, span.start)
    stop = None if part.last else span.stop
    for part.offset, block in cut_blocks(chunks, span.start, stop):
        yield block


def cut_blocks(chunks: Iterable[bytes], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the blocks of a document that begin at byte `start` or later, before `stop` (None: its end).

    `chunks` are the document's bytes from `start` on, of any lengths. `start` and `stop` are multiples of BLOCK_BYTES.
    """
    source = iter(chunks)
    buffer = bytearray()
    begin = start
    for nominal in itertools.count(start or BLOCK_BYTES, BLOCK_BYTES):
        ahead = nominal - begin
        while len(buffer) < ahead + BOUNDARY_REACH_BYTES and (chunk := next(source, None)) is not None:
            buffer += chunk
        at_end = len(buffer) <= ahead
        end = len(buffer) if at_end else ahead + _boundary(bytes(buffer[ahead : ahead + BOUNDARY_REACH_BYTES]))
        if end and nominal > start:  # what precedes the first boundary belongs to the span before
            yield begin, bytes(memoryview(buffer)[:end])
        del buffer[:end]
        begin += end
        if at_end or nominal == stop:
            return


def _boundary(reach: bytes) -> int:
    """Where in `reach`, the bytes from a multiple of BLOCK_BYTES on, a block begins.

    Just after the next newline; without one, at the next UTF-8 character; where there is no UTF-8 at all, at once.
    """
    newline = reach.find(b"\n")
    if newline >= 0:
        return newline + 1
    at_end = len(reach) if len(reach) < 4 else 0
    return next((place for place, byte in enumerate(reach[:4]) if byte & 0xC0 != 0x80), at_end)


def invalid_utf8(error: UnicodeDecodeError, offset: int) -> BadDocument:
    """What a tokenizer's error about a block that begins at byte `offset` of a document says of the document."""
    return BadDocument("encoding", f"is not valid UTF-8 at byte {offset + error.start} ({error.reason})")
