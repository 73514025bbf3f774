"""Writing files and reading documents out of them, and the definition of blocks that they are held against."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from data_pipeline.config import TextSettings
from data_pipeline.documents import Found, Part, Reading, Span, read_parts
from data_pipeline.errors import BadDocument
from data_pipeline.files import InputFile, find_files

Outcome = bytes | tuple[str, str]
"""A document's bytes, or the problem for which there are none and its detail."""


def only(path: object, arrays: bool = False) -> InputFile:
    return find_files([str(path)], {}, arrays)[0]


def write(path: Path, content: bytes | str = "some text\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def save(path: Path, content: bytes) -> InputFile:
    return only(write(path, content))


def reading(kind: str = "sentencepiece", policies: Mapping[str, str] | None = None, **text: object) -> Reading:
    return Reading(TextSettings.model_validate(text), kind, policies=policies or {})


def whole(file: InputFile) -> Span:
    return Span(0, 0, file.n_bytes)


def outcome(part: Part) -> Outcome:
    try:
        return b"".join(part.blocks)
    except BadDocument as problem:
        return problem.problem, problem.detail


def read(file: InputFile, how: Reading | None = None) -> list[tuple[int, Outcome, list[Found]]]:
    """(record, outcome, what was replaced) of every document of a file."""
    return [(part.record, outcome(part), part.found) for part in read_parts(file, whole(file), how or reading())]


def read_one(file: InputFile, how: Reading | None = None) -> tuple[Outcome, list[Found]]:
    ((record, result, found),) = read(file, how)
    assert record == -1
    return result, found


def problems(file: InputFile, how: Reading | None = None) -> list[tuple[int, str, str]]:
    return [(record, *result) for record, result, _ in read(file, how) if not isinstance(result, bytes)]


@contextmanager
def blocks_of(n_bytes: int, reach: int = 8) -> Iterator[None]:
    """Small blocks, so that small documents have many."""
    with ExitStack() as stack:
        for module in ("blocks", "documents", "arrays"):
            stack.enter_context(patch(f"data_pipeline.{module}.BLOCK_BYTES", n_bytes))
        stack.enter_context(patch("data_pipeline.blocks.BOUNDARY_REACH_BYTES", reach))
        yield


def expected_blocks(data: bytes, n_bytes: int, reach: int) -> list[bytes]:
    """The definition, with the whole document at hand."""
    cuts = [0]
    for nominal in range(n_bytes, len(data), n_bytes):
        stretch = data[nominal : nominal + reach]
        cut = nominal
        if b"\n" in stretch:
            cut += stretch.index(b"\n") + 1
        else:
            while cut < len(data) and cut < nominal + 4 and data[cut] & 0xC0 == 0x80:
                cut += 1
            if cut == nominal + 4:
                cut = nominal
        cuts.append(cut)
    return [data[one:other] for one, other in pairwise([*cuts, len(data)]) if other > one]
