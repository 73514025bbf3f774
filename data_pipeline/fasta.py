"""Sequences out of FASTA files: genomes, transcripts, proteins.

A record is a line that begins with `>`, its header, and the lines after it, its sequence, end to end. The sequence is a
document; header, comments and ends of lines are not part of it.
"""

from collections.abc import Iterable, Iterator

from data_pipeline.blocks import drop_byte_order_mark
from data_pipeline.errors import BadDocument

_NOT_SEQUENCE = b"\n \t"


def sequence_pieces(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of the record from 0 on, bytes of its sequence) as they come; of each record at least one, perhaps empty.

    A line that begins with `;` is a comment, and left out. Raises BadDocument("unreadable") where something else stands
    before the first header.
    """
    record, in_line, at_line_start = -1, False, True  # in_line: of a header or a comment
    for chunk in drop_byte_order_mark(chunks):
        chunk, place = chunk.replace(b"\r", b"\n"), 0  # lines end in LF, CRLF or CR
        while place < len(chunk):
            if in_line:
                newline = chunk.find(b"\n", place)
                place, in_line, at_line_start = (
                    (newline + 1, False, True) if newline >= 0 else (len(chunk), True, False)
                )
            elif at_line_start and chunk[place] in b">;":
                in_line = True
                if chunk.startswith(b">", place):
                    record += 1
                    yield record, b""
            else:
                end = _end_of_sequence(chunk, place)
                piece = chunk[place:end].translate(None, _NOT_SEQUENCE)
                if piece and record < 0:
                    raise BadDocument(
                        "unreadable", f"is not FASTA: it begins with {piece[:20]!r}, expected '>' and a header"
                    )
                if piece:
                    yield record, piece
                place, at_line_start = end, chunk[end - 1 : end] == b"\n"


def _end_of_sequence(chunk: bytes, place: int) -> int:
    """Where the next header or comment begins, or the chunk ends."""
    header = chunk.find(b"\n>", place)
    end = header + 1 if header >= 0 else len(chunk)
    comment = chunk.find(b"\n;", place, end)
    return comment + 1 if comment >= 0 else end
