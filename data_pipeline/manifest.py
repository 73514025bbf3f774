"""What a store has to contain: the settings that made it and the size and hash of every file in it.

Zarr reads a missing shard as fill values, without an error, so a store cannot be trusted without such a list. The
manifest guards itself too: the file must be, to the byte, what its own content serialises to, checksum included.
A store that was added to has a manifest of its own for each part; the first names the others by their hashes, and
`merge` makes one of all.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.config import TextSettings
from data_pipeline.errors import DataError
from data_pipeline.output import counted, listed
from data_pipeline.tokenizer import TokenizerKind

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
STORE_FILES = ("zarr.json", MANIFEST_NAME)
"""What the folder of a store has in it, perhaps of the one that is built."""
UNREADABLE = "0" * 64
"""Recorded as the sha256 of an input file that could not be read, where it was allowed to leave such files out."""
_MOST_NAMED = 3
"""Documents that are named where some differ."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    """What a file of the store must be."""

    n_bytes: int
    sha256: str


class SplitRecord(_Frozen):
    """What a split holds."""

    rows: tuple[tuple[int, int], ...]
    """Ranges [start, stop) of rows."""
    documents: int
    n_bytes: int
    tokens: int
    """Of the documents, with the BOS and EOS that they have, without padding."""
    placed_tokens: int
    """Tokens in rows, without padding: more than `tokens` where windows overlap."""
    mixed_rows: int
    """Rows with more than one document in them."""
    byte_fallback_tokens: int
    """Of `tokens`, those that are one byte of a character without a piece of its own."""


class DocumentRecord(NamedTuple):
    """A line of `documents.jsonl`."""

    id: int
    name: str
    n_bytes: int
    sha256: str
    split: str
    tokens: int


class InputRecord(NamedTuple):
    """A line of `inputs.jsonl`: a file that was read."""

    name: str
    n_bytes: int
    """As stored, so perhaps compressed."""
    sha256: str
    """Of these bytes, or `UNREADABLE`."""


class ProblemRecord(NamedTuple):
    """A line of `problems.jsonl`: what was wrong with a document, and what became of it."""

    document: str
    problem: str
    """A class of `config.POLICIES`, "duplicate" or "near-duplicate"."""
    action: str
    """dropped: the document is not in the store; replaced: what could be had of it is; kept: all of it is."""
    detail: str


class StoreSettings(_Frozen):
    """All that decides the bytes of a store, besides its documents."""

    format_version: Literal[2]
    seq_len: int
    packing: Literal["bestfit", "stream", "book"]
    stride: int
    """With the packing "book": from one window of a document to the next, at most `seq_len`."""
    bos: bool
    """Whether a document begins with BOS."""
    eos: bool
    """Whether a document ends with EOS. Padding is EOS in any case."""
    split: dict[str, float]
    rows_per_shard: int
    tokenizer_kind: TokenizerKind
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    text: TextSettings
    duplicates: Literal["keep", "drop", "near"]
    near_threshold: float
    block_bytes: int
    """Where documents are cut into blocks: `blocks.BLOCK_BYTES`."""
    piece_chars: int
    """Where blocks are cut into pieces: `tokenizer.PIECE_CHARS`."""


class Manifest(StoreSettings):
    """`manifest.json` of a store."""

    input_sha256: str
    """Of the names, sizes, hashes and places of all input files: see `hash_input`."""
    splits: dict[str, SplitRecord]
    """In the order of their rows, "train" first."""
    problems: dict[str, int]
    """Number of documents by "problem/action": what `problems.jsonl` lists, counted."""
    files: dict[str, FileRecord]
    """Every file but the manifest and those of appended parts, by its path in the store, with forward slashes."""
    parts: dict[str, str]
    """Name of an appended part -> sha256 of its manifest.json. A part itself has none."""
    library_versions: dict[str, str]

    @property
    def n_rows(self) -> int:
        """Rows in all splits."""
        return max((stop for split in self.splits.values() for _, stop in split.rows), default=0)

    @property
    def fingerprint(self) -> str:
        """A hash that two stores share when they hold the same bytes, whichever library versions wrote them.

        To cover appended parts, take it of the merged manifest, as `Store.manifest` is.
        """
        content = self.model_dump(mode="json", exclude={"library_versions", "parts"})
        return _hash_json(content)

    def to_bytes(self) -> bytes:
        """The only valid content of the file."""
        content = self.model_dump(mode="json")
        return (json.dumps({**content, "checksum": _hash_json(content)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, store: Path) -> "Manifest":
        """The manifest of a store. Raises DataError when there is none, or a single bit of it is off."""
        path = store / MANIFEST_NAME
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            where = "" if store.is_absolute() else f" in {Path.cwd()}"
            what = f"does not exist{where}: give its folder, if it was moved, or"
            if store.exists():
                kind = "has no manifest.json, so it is not a store" if store.is_dir() else "is a file, not a store"
                what = f"{kind}:"
            raise DataError(f"{store} {what} build one with python -m data_pipeline build") from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        try:
            content = json.loads(data)
            if content.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
                raise DataError(
                    f"{path} has format version {content['format_version']}, this version reads {FORMAT_VERSION}: "
                    "build the store again"
                )
            content.pop("checksum")
            manifest = cls.model_validate(content)
        except (ValueError, AttributeError, KeyError, TypeError, ValidationError):
            manifest = None
        if manifest is None or manifest.to_bytes() != data:
            raise DataError(f"{path} is damaged: restore it from a copy, or build the store again")
        return manifest


def merge(manifests: Mapping[str, Manifest]) -> Manifest:
    """The manifest of all parts as one store, given each by its path in the store ("." and then the appended ones).

    Rows are numbered on from part to part, so a split has a range of rows for each part that it is in.
    """
    (_, root), *appended = manifests.items()
    if not appended:
        return root
    splits: dict[str, SplitRecord] = {}
    first_row = 0
    for manifest in manifests.values():
        for name, split in manifest.splits.items():
            shifted = split.model_copy(update={"rows": tuple((a + first_row, b + first_row) for a, b in split.rows)})
            splits[name] = _add(splits[name], shifted) if name in splits else shifted
        first_row += manifest.n_rows
    problems: Counter[str] = Counter()
    for manifest in manifests.values():
        problems.update(manifest.problems)
    return root.model_copy(
        update={
            "input_sha256": _hash_json([manifest.input_sha256 for manifest in manifests.values()]),
            "splits": dict(sorted(splits.items(), key=lambda item: (item[0] != "train", item[0]))),
            "problems": dict(sorted(problems.items())),
            "files": {
                (PurePosixPath(path) / name).as_posix(): record
                for path, manifest in manifests.items()
                for name, record in manifest.files.items()
            },
        }
    )


def _add(one: SplitRecord, other: SplitRecord) -> SplitRecord:
    """Fields of a split's record add up: numbers as numbers, ranges of rows as tuples."""
    return SplitRecord(**{name: getattr(one, name) + getattr(other, name) for name in SplitRecord.model_fields})


def settings_differences(old: StoreSettings, new: StoreSettings) -> list[str]:
    """One line per setting that differs: its name, the old value and the new."""
    before, after = (_flatten(settings) for settings in (old, new))
    return [f"{name}: {_show(before[name])} -> {_show(after[name])}" for name in before if before[name] != after[name]]


def _flatten(settings: StoreSettings) -> dict[str, object]:
    names = [name for name in StoreSettings.model_fields if name != "text"]
    return {**{name: getattr(settings, name) for name in names}, **dict(settings.text)}


def document_differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """A line for the documents that were added, removed and changed, given anything that identifies each content."""
    kinds = {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }
    return [
        f"{counted(len(names), 'document')} {kind}: {listed(names, _MOST_NAMED)}"
        for kind, names in kinds.items()
        if names
    ]


def hash_input(inputs: Sequence[tuple[str, int, str, str | None]]) -> str:
    """The hash of a corpus, given (name, bytes, sha256, the split that it forms by itself) of each input file."""
    return _hash_json([(name, n_bytes, sha256, split_mark(split)) for name, n_bytes, sha256, split in inputs])


def split_mark(split: str | None) -> str | bool:
    """How the split that a file forms by itself is recorded: as when there was one such split, val, or none."""
    return {None: False, "val": True}.get(split, split or False)


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _show(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={fraction:g}" for name, fraction in value.items()) or "none"
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return str(value)


def library_versions(near: bool) -> dict[str, str]:
    """Of what has a part in the bytes of a store, with near-duplicates or without."""
    libraries = ("numcodecs", "numpy", "sentencepiece", "zarr", *(["datasketch"] if near else []))
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in libraries}}
