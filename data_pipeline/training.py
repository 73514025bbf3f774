"""A SentencePiece model out of a sample of the corpus.

Its settings are those that keep text exactly, where SentencePiece's own defaults fold spaces, ligatures and widths.
The sample is what keeps memory bounded: SentencePiece holds all its input, many times over. Which blocks of which
documents are sampled depends on the seed and the corpus alone, so the same command makes the same model.
"""

import hashlib
import json
import logging
import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import sentencepiece

from data_pipeline.errors import DataError
from data_pipeline.parallel import worker_map
from data_pipeline.sources import Document, find_documents, read_blocks, scan_documents
from data_pipeline.staging import staged

logger = logging.getLogger(__name__)

SAMPLE_BLOCK_BYTES = 1 << 16
"""The sample is drawn in blocks of this size: small enough for all parts of a corpus to be in it."""
SENTENCE_CHARS = 1024
"""Lines are cut here: SentencePiece silently skips those over 4,192 bytes, and a character has up to 4."""
N_BYTES, N_SPECIAL = 256, 6
"""Pieces that every model has: bytes; unknown, BOS, EOS, two ways to end a line, the space."""
COVERAGE = 0.9995
"""SentencePiece's own default."""
THREADS = 8
"""Fixed, not the machine's: SentencePiece writes it into the model, and sums in an order that depends on it."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of `python -m data_pipeline tokenizer`. Raises DataError when one of them makes no sense."""

    inputs: tuple[Path, ...]
    """Text files, or folders that are searched for `.txt` files."""
    output: Path
    """The model file to make; what it was made from is written beside it, as `FILE.json`."""
    vocab_size: int = 16_000
    """Pieces, with the 256 bytes, the newline, BOS, EOS and the unknown piece among them."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """Measured on English novels (16,000 pieces, pieces of 64K characters): unigram encodes 23M characters/s, BPE
    4.7M, at the same 4.0 bytes per token. Unigram trains slower (12 s against 2 s for 12 MB), once."""
    max_bytes: int = 32_000_000
    """Size of the sample. 64 MB take 1.4 GB of memory to train on, 32 MB stay below 1 GB."""
    seed: int = 0
    """Draws the sample."""
    workers: int = 1
    """Processes that check the input. The model does not depend on it."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise DataError(f"--vocab-size is {self.vocab_size}: expected thousands of pieces, such as 16000")
        if self.max_bytes < 1:
            raise DataError(f"--max-bytes is {self.max_bytes}: expected at least 1")
        if self.workers < 1:
            raise DataError(f"--workers is {self.workers}: expected at least 1")


def train_tokenizer(settings: TrainingSettings) -> bool:
    """Trains and writes the model. False when it is there already, made by the same settings from the same input.

    Raises DataError for bad input or settings, or when the output is there but was made otherwise.
    """
    documents = find_documents(settings.inputs)
    with worker_map(settings.workers) as run:
        digests = scan_documents(documents, utf8=True, run=run)
    record = _record(settings, documents, digests)
    if settings.output.exists():
        _check_same(settings.output, record)
        return False
    record_path(settings.output).unlink(missing_ok=True)  # of a model that is gone, or never came
    sample_bytes = min(settings.max_bytes, sum(document.n_bytes for document in documents))
    logger.info("training on %s bytes of %s documents", f"{sample_bytes:,}", f"{len(documents):,}")
    characters: Counter[str] = Counter()
    for sentence in sample_sentences(documents, settings.max_bytes, settings.seed):
        characters.update(sentence)
    rare = rare_characters(characters, settings.vocab_size)
    sentences = without(rare, sample_sentences(documents, settings.max_bytes, settings.seed))
    with staged(settings.output) as partial:
        with partial.open("wb") as model:
            _train(sentences, model, settings.vocab_size, settings.model_type)
        with staged(record_path(settings.output)) as partial_record:
            partial_record.write_text(json.dumps(record, indent=2) + "\n")
    return True


def sample_sentences(documents: Sequence[Document], max_bytes: int, seed: int) -> Iterator[str]:
    """The lines of about `max_bytes` of the corpus: of all of it when it is smaller, else of blocks drawn at random."""
    ends = list(accumulate(-(-document.n_bytes // SAMPLE_BLOCK_BYTES) for document in documents))
    n_sample = min(max(max_bytes // SAMPLE_BLOCK_BYTES, 1), ends[-1])
    for block in sorted(random.Random(seed).sample(range(ends[-1]), n_sample)):
        index = bisect_right(ends, block)
        document = documents[index]
        start = (block - (ends[index - 1] if index else 0)) * SAMPLE_BLOCK_BYTES
        stop = min(start + SAMPLE_BLOCK_BYTES, document.n_bytes)
        for data in read_blocks(document, start, stop, SAMPLE_BLOCK_BYTES):
            for line in data.decode().split("\n"):
                yield from (line[i : i + SENTENCE_CHARS] for i in range(0, len(line), SENTENCE_CHARS))


def rare_characters(characters: Counter[str], vocab_size: int) -> str:
    """The characters that must be no pieces of their own, since the vocabulary cannot hold all that are frequent.

    None where those that SentencePiece requires, 99.95% of the text, fit beside the bytes and special pieces.
    Otherwise (thousands of Chinese characters, a small vocabulary) all but what takes half of that room.
    """
    room = max(2, vocab_size - N_BYTES - N_SPECIAL)
    ranked = characters.most_common()
    covered = sum(count for _, count in ranked[:room])
    kept = len(ranked) if covered >= COVERAGE * characters.total() else room // 2
    return "".join(character for character, _ in ranked[kept:])


def without(rare: str, sentences: Iterator[str]) -> Iterator[str]:
    """Sentences cut at rare characters, which a tokenizer then spells in bytes."""
    if not rare:
        yield from sentences
        return
    cut = re.compile(f"[{re.escape(rare)}]+")
    for sentence in sentences:
        yield from filter(None, cut.split(sentence))


def record_path(model: Path) -> Path:
    """Where it is written what a model was made from."""
    return model.with_name(model.name + ".json")


def _train(sentences: Iterator[str], model: object, vocab_size: int, model_type: str) -> None:
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # Every byte of text comes back: nothing is normalised, and what no piece holds is spelled in bytes.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            # A line's end is one token, whichever way it is written: novels with CRLF are 4.7% shorter.
            user_defined_symbols=["\n", "\r\n"],
            # Runs of spaces as pieces: indented code takes 3.8 bytes per token instead of 2.2, novels stay the same.
            allow_whitespace_only_pieces=True,
            # The space, in SentencePiece's spelling: a sample without one would lose that of other texts.
            required_chars="\u2581",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece cannot train {vocab_size} pieces on this sample: {_reason(error)}. Change --vocab-size, or "
            "give more text"
        ) from error


def _reason(error: Exception) -> str:
    """SentencePiece's own words, without source lines and options of its own: `INTERNAL: x.cc(1) [condition] Words.`"""
    words = str(error).rpartition("] ")[2].partition(" Increase vocab_size")[0]
    return words.strip().rstrip(".") or str(error)


def _record(settings: TrainingSettings, documents: Sequence[Document], digests: Sequence[str]) -> dict[str, object]:
    """All that decides the model."""
    corpus = [[d.name, d.n_bytes, digest] for d, digest in zip(documents, digests, strict=True)]
    decisive = {k: v for k, v in asdict(settings).items() if k in ("vocab_size", "model_type", "max_bytes", "seed")}
    return {**decisive, "input_sha256": hashlib.sha256(json.dumps(corpus).encode()).hexdigest()}


def _check_same(output: Path, record: dict[str, object]) -> None:
    way_out = "write to another --output, or delete it"
    try:
        old = dict(json.loads(record_path(output).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{output} exists, and {record_path(output)} does not say how it was made: {way_out}"
        ) from error
    changes = [f"{key} {old.get(key)} -> {value}" for key, value in record.items() if old.get(key) != value]
    if changes:
        raise DataError(f"{output} exists and was made otherwise ({'; '.join(changes)}): {way_out}")
