"""Compressed files expanded in bounded memory, to the last byte that can be had of them.

The libraries' own file objects will not do: Python's ignores what follows an .xz stream, zstandard's takes a file that
ends early for a whole one, and both keep back bytes that came before an error.
"""

import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import zstandard

from data_pipeline.errors import BadDocument

FEED_BYTES = 1 << 10
"""Compressed bytes to expand at a time. zstd makes 128 KB of 4 bytes, so that these may come to 32 MB."""
_ZSTD_WINDOW_BYTES = 1 << 31
"""The most that zstd looks back (--long=31). A frame says how far it does, and takes no more memory than that."""

_DECODERS: dict[str, tuple[Callable[[], Any], bytes]] = {
    **dict.fromkeys((".gz", ".bgz"), (lambda: zlib.decompressobj(wbits=31), b"\0")),
    ".xz": (lzma.LZMADecompressor, b"\0"),
    ".zst": (lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj(), b""),
}
"""How to expand one member (gzip), stream (xz) or frame (zstd), and what may fill the space between two."""

_ZSTD_REFUSALS = ("too much memory", "not enough memory", "Dictionary mismatch", "Unsupported frame parameter")
"""What zstd says of a frame that may be whole, but that it cannot expand here."""

COMPRESSIONS = tuple(_DECODERS)


def expand(chunks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """The content of all members of a compressed file, given in chunks of at most FEED_BYTES.

    Raises BadDocument("truncated"), after the content that there is, when the file ends early, is corrupt, or is
    followed by something else; BadDocument("unreadable") when it may be whole, but zstd cannot expand it.
    """
    new_decoder, padding = _DECODERS[compression]
    decoder = None
    n_members = n_bytes = 0
    for chunk in chunks:
        data = chunk
        while data := data if decoder else data.lstrip(padding):
            decoder = decoder or new_decoder()
            try:
                content = decoder.decompress(data)
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
                if any(refusal in str(error) for refusal in _ZSTD_REFUSALS):
                    raise BadDocument("unreadable", f"cannot be expanded: {error}") from error
                raise BadDocument("truncated", f"corrupt after {n_bytes} bytes of content ({error})") from error
            n_bytes += len(content)
            if content:
                yield content
            data = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
                n_members += 1
    if decoder or not n_members:
        raise BadDocument("truncated", f"ends early, after {n_bytes} bytes of content")
