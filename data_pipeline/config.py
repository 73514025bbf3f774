"""What a build is asked to do, checked before any work starts.

These are the values of the command line. What of them decides the bytes of the store is recorded in its manifest
(`manifest.StoreSettings`); paths, policies and the number of workers are not: the store may not depend on the last,
and what the policies did is recorded document by document (`problems.jsonl`).
"""

import codecs
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from data_pipeline.errors import DataError
from data_pipeline.output import as_path

PACKINGS = ("bestfit", "stream", "book")
DUPLICATES = ("keep", "drop", "near")
NORMALIZATIONS = ("bom", "newlines", "nfc")
MAX_SEQ_LEN = 2**26
"""Rows of 67 million tokens: a sanity bound, far above what any model here can train on."""
_SHARD_TOKENS = 1 << 24
"""What a shard holds by default: 32 MB of uint16 tokens, before compression."""
_MAX_ROWS_PER_SHARD = 256

POLICIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "encoding": ("strict", "replace", "skip"),
        "empty": ("replace", "strict", "skip"),
        "truncated": ("strict", "replace", "skip"),
        "unreadable": ("strict", "skip"),
        "oversized": ("strict", "skip"),
    }
)
"""What can be wrong with a document -> what can be done about it, the default first.

    encoding    bytes that are not valid in --encoding; an integer outside the vocabulary, which nothing can replace
    empty       no bytes at all
    truncated   a compressed file or an array that ends early or is corrupt
    unreadable  no permission, an I/O error, or not the format that its name says
    oversized   a record that is larger than --max-record-bytes

strict: the build stops. skip: the document is left out. replace: what can be had of it is kept (U+FFFD for invalid
bytes, the part of a truncated file that can be read, a document of no text), and what leaves nothing to keep is left
out. The latter two are counted and listed.
"""


class TextSettings(BaseModel):
    """How documents are found in files: decides their bytes, and so is part of a store's manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoding: str = "utf-8"
    """Codec of text files, by Python's name for it."""
    normalize: tuple[str, ...] = ()
    """Of "bom" (a leading byte order mark is dropped), "newlines" (CRLF and CR become LF) and "nfc" (letters with
    accents and Hangul syllables become one character each, as the Unicode data of this Python has it)."""
    field: str = "text"
    """Field of JSON lines, column of Parquet files, that holds the text; the one array of .npz files, unless "text"."""
    max_record_bytes: int = 64 << 20
    """A JSON line or Parquet value must be held in memory; a larger one is "oversized"."""


def text_settings(encoding: str, normalize: tuple[str, ...], field: str, max_record_bytes: int) -> TextSettings:
    """The settings in canonical form. Raises DataError when one of them makes no sense."""
    encoding = _text_encoding(encoding)
    for name in normalize:
        if name not in NORMALIZATIONS:
            raise DataError(f"--normalize names {name!r}: expected {', '.join(NORMALIZATIONS)}")
    if not field:
        raise DataError("--field is empty: expected the name of the field or column that holds the text")
    if max_record_bytes < 1:
        raise DataError(f"--max-record-bytes is {max_record_bytes}: expected at least 1")
    return TextSettings(
        encoding=encoding,
        normalize=tuple(sorted(set(normalize))),
        field=field,
        max_record_bytes=max_record_bytes,
    )


def _text_encoding(name: str) -> str:
    """The canonical name of an encoding. It must be one that decodes text as its bytes come, and past invalid ones."""
    text = "a\nb"
    expected = "expected a text encoding of Python's, such as latin-1"
    try:
        name = codecs.lookup(name).name
        encoded = text.encode(name)
        decoded = "".join(codecs.iterdecode((bytes([byte]) for byte in encoded), name, "replace"))
    except (LookupError, TypeError):  # no such codec, or one from bytes to bytes
        raise DataError(f"--encoding is {name!r}: {expected}") from None
    except UnicodeError:  # undefined, idna
        decoded = ""
    if decoded != text:  # punycode
        raise DataError(f"--encoding is {name!r}, which does not decode a file piece by piece: {expected}")
    return name


@dataclass(frozen=True)
class BuildSettings:
    """Settings of `python -m data_pipeline build`. Raises DataError when one of them makes no sense."""

    inputs: tuple[str, ...]
    """Files, folders, globs, URLs, and lists of these (`@FILE`): see `files.py`. None for a store to evaluate on, which
    `val_inputs` or `test_inputs` make."""
    tokenizer: str
    """Path of a SentencePiece model, "bytes", or "integers"."""
    output: Path
    """The store to make."""
    vocab_size: int | None = None
    """With the tokenizer "integers": the number of different values."""
    seq_len: int = 65_536
    """Tokens in a row."""
    packing: str = "bestfit"
    """How documents become rows: see `packing.py`."""
    stride: int | None = None
    """With the packing "book": from one window of a document to the next; `seq_len` when not given."""
    bos: bool = True
    """Whether a document begins with BOS."""
    eos: bool = True
    """Whether a document ends with EOS. Padding is EOS in any case."""
    split: Mapping[str, float] = field(default_factory=dict)
    """Name of each held-out split -> its share of the documents; the rest is "train"."""
    val_inputs: tuple[str, ...] = ()
    """Inputs whose documents form the split "val"."""
    test_inputs: tuple[str, ...] = ()
    """Those that form the split "test"."""
    text: TextSettings = field(default_factory=TextSettings)
    """How documents are found in files."""
    policies: Mapping[str, str] = field(default_factory=dict)
    """What to do about which problem, where it is not the default: see `POLICIES`."""
    duplicates: str = "keep"
    """keep: exact duplicates are counted. drop: one copy is kept, one of `test_inputs` or else of `val_inputs` if there
    is any. near: near-duplicates are treated like duplicates."""
    near_threshold: float = 0.8
    """With duplicates "near": the Jaccard similarity of word 5-grams from which on documents are near-duplicates."""
    append: bool = False
    """Whether the documents are added to a store that exists."""
    rows_per_shard: int | None = None
    """Rows in one shard file; as many as make 16M tokens, at most 256, when not given."""
    workers: int = 1
    """Processes to use, on each rank. The store does not depend on it."""

    def __post_init__(self) -> None:
        for name in ("inputs", "val_inputs", "test_inputs"):  # a call in Python may give one, and a Path
            given = getattr(self, name)
            paths = (given,) if isinstance(given, str | os.PathLike) else given
            object.__setattr__(self, name, tuple(map(os.fspath, paths)))
        for name in ("vocab_size", "seq_len", "stride", "rows_per_shard", "workers"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), getattr(type(self), name) is None))
        for name, example in (("split", {"val": 0.3}), ("policies", {"encoding": "skip"})):
            if not isinstance(getattr(self, name), Mapping):
                raise DataError(f"{name} is {getattr(self, name)!r}: expected a dict such as {example}")
        object.__setattr__(self, "text", text_settings(**self.text.model_dump()))
        object.__setattr__(self, "output", as_path(self.output))
        object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))
        if not (self.inputs or self.held_out):
            raise DataError(
                "no files are named: give --input, or --val-input or --test-input for a store of these alone"
            )
        if self.split and not (self.inputs or self.append):
            raise DataError("--split holds out a share of the documents of --input, and there is none: leave it out")
        if not 2 <= self.seq_len <= MAX_SEQ_LEN:
            raise DataError(f"--seq-len is {self.seq_len}: expected 2 to {MAX_SEQ_LEN} tokens")
        if self.packing not in PACKINGS:
            raise DataError(f"--packing is {self.packing!r}: expected one of {', '.join(PACKINGS)}")
        if self.stride is not None and self.packing != "book":
            raise DataError(f"--stride is for --packing book, not {self.packing}: windows do not overlap there")
        if self.stride is not None and not 1 <= self.stride <= self.seq_len:
            raise DataError(f"--stride is {self.stride}: expected 1 to --seq-len {self.seq_len} tokens")
        if self.duplicates not in DUPLICATES:
            raise DataError(f"--duplicates is {self.duplicates!r}: expected one of {', '.join(DUPLICATES)}")
        if not 0.5 <= self.near_threshold <= 1:
            raise DataError(f"--near-threshold is {self.near_threshold}: expected 0.5 to 1")
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise DataError(f"--rows-per-shard is {self.rows_per_shard}: expected at least 1")
        if self.workers < 1:
            raise DataError(f"--workers is {self.workers}: expected at least 1")
        if self.tokenizer in ("bytes", "integers") and (self.text.encoding != "utf-8" or self.text.normalize):
            raise DataError(
                f"--tokenizer {self.tokenizer} takes {self.tokenizer} as they are: leave out --encoding and "
                "--normalize, or use a SentencePiece model"
            )
        check_policies(self.policies)
        if self.tokenizer == "integers":
            self._check_integers()
        _check_split(self.split)
        for name in self.held_out:
            if name in self.split:
                raise DataError(f"the split {name} is given twice: drop either --{name}-input or {name}= in --split")

    def _check_integers(self) -> None:
        if self.duplicates == "near":
            raise DataError("--duplicates near compares words, which integers are not: use drop")
        if self.policies.get("encoding") == "replace":
            raise DataError(
                "--on-bad encoding=replace cannot replace an integer outside the vocabulary: use "
                "encoding=skip, or a larger --vocab-size"
            )

    @property
    def held_out(self) -> dict[str, tuple[str, ...]]:
        """The inputs that form a split of their own, by its name."""
        return {name: inputs for name, inputs in (("val", self.val_inputs), ("test", self.test_inputs)) if inputs}

    @property
    def shard_rows(self) -> int:
        """Rows in one shard file."""
        return self.rows_per_shard or max(1, min(_MAX_ROWS_PER_SHARD, _SHARD_TOKENS // self.seq_len))


def _whole(name: str, value: object, may_be_none: bool) -> int | None:
    """A field as a plain integer, which one of NumPy's becomes. Raises DataError where it is none."""
    if value is None and may_be_none:
        return None
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise DataError(f"{name} is {value!r}: expected an integer{' or None' if may_be_none else ''}")


def check_policies(policies: Mapping[str, str]) -> None:
    """Raises DataError for a problem that does not exist or a policy that it cannot have."""
    for problem, policy in policies.items():
        if problem not in POLICIES:
            raise DataError(f"--on-bad names {problem!r}: expected one of {', '.join(POLICIES)}")
        if policy not in POLICIES[problem]:
            raise DataError(f"--on-bad {problem}={policy}: expected {' or '.join(POLICIES[problem])}")


def _check_split(split: Mapping[str, float]) -> None:
    for name, fraction in split.items():
        if name == "train":
            raise DataError("--split names train, which is whatever the other splits leave: drop it")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise DataError(f"--split names {name!r}: expected a lower-case word such as val")
        if not 0 < fraction < 1:
            raise DataError(f"--split gives {name} the fraction {fraction:g}: expected above 0 and below 1")
    if sum(split.values()) >= 1:
        raise DataError(f"--split holds out {sum(split.values()):g} of the documents: leave some for train")


def parse_split(text: str) -> dict[str, float]:
    """`"val=0.01,test=0.01"` -> `{"val": 0.01, "test": 0.01}`. Raises DataError for anything else."""
    split: dict[str, float] = {}
    for name, fraction in _parse_pairs(text, "--split", "NAME=FRACTION, such as val=0.01,test=0.01").items():
        try:
            split[name] = float(fraction)
        except ValueError:
            raise DataError(
                f"--split holds '{name}={fraction}': expected NAME=FRACTION, such as val=0.01,test=0.01"
            ) from None
    return split


def parse_policies(text: str) -> dict[str, str]:
    """`"encoding=replace,empty=skip"` -> a dictionary. Raises DataError for anything else."""
    policies = _parse_pairs(text, "--on-bad", "PROBLEM=POLICY, such as encoding=replace,truncated=skip")
    check_policies(policies)
    return policies


def _parse_pairs(text: str, option: str, expected: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.strip().partition("=")
        if not equals:
            raise DataError(f"{option} holds {item!r}: expected {expected}")
        if name in pairs:
            raise DataError(f"{option} names {name} twice")
        pairs[name] = value
    return pairs


def available_cpus() -> int:
    """The cores that this process may use, which under SLURM are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
