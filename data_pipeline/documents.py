"""Documents out of files, as bytes, in blocks: text mode would rewrite line ends and the promise is every byte back.

A text file is one document; a file of JSON lines, Parquet, FASTA or arrays holds many. A document is cut into blocks
at places that depend on its bytes alone, so that any number of processes tokenize a huge one, each in bounded memory,
to the same ids, and so that it makes no difference how its file is compressed or where it lies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, NoReturn

from data_pipeline.arrays import open_arrays
from data_pipeline.blocks import (
    BLOCK_BYTES,
    Settle,
    compose_characters,
    cut_blocks,
    decode_chunks,
    decode_marking,
    drop_byte_order_mark,
    drop_cut_character,
    encode_text,
    repair_utf8,
    unify_newlines,
)
from data_pipeline.config import POLICIES, TextSettings
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.fasta import sequence_pieces
from data_pipeline.files import InputFile, open_seekable, read_content
from data_pipeline.records import Line, json_text, parquet_values, split_lines


@dataclass(frozen=True)
class Reading:
    """How documents are read."""

    text: TextSettings
    kind: str
    """Of the tokenizer: "sentencepiece" (text must be UTF-8 in the end), "bytes" (nothing is decoded) or "integers"."""
    n_values: int = 0
    """With "integers": the number of values."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """What to do about which problem, where it is not the default."""

    def policy(self, problem: str) -> str:
        """What to do about it."""
        return self.policies.get(problem, POLICIES[problem][0])

    def replaces(self, problem: str) -> bool:
        """Whether what can be had of a document with this problem is kept."""
        return self.policy(problem) == "replace"


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
    """The document's bytes. Raises BadDocument for a problem that is not to be replaced, or that cannot be."""
    found: list[Found] = field(default_factory=list)
    """What was replaced, filled while the blocks are consumed."""
    offset: int = 0
    """Where the block that was read last begins in the document."""

    def met(self, problem: str) -> bool:
        """Whether a problem of this class was replaced."""
        return any(found.problem == problem for found in self.found)


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
    """The documents of a span, in order. A problem of a document is raised by its blocks, none is raised here.

    What ends a file of records early is the problem of its next record, or of the file where there was none before.
    """
    if file.kind == "text":
        part = Part(first=span.start == 0, last=span.stop == file.n_bytes)
        part.blocks = _text_blocks(part, file, span, reading)
        yield part
        return
    number = 0
    try:
        for number, part in enumerate(_record_parts(file, span, reading), 1):
            part.record = number - 1
            yield part
    except BadDocument as problem:
        yield Part(record=number or -1, blocks=_failing(problem))


def _record_parts(file: InputFile, span: Span, reading: Reading) -> Iterator[Part]:
    if file.kind == "jsonl":
        return _json_parts(file, span, reading)
    if file.kind == "fasta":
        return _fasta_parts(file, reading)
    return _parquet_parts(file, reading) if file.kind == "parquet" else _array_parts(file, reading)


def _failing(problem: BadDocument) -> Iterator[bytes]:
    """Blocks of a document of which there is nothing to keep."""
    return map(_raise, (problem,))


def _raise(problem: BadDocument) -> NoReturn:
    raise problem


def _settle(part: Part, reading: Reading) -> Settle:
    """What is to be done with a problem of a document of which something can be kept."""

    def settle(problem: BadDocument) -> None:
        if not reading.replaces(problem.problem):
            raise problem
        if not part.met(problem.problem):
            part.found.append(Found(problem.problem, problem.detail))

    return settle


def _text_blocks(part: Part, file: InputFile, span: Span, reading: Reading) -> Iterator[bytes]:
    settle = _settle(part, reading)
    ended_early = partial(part.met, "truncated")
    chunks = _until_truncated(read_content(file, span.start), settle)
    if reading.kind != "bytes":
        if reading.text.encoding != "utf-8":
            chunks = decode_chunks(chunks, reading.text.encoding, settle, ended_early)
        elif file.compression:
            chunks = drop_cut_character(chunks, ended_early)
    return _normal_blocks(part, chunks, reading, span.start, None if part.last else span.stop)


def _until_truncated(chunks: Iterator[bytes], settle: Settle) -> Iterator[bytes]:
    try:
        yield from chunks
    except BadDocument as problem:
        if problem.problem != "truncated":
            raise
        settle(problem)


def _normal_blocks(
    part: Part, chunks: Iterable[bytes], reading: Reading, start: int = 0, stop: int | None = None
) -> Iterator[bytes]:
    """The last steps that all text has in common."""
    if "bom" in reading.text.normalize:
        chunks = drop_byte_order_mark(chunks)
    if "newlines" in reading.text.normalize:
        chunks = unify_newlines(chunks)
    if "nfc" in reading.text.normalize:
        chunks = compose_characters(chunks)
    # Without replacement the tokenizer, which decodes the block anyway, is left to find what is not UTF-8.
    repair = reading.kind != "bytes" and reading.replaces("encoding")
    settle = _settle(part, reading)
    for part.offset, block in cut_blocks(chunks, start, stop):
        yield repair_utf8(block, part.offset, settle) if repair else block


def _json_parts(file: InputFile, span: Span, reading: Reading) -> Iterator[Part]:
    """A part for each line that begins in the span; blank ones do not count."""
    # A line begins at the span's first byte only if a newline precedes it.
    begin = max(span.start - 1, 0)
    chunks, encoding = read_content(file, begin), reading.text.encoding
    is_of_lines = "\n".encode(encoding) == b"\n"
    if not is_of_lines:  # such as UTF-16, in which lines cannot be told before it is decoded
        chunks = decode_marking(chunks, encoding)
    limit = reading.text.max_record_bytes
    for line in split_lines(chunks, begin, limit):
        if line.offset >= span.stop and span.stop < file.n_bytes:
            return
        if line.offset < span.start or (line.n_bytes <= limit and not line.content.strip()):
            continue
        part = Part()
        part.blocks = _json_blocks(part, line, encoding if is_of_lines else "utf-8", reading)
        yield part


def _json_blocks(part: Part, line: Line, encoding: str, reading: Reading) -> Iterator[bytes]:
    limit = reading.text.max_record_bytes
    if line.n_bytes > limit:
        raise _oversized(f"the line at byte {line.offset}", line.n_bytes, limit)
    settle = _settle(part, reading)
    text = json_text(line, encoding, reading.text, settle)
    yield from _normal_blocks(part, [encode_text(text, settle)], reading)


def _oversized(what: str, n_bytes: int, limit: int) -> BadDocument:
    return BadDocument("oversized", f"{what} has {n_bytes} bytes, more than --max-record-bytes {limit}")


def _fasta_parts(file: InputFile, reading: Reading) -> Iterator[Part]:
    """A part for each record."""
    for _, pieces in groupby(sequence_pieces(read_content(file)), key=itemgetter(0)):
        part = Part()
        chunks = _until_truncated(map(itemgetter(1), pieces), _settle(part, reading))
        part.blocks = _normal_blocks(part, chunks, reading)
        yield part


def _parquet_parts(file: InputFile, reading: Reading) -> Iterator[Part]:
    """A part for each row. One without a value is an empty document."""
    limit = reading.text.max_record_bytes
    with open_seekable(file) as stream:
        for value in parquet_values(stream, reading.text.field):
            part = Part()
            part.blocks = _normal_blocks(part, [value or b""], reading)
            if value is not None and len(value) > limit:
                part.blocks = _failing(_oversized("the value", len(value), limit))
            yield part


def check_field(files: Sequence[InputFile], reading: Reading) -> None:
    """Raises DataError for a `field` of arrays where no file is an archive, which alone has arrays by name."""
    if reading.kind == "integers" and _array_name(reading) and not any(map(is_archive, files)):
        raise DataError(
            f"--field {reading.text.field} names an array of .npz files, and none of the inputs is one: leave it out"
        )


def _array_name(reading: Reading) -> str | None:
    return None if reading.text.field == TextSettings().field else reading.text.field


def is_archive(file: InputFile) -> bool:
    """Whether it holds arrays by name."""
    return file.name.lower().endswith(".npz")


def _array_parts(file: InputFile, reading: Reading) -> Iterator[Part]:
    """A part for each item of each array, and one for an array that cannot be read."""
    with open_seekable(file) as stream:
        for array in open_arrays(stream, is_archive(file), _array_name(reading)):
            if isinstance(array, BadDocument):
                yield Part(blocks=_failing(array))
                continue
            for item in range(array.n_items):
                part = Part()
                values = array.read_item(item, reading.n_values)
                part.blocks = _until_truncated(values, _settle(part, reading))
                yield part
                if array.ended_early:
                    break
