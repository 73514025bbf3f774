"""The tokens and facts of a build's documents, between the stage that makes them and the stage that scatters them.

A task of the first stage goes over consecutive stretches of input files. It writes their tokens to one file, and what
there is to know about them, column by column, to its record. The tokens of all tasks end to end are those of all
documents end to end, BOS and EOS included, as far as they could be read.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data_pipeline.blocks import invalid_text
from data_pipeline.config import POLICIES
from data_pipeline.documents import Part, Reading, Span, is_archive, read_parts, splittable
from data_pipeline.duplicates import N_PERMUTATIONS, Signature
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.files import InputFile, hash_file
from data_pipeline.jobs import record_name
from data_pipeline.staging import publishing
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, token_dtype

RECORD_SUFFIX = ".npz"
PROBLEMS = tuple(POLICIES)
"""Problems by number, in columns: 1 is the first."""
_OPEN_FILES = 64


class TokenizeTask(NamedTuple):
    """What one call of `tokenize` does."""

    number: int
    folder: Path
    """Of the tokens and records of all tasks."""
    tokenizer: str
    n_values: int | None
    """With "integers": see Reading."""
    spans: list[Span]
    files: list[InputFile]
    """The file of each span."""
    reading: Reading
    bos: bool
    eos: bool
    near: bool
    """Whether documents get a MinHash signature."""


class Columns(NamedTuple):
    """What the tokenized parts of documents came to: arrays of one length, in the order of the corpus."""

    file: np.ndarray
    """int64: which input file."""
    first: np.ndarray
    """bool: whether its document begins here."""
    record: np.ndarray
    """int64: -1 where the file is the document."""
    n_bytes: np.ndarray
    n_tokens: np.ndarray
    """int64: what was written to the file of tokens, whatever became of it."""
    n_byte_fallback: np.ndarray
    bad: np.ndarray
    """int8: the number of the problem for which the document is left out; 0: none."""
    replaced: np.ndarray
    """int8: the number of the problem of which the document was mended; 0: none."""
    sha256: np.ndarray
    """uint8 [n, 32]: of the whole document, in its first part."""
    minhash: np.ndarray
    """uint32 [n, N_PERMUTATIONS], or [n, 0]."""


class _Row(NamedTuple):
    """One entry of each column."""

    file: int
    first: bool
    record: int
    n_bytes: int
    n_tokens: int
    n_byte_fallback: int
    bad: int
    replaced: int
    sha256: bytes
    minhash: np.ndarray | None


class TaskRecord(NamedTuple):
    """What a task left behind besides tokens."""

    columns: Columns
    problems: list[tuple[int, str, str, str]]
    """(part, problem, policy, detail)"""
    input_file: np.ndarray
    """int64 [m]: the files whose first byte is in the task."""
    input_sha256: np.ndarray
    """uint8 [m, 32]: their hashes, zeros if unreadable."""


def tokens_path(folder: Path, task: int) -> Path:
    """The tokens of the task with this number."""
    return folder / f"{record_name(task)}.tokens"


def tokenize(task: TokenizeTask) -> None:
    """Does a task and publishes its record. Raises DataError for a document that the policies do not let pass."""
    tokenizer = load_tokenizer(task.tokenizer, task.n_values)
    rows: list[_Row] = []
    problems: list[tuple[int, str, str, str]] = []
    inputs: list[tuple[int, bytes]] = []
    with publishing(tokens_path(task.folder, task.number)) as output:
        for span, file in zip(task.spans, task.files, strict=True):
            before = len(rows)
            for part in read_parts(file, span, task.reading):
                writer = _PartWriter(task, tokenizer, output, file, span, part)
                for problem, policy, detail in writer.write():
                    problems.append((len(rows), problem, policy, detail))
                rows.append(writer.row)
            if span.start == 0:
                inputs.append((span.file, _input_hash(file, task.reading, span, rows[before:])))
    with publishing(task.folder / (record_name(task.number) + RECORD_SUFFIX)) as record:
        np.savez(
            record,
            **{f"column.{name}": column for name, column in _stack(rows, task.near)._asdict().items()},
            problems=np.frombuffer(json.dumps(problems).encode(), np.uint8),
            input_file=np.array([number for number, _ in inputs], np.int64),
            input_sha256=np.frombuffer(b"".join(digest for _, digest in inputs), np.uint8).reshape(-1, 32),
        )


class _PartWriter:
    """Tokens of one part of a document into the file of a task, and the row of columns that it came to."""

    def __init__(
        self, task: TokenizeTask, tokenizer: Tokenizer, output: BinaryIO, file: InputFile, span: Span, part: Part
    ) -> None:
        self.task, self.tokenizer, self.output, self.file, self.span, self.part = (
            task, tokenizer, output, file, span, part,
        )  # fmt: skip
        self.n_bytes = self.n_tokens = self.n_byte_fallback = 0
        self.bad = self.replaced = 0
        self.digest = hashlib.sha256()
        self.sha256 = b"\0" * 32
        self.signature = Signature() if task.near else None

    def write(self) -> list[tuple[str, str, str]]:
        """Writes the part. Returns (problem, policy, detail) of each problem that it had."""
        special = self.tokenizer
        if self.part.first and self.task.bos:
            self._put(np.array([special.bos_id]))
        found, lost = self._body()
        if self.part.last and self.task.eos:
            self._put(np.array([special.eos_id]))
        if self.part.first and self.part.last:
            self.sha256 = self.digest.digest()
            lost = lost or self.n_tokens == 0  # an empty one, without BOS and EOS
        elif self.part.first:
            self.sha256, seen, lost_later = _hash_document(self.file, self.span.file, self.task.reading)
            found, lost = [*found, *seen], lost or lost_later
        return [(problem, self._apply(problem, detail, lost), detail) for problem, detail in found]

    @property
    def row(self) -> _Row:
        return _Row(
            file=self.span.file,
            first=self.part.first,
            record=self.part.record,
            n_bytes=self.n_bytes,
            n_tokens=self.n_tokens,
            n_byte_fallback=self.n_byte_fallback,
            bad=self.bad,
            replaced=self.replaced,
            sha256=self.sha256,
            minhash=self.signature.value(self.part.first and self.part.last) if self.signature else None,
        )

    def _body(self) -> tuple[list[tuple[str, str]], bool]:
        """What was wrong: (problem, detail) of each; and whether nothing can be kept because of it."""
        try:
            for block in self.part.blocks:
                self._encode(block)
        except BadDocument as bad:
            return [*self.part.found, (bad.problem, bad.detail)], True
        if self.part.first and self.part.last and self.n_bytes == 0 and not self.part.found:
            return [("empty", "holds no text")], False
        return list(self.part.found), False

    def _encode(self, block: bytes) -> None:
        try:
            tokens = self.tokenizer.encode(block)
        except UnicodeDecodeError as error:
            raise invalid_text(error, self.part.offset) from None
        self._put(tokens)
        self.n_byte_fallback += int(np.count_nonzero(self.tokenizer.is_byte_fallback[tokens]))
        self.n_bytes += len(block)
        self.digest.update(block)
        if self.signature:
            self.signature.update(block)

    def _put(self, tokens: np.ndarray) -> None:
        self.output.write(tokens.astype(token_dtype(self.tokenizer.vocab_size), copy=False).tobytes())
        self.n_tokens += len(tokens)

    def _apply(self, problem: str, detail: str, lost: bool) -> str:
        """The policy for a problem, applied. Raises DataError when it is to stop the build."""
        policy = self.task.reading.policy(problem)
        if policy == "strict":
            raise DataError(
                f"{self.file.location}{self._where(problem)} {detail}: {_ways_out(problem, self.task.reading.kind)}. "
                "What is done so far is kept"
            )
        number = PROBLEMS.index(problem) + 1
        if policy == "skip" or lost:
            self.bad = self.bad or number
        else:
            self.replaced = self.replaced or number
        return policy

    def _where(self, problem: str) -> str:
        """Which document of its file it is, to be read after the file's name."""
        record = self.part.record
        if record < 0:
            return ""
        if self.file.kind == "array":  # the detail says more of an archive, and of an array that cannot be read
            return "" if is_archive(self.file) or problem == "unreadable" else f", item {record},"
        return f", record {record} from byte {self.span.start} on,"


def _ways_out(problem: str, kind: str) -> str:
    """What can be done about a problem that is to stop the build, given the kind of tokenizer."""
    if problem == "encoding" and kind == "integers":
        change, others = "give a larger --vocab-size (add a constant where values are negative), ", "encoding=skip"
    else:
        change = "name its --encoding, " if problem == "encoding" and kind == "sentencepiece" else ""
        change = "raise --max-record-bytes, " if problem == "oversized" else change
        others = " or ".join(f"{problem}={other}" for other in POLICIES[problem] if other != "strict")
    return f"mend it, leave it out, {change}or build with --on-bad {others}; skip leaves the whole document out"


def _input_hash(file: InputFile, reading: Reading, span: Span, rows: list[_Row]) -> bytes:
    """The sha256 of a file as it is stored: that of its document, where this is the same."""
    if len(rows) == 1 and file.kind == "text" and splittable(file, reading.text) and span.stop == file.n_bytes:
        row = rows[0]
        if not row.bad and not row.replaced:
            return row.sha256
    try:
        return bytes.fromhex(hash_file(file))
    except DataError:
        if all(row.bad for row in rows):  # it could not be read, and that was let pass
            return b"\0" * 32
        raise


def _hash_document(file: InputFile, number: int, reading: Reading) -> tuple[bytes, list[tuple[str, str]], bool]:
    """The sha256 of a document that several tasks tokenize, as all of them read it; and what `_body` returns of it.

    What is wrong further on must be known here: the hash depends on what is done about it.
    """
    digest = hashlib.sha256()
    found: list[tuple[str, str]] = []
    for part in read_parts(file, Span(number, 0, file.n_bytes), reading):
        try:
            for block in part.blocks:
                if reading.kind == "sentencepiece":
                    block.decode()
                digest.update(block)
        except UnicodeDecodeError as error:
            bad = invalid_text(error, part.offset)
            return digest.digest(), [*part.found, (bad.problem, bad.detail)], True
        except BadDocument as bad:
            return digest.digest(), [*part.found, (bad.problem, bad.detail)], True
        found += part.found
    return digest.digest(), found, False


def _stack(rows: Sequence[_Row], near: bool) -> Columns:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype)

    signatures = [row.minhash for row in rows] if near else []
    return Columns(
        file=column("file", np.int64),
        first=column("first", bool),
        record=column("record", np.int64),
        n_bytes=column("n_bytes", np.int64),
        n_tokens=column("n_tokens", np.int64),
        n_byte_fallback=column("n_byte_fallback", np.int64),
        bad=column("bad", np.int8),
        replaced=column("replaced", np.int8),
        sha256=np.frombuffer(b"".join(row.sha256 for row in rows), np.uint8).reshape(-1, 32),
        minhash=np.array(signatures, np.uint32).reshape(len(rows), N_PERMUTATIONS if near else 0),
    )


def read_record(path: Path) -> TaskRecord:
    """The record that a task left at `path`."""
    with np.load(path, allow_pickle=False) as arrays:
        columns = Columns(*(arrays[f"column.{name}"] for name in Columns._fields))
        problems = [tuple(problem) for problem in json.loads(arrays["problems"].tobytes())]
        return TaskRecord(columns, problems, arrays["input_file"], arrays["input_sha256"])


class ScratchTokens:
    """The tokens of all tasks, as one sequence. To be closed; holds a few files open."""

    def __init__(self, folder: Path, offsets: np.ndarray, dtype: np.dtype) -> None:
        """`offsets` int64 [n_tasks + 1]: where each task's tokens begin in the whole."""
        self._folder, self._offsets, self._dtype = folder, offsets, dtype
        self._files: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> "ScratchTokens":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read_into(self, row: np.ndarray, start: int) -> None:
        """Fills `row` [n] with the tokens from place `start` on."""
        for task, skip, part in self._stretches(row, start):
            wanted = part.view(np.uint8)
            if os.preadv(self._descriptor(task), [wanted.data], skip * self._dtype.itemsize) != len(wanted):
                raise DataError(
                    f"{tokens_path(self._folder, task)} is shorter than its record says: remove {self._folder.parent} "
                    "and build again"
                )

    def _stretches(self, row: np.ndarray, start: int) -> Iterator[tuple[int, int, np.ndarray]]:
        filled = 0
        task = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while filled < len(row):
            skip = start + filled - int(self._offsets[task])
            count = min(len(row) - filled, int(self._offsets[task + 1]) - start - filled)
            if count > 0:
                yield task, skip, row[filled : filled + count]
                filled += count
            task += 1

    def _descriptor(self, task: int) -> int:
        if task in self._files:
            self._files.move_to_end(task)
        else:
            if len(self._files) == _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[task] = os.open(tokens_path(self._folder, task), os.O_RDONLY)
        return self._files[task]


def concatenate(columns: Iterable[Columns]) -> Columns:
    """Columns of consecutive tasks as one."""
    return Columns(*map(np.concatenate, zip(*columns, strict=True)))
