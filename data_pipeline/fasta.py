"""Sequences out of FASTA files: genomes, transcripts, proteins.

A record is a line that begins with `>`, its header, and the lines after it, its sequence, end to end. The sequence is a
document; header and ends of lines are not part of it.
"""

from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator

from data_pipeline.errors import BadDocument

_NOT_SEQUENCE = b"\n \t"


def sequence_pieces(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of the record from 0 on, bytes of its sequence) as they come; of each record at least one, perhaps empty.

    Raises BadDocument("unreadable") where something stands before the first header, or a line is a comment (`;`).
    """
    record, in_header, at_line_start = -1, False, True
    for number, chunk in enumerate(chunks):
        chunk = chunk.removeprefix(BOM_UTF8) if number == 0 else chunk
        chunk, place = chunk.replace(b"\r", b"\n"), 0  # lines end in LF, CRLF or CR
        while place < len(chunk):
            if in_header:
                newline = chunk.find(b"\n", place)
                place, in_header, at_line_start = (
                    (newline + 1, False, True) if newline >= 0 else (len(chunk), True, False)
                )
            elif at_line_start and chunk.startswith(b">", place):
                record, in_header = record + 1, True
                yield record, b""
            else:
                header = chunk.find(b"\n>", place)
                end = header + 1 if header >= 0 else len(chunk)
                if chunk.find(b"\n;", place, end) >= 0 or (at_line_start and chunk.startswith(b";", place)):
                    raise BadDocument("unreadable", "has a comment, a line that begins with ';': remove such lines")
                piece = chunk[place:end].translate(None, _NOT_SEQUENCE)
                if piece and record < 0:
                    raise BadDocument(
                        "unreadable", f"is not FASTA: it begins with {piece[:20]!r}, expected '>' and a header"
                    )
                if piece:
                    yield record, piece
                place, at_line_start = end, chunk[end - 1 : end] == b"\n"
