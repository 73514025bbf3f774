"""A SentencePiece model out of a sample of the corpus.

Its settings are those that keep text exactly, where SentencePiece's own defaults fold spaces, ligatures and widths.
The sample is what keeps memory bounded: SentencePiece holds all its input, many times over. What is sampled depends
on the seed and the corpus alone, so the same command makes the same model.

A sample of `max_bytes` is drawn in two steps, so that it takes as long from a terabyte as from a gigabyte:

1. What is read: all of a corpus of at most READ_FACTOR * max_bytes, as it is stored. Of a larger one that many bytes,
   in blocks of a megabyte that are drawn at random from all files. A file that cannot be read from the middle
   (compressed, Parquet, not UTF-8) is read from its beginning, as many megabytes as blocks of it were drawn.
2. What is kept: all that was read is cut into pieces of about PIECE_CHARS characters, small documents together. They
   are kept at random, until they come to `max_bytes`; no more than that is ever held.
"""

import functools
import hashlib
import json
import logging
import random
import re
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate, groupby
from math import inf
from pathlib import Path
from typing import Literal

import sentencepiece

from data_pipeline.blocks import BLOCK_BYTES, invalid_text
from data_pipeline.config import POLICIES, TextSettings, check_policies
from data_pipeline.documents import Part, Reading, Span, read_parts, splittable
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.files import InputFile, find_files
from data_pipeline.staging import check_writable, staged
from data_pipeline.tokenizer import PIECE_CHARS, cut_pieces

logger = logging.getLogger(__name__)

READ_FACTOR = 8
"""How many times the size of the sample is read for it. More makes it more varied: 32 MB come from 244 places."""
SENTENCE_CHARS = 1024
"""Lines are cut here: SentencePiece silently skips those over 4,192 bytes, and a character has up to 4."""
N_BYTES, N_SPECIAL = 256, 6
"""Pieces that every model has: bytes; unknown, BOS, EOS, two ways to end a line, the space."""
COVERAGE = 0.9995
"""SentencePiece's own default."""
SIGN_OF_LIFE_S = 60.0
"""From one line that the training goes on to the next."""
THREADS = 8
"""Fixed, not the machine's: SentencePiece writes it into the model, and sums in an order that depends on it."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of `python -m data_pipeline tokenizer`. Raises DataError when one of them makes no sense."""

    inputs: tuple[str, ...]
    """Files, folders, globs, URLs, and lists of these (`@FILE`): see `files.py`."""
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
    text: TextSettings = field(default_factory=TextSettings)
    """How documents are found in files."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """What to do about which problem, where it is not the default: see `config.POLICIES`."""

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise DataError(f"--vocab-size is {self.vocab_size}: expected thousands of pieces, such as 16000")
        if self.max_bytes < 1:
            raise DataError(f"--max-bytes is {self.max_bytes}: expected at least 1")
        check_policies(self.policies)

    @property
    def reading(self) -> Reading:
        """How documents are read."""
        return Reading(self.text, "sentencepiece", policies=self.policies)


def train_tokenizer(settings: TrainingSettings) -> bool:
    """Trains and writes the model. False when it is there already, made by the same settings of the same sample.

    Raises DataError for bad input or settings, or when the output is there but was made otherwise.
    """
    notes: list[str] = []
    files = find_files(settings.inputs, {}, arrays=False, notes=notes)
    for note in notes:
        logger.warning("note: %s", note)
    if not settings.output.exists():
        check_writable(settings.output.parent, f"--output {settings.output}")
    sample = draw_sample(files, settings.reading, settings.max_bytes, settings.seed)
    record = _record(settings, files, sample)
    if settings.output.exists():
        _check_same(settings.output, record)
        return False
    record_path(settings.output).unlink(missing_ok=True)  # of a model that is gone, or never came
    characters: Counter[str] = Counter()
    for sentence in sentences_of(sample):
        characters.update(sentence)
    if settings.model_type == "unigram" and is_slow(characters):
        logger.warning(
            "note: %s different characters and hardly a space between them, as in a genome: unigram may take a minute "
            "for a megabyte of that, --model-type bpe a second",
            len(characters),
        )
    rare = rare_characters(characters, settings.vocab_size)
    with staged(settings.output) as partial:
        with partial.open("wb") as model:
            sentences = without(rare, sentences_of(sample))
            _in_a_thread(functools.partial(_train, sentences, model, settings.vocab_size, settings.model_type))
        with staged(record_path(settings.output)) as partial_record:
            partial_record.write_text(json.dumps(record, indent=2) + "\n")
    return True


def draw_sample(files: Sequence[InputFile], reading: Reading, max_bytes: int, seed: int) -> list[bytes]:
    """Pieces of text in UTF-8: all of the corpus, or a little more than `max_bytes` of it (see above).

    Raises DataError for a document that cannot be read as it is, by its policy, or when there is no text at all.
    """
    met: Counter[tuple[str, str]] = Counter()
    used: set[str] = set()
    texts = _read_texts(files, reading, READ_FACTOR * max_bytes, seed, met, used)
    sample = keep_at_random(join_small(texts), max_bytes, random.Random(seed))
    for (problem, action), n in sorted(met.items()):
        times = "once" if n == 1 else f"{n:,} times"
        logger.warning("note: %s: %s %s in what was read for the sample", problem, action, times)
    if not sample:
        raise DataError("the inputs hold no text: there is nothing to train a tokenizer on")
    n_bytes = sum(map(len, sample))
    logger.info(
        "sample to train on: %s bytes out of %s of %s files", f"{n_bytes:,}", f"{len(used):,}", f"{len(files):,}"
    )
    return sample


def draw_spans(
    files: Sequence[InputFile], text: TextSettings, max_bytes: int, seed: int
) -> Iterator[tuple[Span, float]]:
    """(span, characters to read of it at most) of about `max_bytes` of the files, in order: all, or blocks at random.

    A block of a file that can be read from the middle is a span of its own. Any other file is one span; a block of it
    stands for BLOCK_BYTES characters, and all its blocks for all that is in it.
    """
    ends = list(accumulate(-(-file.n_bytes // BLOCK_BYTES) for file in files))
    n_bytes = sum(file.n_bytes for file in files)
    n_drawn = ends[-1] if n_bytes <= max_bytes else max(ends[-1] * max_bytes // n_bytes, 1)
    drawn = sorted(random.Random(seed).sample(range(ends[-1]), n_drawn))
    for number, blocks in groupby(drawn, key=lambda block: bisect_right(ends, block)):
        file, first = files[number], ends[number - 1] if number else 0
        if splittable(file, text):
            for start in ((block - first) * BLOCK_BYTES for block in blocks):
                yield Span(number, start, min(start + BLOCK_BYTES, file.n_bytes)), inf
        else:
            n_blocks = len(list(blocks))
            yield Span(number, 0, file.n_bytes), inf if n_blocks == ends[number] - first else n_blocks * BLOCK_BYTES


def _read_texts(
    files: Sequence[InputFile],
    reading: Reading,
    max_bytes: int,
    seed: int,
    met: Counter[tuple[str, str]],
    used: set[str],
) -> Iterator[str]:
    """The text of the spans that are drawn, in blocks. Counts in `met` the problems, with what was done, and adds to
    `used` the names of the files that had any.
    """
    for span, n_chars in draw_spans(files, reading.text, max_bytes, seed):
        file = files[span.file]
        for text in (
            text for part in read_parts(file, span, reading) for text in _part_texts(part, file, reading, met)
        ):
            used.add(file.name)
            yield text
            n_chars -= len(text)
            if n_chars <= 0:
                break


def _part_texts(part: Part, file: InputFile, reading: Reading, met: Counter[tuple[str, str]]) -> Iterator[str]:
    """The blocks of a part, decoded, as far as they can be. Raises DataError where a problem's policy is strict."""
    try:
        for block in part.blocks:
            yield block.decode()
    except UnicodeDecodeError as error:
        bad = invalid_text(error, part.offset)
    except BadDocument as problem:
        bad = problem
    else:
        met.update((found.problem, "replaced") for found in part.found)
        return
    policy = reading.policy(bad.problem)
    if policy == "strict":
        others = " or ".join(f"--on-bad {bad.problem}={other}" for other in POLICIES[bad.problem] if other != "strict")
        name = file.name if part.record < 0 else f"a record of {file.name}"
        raise DataError(f"{name} {bad.detail} ({file.location}): mend it, leave it out, or use {others}")
    met[bad.problem, "left out"] += 1  # with the policy "replace" where it left nothing to keep


def join_small(texts: Iterable[str]) -> Iterator[bytes]:
    """Texts in UTF-8, in pieces of at most PIECE_CHARS characters: cut, or several together with newlines between."""
    held: list[str] = []
    n_chars = 0
    for piece in (piece for text in texts for piece in cut_pieces(text)):
        if n_chars + len(piece) > PIECE_CHARS and held:
            yield "\n".join(held).encode()
            held, n_chars = [], 0
        held.append(piece)
        n_chars += len(piece) + 1
    if any(held):
        yield "\n".join(held).encode()


def keep_at_random(pieces: Iterable[bytes], max_bytes: int, rng: random.Random) -> list[bytes]:
    """As many pieces, in their order, as just make `max_bytes`, or all; each has the same chance. Holds no more."""
    heap: list[tuple[float, int, bytes]] = []  # the piece to give up next is the first
    held_bytes = 0
    for place, piece in enumerate(pieces):
        heappush(heap, (rng.random(), place, piece))
        held_bytes += len(piece)
        while held_bytes - len(heap[0][2]) >= max_bytes:
            held_bytes -= len(heappop(heap)[2])
    return [piece for _, _, piece in sorted(heap, key=lambda item: item[1])]


def sentences_of(sample: Iterable[bytes]) -> Iterator[str]:
    """The lines of a sample, long ones in parts."""
    for piece in sample:
        for line in piece.decode().split("\n"):
            yield from (line[i : i + SENTENCE_CHARS] for i in range(0, len(line), SENTENCE_CHARS))


def is_slow(characters: Counter[str]) -> bool:
    """Whether unigram, which begins with all that occurs more than once, finds very much of that: in a megabyte or more
    of few different characters without spaces, it took ten times as long as in English."""
    n_spaces = characters[" "] + characters["\t"]
    return characters.total() >= 1_000_000 and len(characters) <= 64 and n_spaces < characters.total() / 100


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


def _in_a_thread(action: Callable[[], None]) -> None:
    """Have something done that is one long call into C++, and raise what it raises. Ctrl-C ends the wait at once."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    begun, thread = time.monotonic(), threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SIGN_OF_LIFE_S)
        if thread.is_alive():
            logger.info("still training, after %.0f s", time.monotonic() - begun)
    for error in failures:
        raise error


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
            f"SentencePiece cannot train {vocab_size} pieces on this sample: {_reason(error)}. {_way_out(error)}"
        ) from error


def _way_out(error: Exception) -> str:
    """SentencePiece says how many pieces it needs at least (`10 vs 262`), or can make at most (`value <= 900`)."""
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return f"Raise --vocab-size to at least {least[1]}"
    if most := re.search(r"value <= (\d+)", str(error)):
        return f"Lower --vocab-size to at most {most[1]}, or give more text"
    return "Change --vocab-size, or give more text"


def _reason(error: Exception) -> str:
    """SentencePiece's own words, without source lines and options of its own: `INTERNAL: x.cc(1) [condition] Words.`"""
    words = str(error).rpartition("] ")[2].partition(" Increase vocab_size")[0]
    return words.strip().rstrip(".") or str(error)


def _record(settings: TrainingSettings, files: Sequence[InputFile], sample: Sequence[bytes]) -> dict[str, object]:
    """All that decides the model, which is the sample and the settings; and what shows why a sample is another.

    Content that was not sampled is not compared: it made no difference to the model.
    """
    names = ("vocab_size", "model_type", "max_bytes", "seed")
    names_and_sizes = json.dumps([[file.name, file.n_bytes] for file in files])
    return {
        **{name: value for name, value in vars(settings).items() if name in names},
        "text": settings.text.model_dump(mode="json"),
        "n_files": len(files),
        "n_bytes": sum(file.n_bytes for file in files),
        "files_sha256": hashlib.sha256(names_and_sizes.encode()).hexdigest(),
        "sample_sha256": hashlib.sha256(b"\0".join(sample)).hexdigest(),
    }


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
