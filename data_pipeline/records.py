"""Records out of files that hold many documents: JSON lines and Parquet."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.blocks import Settle, invalid_text
from data_pipeline.config import TextSettings
from data_pipeline.errors import BadDocument, DataError

_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_MOST_LISTED = 20
"""Columns of a file that are named."""


class Line(NamedTuple):
    """A line of a file, without its newline."""

    offset: int
    n_bytes: int
    content: bytes
    """Only its beginning, where `n_bytes` is above the limit."""


def split_lines(chunks: Iterable[bytes], offset: int, limit: int) -> Iterator[Line]:
    """The lines of a file from byte `offset` on. Of one above `limit` bytes no more than that is ever held."""
    content = bytearray()
    n_bytes = 0
    for chunk in chunks:
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            content += end[: limit - len(content)]
            n_bytes += len(end)
            yield Line(offset, n_bytes, bytes(content))
            offset += n_bytes + 1
            content.clear()
            n_bytes = 0
        content += rest[: limit - len(content)]
        n_bytes += len(rest)
    if n_bytes:
        yield Line(offset, n_bytes, bytes(content))


def json_text(line: Line, encoding: str, given: TextSettings, settle: Settle) -> str:
    """The text in a field of a JSON line. Raises BadDocument("unreadable") where there is none.

    encoding: that of the line: UTF-8, marked by `decode_marking`, if lines cannot be told in that of the file.
    """
    field = given.field
    try:
        content = line.content.decode(encoding)
    except UnicodeDecodeError as error:
        is_marked = encoding != given.encoding  # where it was in the file is not known any more
        marked = BadDocument("encoding", f"is not valid {given.encoding}")
        settle(marked if is_marked else invalid_text(error, line.offset))
        content = line.content.decode(encoding, errors="replace")
    if line.offset == 0:
        content = content.removeprefix("\ufeff")
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable(line, f"is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise _unreadable(line, f"is not a JSON object but {_name(record)}")
    try:
        value = _value(record, field)
    except KeyError:
        message = f"has no field {field!r} but {_listing(record)}: name one with --field"
        raise _unreadable(line, f"{message} (outer.inner for one in an object)") from None
    if not isinstance(value, str):
        raise _unreadable(line, f"has in field {field!r} no string but {_name(value)}")
    return value


def _value(record: Any, field: str) -> Any:
    """That of a field; of a.b, where there is none of this name, that of b in the object a. Raises KeyError."""
    if not isinstance(record, dict):
        raise KeyError(field)
    outer, dot, inner = field.partition(".")
    return _value(record[outer], inner) if dot and field not in record else record[field]


def _unreadable(line: Line, what: str) -> BadDocument:
    return BadDocument("unreadable", f"the line at byte {line.offset} {what}")


def _name(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _listing(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:_MOST_LISTED] + ["..."] * (len(quoted) > _MOST_LISTED)) or "none"


def parquet_values(stream: BinaryIO, column: str) -> Iterator[bytes | None]:
    """The values of a column of strings or bytes, row by row. In memory are a page of the file and a batch of values.

    Raises BadDocument("unreadable") for what is not a Parquet file or has no such column, and ("truncated") for one
    whose end is missing; DataError where pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install 'longhand[corpus]'") from error
    try:
        file = _open_parquet(stream, column, pyarrow)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_batch_rows(file, group, column), row_groups=[group], columns=[column]):
                values = batch.column(0)
                if pyarrow.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                for value in values.cast(pyarrow.large_binary()):
                    yield value.as_py()
    except MemoryError:  # says nothing of the file
        raise
    except (pyarrow.ArrowException, OSError) as error:  # OSError: pages that are corrupt
        raise BadDocument("unreadable", f"is not a Parquet file, or is damaged ({error})") from error


def _open_parquet(stream: BinaryIO, column: str, pyarrow: Any) -> Any:
    head = stream.read(4)
    stream.seek(0)
    try:
        # A row group may be of any size: its pages are read as they are needed.
        file = pyarrow.parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
    except pyarrow.ArrowException as error:
        problem = "truncated" if head == b"PAR1" else "unreadable"
        raise BadDocument(problem, f"is not a whole Parquet file ({error})") from error
    schema = file.schema_arrow
    if schema.names.count(column) != 1:
        raise BadDocument("unreadable", f"has no column {column!r} but {_listing(schema.names)}: name one with --field")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    text = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if str(kind) not in text:
        raise BadDocument("unreadable", f"has in column {column!r} no text but values of type {kind}")
    return file


def _batch_rows(file: Any, number: int, column: str) -> int:
    """Rows of a row group whose values come to about _BATCH_BYTES, by their average."""
    group = file.metadata.row_group(number)
    chunks = (group.column(place) for place in range(group.num_columns))
    n_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
    return max(1, min(_MAX_BATCH_ROWS, group.num_rows * _BATCH_BYTES // max(n_bytes, 1)))
