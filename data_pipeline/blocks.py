"""From the bytes of a document, in chunks as they come, to UTF-8 in blocks that depend on the document alone.

Every step is a generator over chunks, so that memory is bounded whatever the size of a document, and no step may
depend on where the chunks that it is given are cut. A step that meets something wrong calls `settle` with the problem,
which raises it, or returns where the problem is to be replaced.
"""

import codecs
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from data_pipeline.errors import BadDocument

BLOCK_BYTES = 1 << 20
"""Blocks begin near multiples of this. Larger ones gain nothing in speed, and cost memory."""
BOUNDARY_REACH_BYTES = 1 << 16
"""How far past the multiple a newline is looked for before a block may begin inside a line."""

Settle = Callable[[BadDocument], None]

_MARK, _MARKING = "\udfff", "longhand.marking"
"""What no decoder gives, half of a surrogate pair, and the name of the way to give it for what is not valid."""
codecs.register_error(_MARKING, lambda error: (_MARK, error.end))  # type: ignore[attr-defined]  # it is of decoding
_NOT_ASCII = bytes(range(0x80, 0x100))
_CHARACTER_BEGUN = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")


def cut_blocks(chunks: Iterable[bytes], start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of the blocks of a document that begin at byte `start` or later, before `stop` (None: its end).

    `chunks` are the document's bytes from `start` on. `start` and `stop` are multiples of BLOCK_BYTES. Blocks end
    inside a character only where the text is not UTF-8 anyway; none is empty.
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


def decode_chunks(
    chunks: Iterable[bytes], encoding: str, settle: Settle, ended_early: Callable[[], bool]
) -> Iterator[bytes]:
    """Text of another encoding, as UTF-8. What is not valid, once settled, becomes U+FFFD.

    Of a file that `ended_early` half a character at the end is left out. Raises BadDocument("encoding") where nothing
    can take the place of what is not valid, as in UTF-16 without the mark that says in which order its bytes come.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    try:
        for chunk in chunks:
            yield encode_text(_decode(decoder, chunk, position, settle), settle)
            position += len(chunk)
        if not ended_early():
            yield encode_text(_decode(decoder, b"", position, settle), settle)
    except UnicodeError as error:
        raise _lost(error, encoding) from error


def decode_marking(chunks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """The same without anything to settle: a byte that UTF-8 never has stands for what is not valid.

    Raises BadDocument("encoding") where `decode_chunks` does.
    """
    decoder = codecs.getincrementaldecoder(encoding)(_MARKING)
    try:
        for chunk in itertools.chain(chunks, [b""]):
            text = decoder.decode(chunk, final=not chunk)
            yield text.encode("utf-8", "surrogatepass").replace(_MARK.encode("utf-8", "surrogatepass"), b"\xff")
    except UnicodeError as error:
        raise _lost(error, encoding) from error


def _lost(error: UnicodeError, encoding: str) -> BadDocument:
    """Of an error that has no place, so that a decoder cannot go on after it either."""
    way_out = f": without one it is {encoding}-le or {encoding}-be" if encoding in ("utf-16", "utf-32") else ""
    return BadDocument("encoding", f"is not valid {encoding} ({error}{way_out})")


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, position: int, settle: Settle) -> str:
    state = decoder.getstate()
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        settle(invalid_text(error, position - len(state[0])))  # state[0]: bytes of a character begun before
        decoder.setstate(state)
        decoder.errors = "replace"
        return decoder.decode(chunk, final=not chunk)


def invalid_text(error: UnicodeDecodeError, offset: int) -> BadDocument:
    """What an error in bytes that begin at byte `offset` of a document says about the document."""
    return BadDocument("encoding", f"is not valid {error.encoding} at byte {offset + error.start} ({error.reason})")


def encode_text(text: str, settle: Settle) -> bytes:
    """Text as UTF-8. Halves of a surrogate pair, which are no characters, once settled become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        settle(BadDocument("encoding", f"holds {lone!a}, half of a surrogate pair, at character {error.start}"))
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def repair_utf8(block: bytes, offset: int, settle: Settle) -> bytes:
    """A block that begins at byte `offset`, valid UTF-8 or, what is not, as U+FFFD once settled."""
    try:
        block.decode()
    except UnicodeDecodeError as error:
        settle(invalid_text(error, offset))
        return block.decode(errors="replace").encode()
    return block


def drop_cut_character(chunks: Iterable[bytes], ended_early: Callable[[], bool]) -> Iterator[bytes]:
    """UTF-8 as it is, but of a file that `ended_early` half a character at the end is left out."""
    held = b""
    for chunk in chunks:
        whole = held + chunk
        begun = _CHARACTER_BEGUN.search(whole, max(len(whole) - 3, 0))
        held = begun[0] if begun else b""
        yield whole[: len(whole) - len(held)]
    if not ended_early():
        yield held


def drop_byte_order_mark(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """UTF-8 without the byte order mark that it may begin with."""
    source = iter(chunks)
    head = b""
    while len(head) < len(codecs.BOM_UTF8) and (chunk := next(source, None)) is not None:
        head += chunk
    yield head.removeprefix(codecs.BOM_UTF8)
    yield from source


def unify_newlines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """CRLF and CR as LF."""
    held = b""  # a CR whose LF may come with the next chunk
    for chunk in chunks:
        whole = held + chunk
        held = whole[-1:] if whole.endswith(b"\r") else b""
        yield whole[: len(whole) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    yield held.replace(b"\r", b"\n")


def compose_characters(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """UTF-8 in normalization form C (Unicode Standard Annex #15): a letter and its accents, or the parts of a Hangul
    syllable, as one character where there is one. Bytes that are not UTF-8 stay.

    Text is held from its last ASCII character on, which composes with what may follow, but with nothing before it.
    """
    held: list[bytes] = []
    for chunk in chunks:
        end = len(chunk.rstrip(_NOT_ASCII)) - 1
        if end < 0:
            held.append(chunk)
            continue
        yield _composed(b"".join([*held, chunk[:end]]))
        held = [chunk[end:]]
    yield _composed(b"".join(held))


def _composed(text: bytes) -> bytes:
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.decode(errors="surrogateescape")).encode(errors="surrogateescape")
