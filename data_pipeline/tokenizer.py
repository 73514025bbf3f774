"""Bytes to token ids and back, exactly.

Decoding never asks SentencePiece: a table with the bytes of every id is the whole decoder, and the same table says
how many bytes of text a token stands for (bits per byte needs that). The promise is that decode(encode(x)) == x for
any text, which ordinary SentencePiece settings break (see `training.py`); a model that does so is refused.

The cut of a text into pieces is part of what a tokenizer is: SentencePiece is 2-4x slower on a whole book than on
pieces of it, and near a cut the ids may differ.

Corpora that are numbers already (images, music) need no model: their values are the ids (`IntegerTokenizer`).
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import sentencepiece

from data_pipeline.errors import DataError
from data_pipeline.output import as_path

PIECE_CHARS = 1 << 16
"""Characters that SentencePiece is given at once. Part of every store's manifest."""

N_ENDS = 2
"""BOS and EOS, which a vocabulary of integers has beside its values."""

MAX_VALUES = 2**24
"""Different values that integers may have: a table of as many entries is part of the store."""

TokenizerKind = Literal["sentencepiece", "bytes", "integers"]

# What common normalisers change: runs of spaces, a leading space, ligatures, combining marks, wide spaces, CRLF.
_CHANGES = "  a\t b\r\n\n\0 \ufb01 e\u0301 \u00a0\u3000\u2581 \u200b\ufeff \U0001f642\uac00 "
_PROBE = (_CHANGES + "".join(map(chr, (*range(0xD800), *range(0xE000, 0x10000))))).encode()  # and each character
_EXPECTED = 'Expected a SentencePiece model (python -m data_pipeline tokenizer makes one), "bytes" or "integers"'
_SPACE = "\u2581"  # SentencePiece writes a space this way inside pieces


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer. Ids are `token_dtype(vocab_size)`."""

    kind: TokenizerKind
    vocab_size: int
    bos_id: int
    eos_id: int
    sha256: str
    """Tells tokenizers apart: the hash of the model file."""
    is_byte_fallback: np.ndarray
    """bool [vocab_size]: ids that spell a character byte by byte because no piece holds it."""

    @property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: bytes of a document that each id stands for; 0 for BOS and EOS."""
        ...

    def encode(self, data: bytes) -> np.ndarray:
        """The ids [n] of a stretch of a document, without BOS or EOS."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of ids [n]. BOS and EOS are nothing."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where it holds every id and one number more (the store's mark for "nothing here"), else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65_535 else np.uint32)


def value_dtype(n_values: int) -> np.dtype:
    """How a document of integers is written as bytes: the smallest little-endian type that holds n_values - 1."""
    return np.dtype("u1" if n_values <= 1 << 8 else "<u2" if n_values <= 1 << 16 else "<u4")


@functools.cache  # worker processes ask for every task
def load_tokenizer(name: str, n_values: int | None = None) -> Tokenizer:
    """The tokenizer "bytes", "integers" of `n_values` values, or the SentencePiece model in a file.

    Raises DataError when the model is of no use, or `n_values` is not given with "integers" and only then.
    """
    if name == "integers":
        return IntegerTokenizer(_checked(n_values))
    if n_values is not None:
        raise DataError(
            f"--vocab-size {n_values} is for --tokenizer integers, and --tokenizer {name} has a vocabulary of its "
            "own: leave it out"
        )
    return ByteTokenizer() if name == "bytes" else SentencePieceTokenizer(as_path(name))


def _checked(n_values: int | None) -> int:
    if n_values is None:
        raise DataError(
            "--tokenizer integers needs --vocab-size, the number of different values: 256 where they are 0 to 255"
        )
    if not 1 <= n_values <= MAX_VALUES:
        raise DataError(f"--vocab-size is {n_values}: expected 1 to {MAX_VALUES} different values")
    return n_values


class ByteTokenizer:
    """Ids 0-255 are bytes, 256 is BOS, 257 is EOS. Takes any bytes, text or not."""

    kind: TokenizerKind = "bytes"
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    token_bytes = np.array([1] * 256 + [0, 0], np.uint16)
    is_byte_fallback = np.zeros(vocab_size, bool)

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        return ids[ids < 256].astype(np.uint8).tobytes()


class IntegerTokenizer:
    """Ids 0 to n_values - 1 are the values of an array of integers, n_values is BOS, n_values + 1 is EOS.

    The bytes of a document are its values one after another, as `value_dtype(n_values)`.
    """

    kind: TokenizerKind = "integers"

    def __init__(self, n_values: int) -> None:
        self.bos_id, self.eos_id = n_values, n_values + 1
        self.vocab_size = n_values + N_ENDS
        self.sha256 = hashlib.sha256(f"integers:{n_values}".encode()).hexdigest()
        self.is_byte_fallback = np.broadcast_to(np.False_, self.vocab_size)  # takes no memory for any vocabulary
        self._value_dtype = value_dtype(n_values)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        sizes = np.full(self.vocab_size, self._value_dtype.itemsize, np.uint16)
        sizes[[self.bos_id, self.eos_id]] = 0
        return sizes

    def encode(self, data: bytes | np.ndarray) -> np.ndarray:
        """The ids [n] of the bytes of a document, or of an array of values of any integer type, or bool, flattened.

        Raises DataError for a value outside the vocabulary, which would read as BOS or EOS, and for what is no whole
        number of values.
        """
        if isinstance(data, np.ndarray):
            values = data.ravel()
            if values.dtype.kind not in "iub":
                raise DataError(f"an array of {values.dtype} holds no integers: convert it")
        elif len(data) % self._value_dtype.itemsize:
            raise DataError(f"{len(data)} bytes are no values of {self._value_dtype.itemsize} bytes each")
        else:
            values = np.frombuffer(data, self._value_dtype)
        for value in (values.min(), values.max()) if values.size else ():
            if not 0 <= value < self.bos_id:
                raise DataError(
                    f"the value {value} is outside the vocabulary of --vocab-size {self.bos_id}: expected 0 to "
                    f"{self.bos_id - 1}"
                )
        return values.astype(token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        return ids[ids < self.bos_id].astype(self._value_dtype).tobytes()


class SentencePieceTokenizer:
    """A SentencePiece model, proven lossless on a probe when it is loaded.

    Raises DataError when the file is missing, is no model, lacks BOS, EOS or byte pieces, or loses text.
    """

    kind: TokenizerKind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = _read_model(path)
        """The file as it was when it was read."""
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._processor = _parse_model(self.model, path)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"tokenizer {path} has no BOS or no EOS token: train one with the tokenizer command")
        self._pieces = [self._bytes_of(token) for token in range(self.vocab_size)]
        self.token_bytes = np.array([len(piece) for piece in self._pieces], np.uint16)
        self.is_byte_fallback = np.array([self._processor.is_byte(i) for i in range(self.vocab_size)])
        if self.is_byte_fallback.sum() < 256 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise self._loses_text()

    def encode(self, data: bytes) -> np.ndarray:
        """The ids of UTF-8 text. Raises UnicodeDecodeError for other bytes."""
        pieces = [self._encode_piece(piece) for piece in cut_pieces(data.decode())]
        tokens = np.concatenate(pieces, dtype=token_dtype(self.vocab_size), casting="unsafe")
        if self.token_bytes.take(tokens).sum(dtype=np.int64) != len(data):
            raise self._loses_text()
        return tokens

    def decode(self, ids: np.ndarray) -> bytes:
        return b"".join(map(self._pieces.__getitem__, ids.tolist()))

    def _encode_piece(self, piece: str) -> np.ndarray:
        """int32 ids. SentencePiece reads U+2581 as a space, so that character goes around it, as its three bytes."""
        first, *others = piece.split(_SPACE)
        ids = [self._encode_raw(first)]
        for part in others:
            ids += self._space_ids, self._encode_raw(part)
        return np.concatenate(ids) if others else ids[0]

    def _encode_raw(self, text: str) -> np.ndarray:
        """SentencePiece's own ids, as an array: lists of Python's integers would cost 10% of the time."""
        ids: np.ndarray = self._processor.encode(text, return_type="numpy")
        return ids

    def _loses_text(self) -> DataError:
        return DataError(
            f"tokenizer {self.path} does not keep text exactly (it normalises it, or lacks byte fallback): train one "
            "with the tokenizer command"
        )

    @functools.cached_property
    def _space_ids(self) -> np.ndarray:
        return np.array([self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()], np.int32)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # <0xE2>
        return piece.replace(_SPACE, " ").encode()


def cut_pieces(text: str) -> Iterator[str]:
    """Cuts text into pieces of at most PIECE_CHARS characters, after newlines where there are any."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        newline = text.rfind("\n", start, start + PIECE_CHARS)
        stop = newline + 1 if newline >= 0 else start + PIECE_CHARS
        yield text[start:stop]
        start = stop
    yield text[start:]


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        of_folder = path / "tokenizer.model"  # of a store, a run or an exported model
        way_out = f"Give {of_folder}" if of_folder.is_file() else _EXPECTED
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}. {way_out}") from error


def _parse_model(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        if not model:
            raise ValueError("an empty file")  # which SentencePiece takes for a model of no pieces
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # SentencePiece raises whatever its parser met
        raise DataError(f"tokenizer {path} is not a SentencePiece model. {_EXPECTED}") from error
