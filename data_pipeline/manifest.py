"""What a store has to contain: the settings that made it and the size and hash of every file in it.

Zarr reads a missing shard as fill values, without an error, so a store cannot be trusted without such a list. The
manifest guards itself too: the file must be, to the byte, what its own content serialises to, checksum included.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import TokenizerKind

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


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
    """Including one BOS and one EOS per document, without padding."""
    byte_fallback_tokens: int
    """Tokens that are one byte of a character without a piece of its own."""


class DocumentRecord(NamedTuple):
    """A line of `documents.jsonl`."""

    id: int
    name: str
    n_bytes: int
    sha256: str
    split: str
    tokens: int


class StoreSettings(_Frozen):
    """All that decides the bytes of a store, besides its documents."""

    format_version: Literal[1]
    seq_len: int
    packing: Literal["bestfit", "stream"]
    split: dict[str, float]
    rows_per_shard: int
    tokenizer_kind: TokenizerKind
    tokenizer_sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    block_bytes: int
    """Where documents are cut into blocks: `sources.BLOCK_BYTES`."""
    piece_chars: int
    """Where blocks are cut into pieces: `tokenizer.PIECE_CHARS`."""


class Manifest(StoreSettings):
    """`manifest.json` of a store."""

    input_sha256: str
    """Of the names, sizes, hashes and splits of all documents: see `hash_input`."""
    splits: dict[str, SplitRecord]
    """In the order of their rows, "train" first."""
    files: dict[str, FileRecord]
    """Every file of the store but the manifest, by its path in the store, with forward slashes."""
    library_versions: dict[str, str]

    @property
    def n_rows(self) -> int:
        """Rows in all splits."""
        return max(stop for split in self.splits.values() for _, stop in split.rows)

    @property
    def fingerprint(self) -> str:
        """A hash that two stores share when they hold the same bytes, whichever library versions wrote them."""
        content = self.model_dump(mode="json", exclude={"library_versions"})
        return _hash_json(content)

    def to_bytes(self) -> bytes:
        """The only valid content of the file."""
        content = self.model_dump(mode="json")
        return (json.dumps({**content, "checksum": _hash_json(content)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, store: Path) -> "Manifest":
        """The manifest of a store. Raises DataError when there is none, or not a single bit is off."""
        path = store / MANIFEST_NAME
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            what = "has no manifest.json, so it is not a store" if store.exists() else "does not exist"
            raise DataError(f"{store} {what}: build one with python -m data_pipeline build") from None
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


def settings_differences(old: StoreSettings, new: StoreSettings) -> list[str]:
    """One line per setting that differs: its name, the old value and the new."""
    pairs = ((name, getattr(old, name), getattr(new, name)) for name in StoreSettings.model_fields)
    return [f"{name}: {_show(before)} -> {_show(after)}" for name, before, after in pairs if before != after]


def document_differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """A line for the documents that were added, removed and changed, given anything that identifies each content."""
    kinds = {
        "added": sorted(new.keys() - old.keys()),
        "removed": sorted(old.keys() - new.keys()),
        "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
    }
    return [f"{len(names)} documents {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]


def hash_input(documents: list[tuple[str, int, str, str]]) -> str:
    """The hash of a corpus, given (name, bytes, sha256, split) of each document."""
    return _hash_json(documents)


def _hash_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _show(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={fraction:g}" for name, fraction in value.items()) or "none"
    return str(value)


def _shorten(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
