"""Token files between the two halves of a build.

Tokenizing goes over documents in order, packing scatters them over rows; between the two lie these files. Each task
of the first half writes one, and all of them end to end are all documents end to end, BOS and EOS included. The
second half reads any stretch of that one long sequence of tokens. Removed before the store is published.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.sources import Document, Span, read_blocks
from data_pipeline.tokenizer import Tokenizer, load_tokenizer, token_dtype

_INDEX_NAME = "index.npy"


class TokenizeTask(NamedTuple):
    """What one call of `tokenize` does."""

    tokenizer: str
    spans: list[Span]
    documents: list[Document]
    """The document of each span."""
    block_bytes: int
    output: Path


class SpanTokens(NamedTuple):
    """What a span came to."""

    document: int
    n_tokens: int
    n_byte_fallback: int


def tokenize(task: TokenizeTask) -> list[SpanTokens]:
    """Writes the tokens of a task's spans to its file, a block at a time. Returns one result per span."""
    tokenizer = load_tokenizer(task.tokenizer)
    results = []
    with task.output.open("wb") as file:
        for span, document in zip(task.spans, task.documents, strict=True):
            n_tokens = n_byte_fallback = 0
            for tokens in _span_tokens(tokenizer, span, document, task.block_bytes):
                file.write(tokens.tobytes())
                n_tokens += len(tokens)
                n_byte_fallback += int(tokenizer.is_byte_fallback[tokens].sum())
            results.append(SpanTokens(span.document, n_tokens, n_byte_fallback))
    return results


def _span_tokens(tokenizer: Tokenizer, span: Span, document: Document, block_bytes: int) -> Iterator[np.ndarray]:
    dtype = token_dtype(tokenizer.vocab_size)
    if span.start == 0:
        yield np.array([tokenizer.bos_id], dtype)
    for block in read_blocks(document, span.start, span.stop, block_bytes):
        yield tokenizer.encode(block)
    if span.stop == document.n_bytes:
        yield np.array([tokenizer.eos_id], dtype)


class ScratchTokens:
    """All scratch files of a directory, as one sequence of tokens."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self._directory = directory
        self._dtype = dtype
        self._offsets = np.load(directory / _INDEX_NAME)

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [length] from place `start` on."""
        parts = []
        while length:
            task = int(np.searchsorted(self._offsets, start, side="right")) - 1
            skip = start - int(self._offsets[task])
            count = min(length, int(self._offsets[task + 1]) - start)
            path = scratch_path(self._directory, task)
            parts.append(np.fromfile(path, self._dtype, count, offset=skip * self._dtype.itemsize))
            start, length = start + count, length - count
        return np.concatenate(parts)


def scratch_path(directory: Path, task: int) -> Path:
    """The file of the task with this number."""
    return directory / f"{task:08d}.tokens"


def write_index(directory: Path, tokens_per_task: Sequence[int]) -> None:
    """Records where each task's file begins in the whole, for `ScratchTokens`."""
    np.save(directory / _INDEX_NAME, np.concatenate(([0], np.cumsum(tokens_per_task))))
