"""A store as one: the part that was built, and the parts that were appended to it.

`--append` never touches a file that is there, but for the manifest: each addition is a complete store of its own below
`parts/`, which the manifest of the first then names, with the hash of its manifest. Here all of them read as one:
rows, documents and segments are numbered on from part to part. Whoever has the store open keeps what there was when it
was opened. A directory below `parts/` that no manifest names was left by an append that was killed.
"""

import hashlib
import operator
from bisect import bisect_right
from collections.abc import Container, Iterator, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from data_pipeline.duplicates import N_PERMUTATIONS, Known
from data_pipeline.errors import DataError
from data_pipeline.layout import WAY_OUT, list_files, write_manifest
from data_pipeline.manifest import (
    MANIFEST_NAME,
    DocumentRecord,
    FileRecord,
    InputRecord,
    Manifest,
    ProblemRecord,
    StoreSettings,
    merge,
    settings_differences,
)
from data_pipeline.packing import Segments
from data_pipeline.part import StorePart
from data_pipeline.tokenizer import Tokenizer

_PARTS_NAME = "parts"


class Store:
    """A finished store, open for reading.

    Cheap to make and to pickle: arrays are opened when they are first read, in the process that reads them.
    """

    def __init__(self, path: Path, manifest: Manifest, appended: Mapping[str, Manifest] | None = None) -> None:
        """`manifest` is the one in `path`; `appended` has those of the parts that it names, by their names."""
        self.path = path
        self._manifests = {".": manifest}
        self._manifests.update({f"{_PARTS_NAME}/{name}": part for name, part in (appended or {}).items()})
        self.parts: list[StorePart] = []
        """At least one, in the order of their rows."""
        for name, one in self._manifests.items():
            stops = (self.parts[-1].stop_row, self.parts[-1].stop_document) if self.parts else (0, 0)
            self.parts.append(StorePart(path / name, one, *stops))
        self.manifest = merge(self._manifests)
        """Of all parts as one."""

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a store after a quick check: the manifests are whole, every file is there and has its size.

        Raises DataError that names the first file that is not.
        """
        path = Path(path)
        root = Manifest.read(path)
        store = cls(path, root, {name: read_part(path, root, name) for name in root.parts})
        for problem in store.check_files():
            raise DataError(f"{problem}: {WAY_OUT}")
        return store

    def refuse_replaced(self) -> None:
        """Raise DataError where another store has taken this one's place since it was opened.

        Rows that are added (--append) change nothing of those that are there. A store that cannot be read at the moment
        is not one that was replaced.
        """
        for part in self.parts:
            try:
                now = Manifest.read(part.path)
            except DataError:
                continue
            if now.files != part.manifest.files:
                raise DataError(
                    f"{part.path} is not what it was when it was opened: another store has taken its place. Put back "
                    "the one of before, or open this one anew"
                )

    def __reduce__(self) -> tuple[type["Store"], tuple[Path, Manifest, dict[str, Manifest]]]:
        (_, root), *appended = self._manifests.items()
        return Store, (self.path, root, {name.removeprefix(f"{_PARTS_NAME}/"): part for name, part in appended})

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.manifest.seq_len

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.manifest.vocab_size

    @property
    def n_rows(self) -> int:
        """Rows of all splits."""
        return self.parts[-1].stop_row

    @property
    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: bytes of text that each token stands for; 0 for BOS and EOS."""
        return self.parts[0].token_bytes

    @cached_property
    def valid_tokens(self) -> np.ndarray:
        """int64 [n_rows]: how many tokens of each row are not padding."""
        return np.concatenate([part.valid_tokens for part in self.parts])

    @cached_property
    def segments(self) -> Segments:
        """All segments of all rows."""
        if len(self.parts) == 1:
            return self.parts[0].segments
        return Segments(*map(np.concatenate, zip(*(part.segments for part in self.parts), strict=True)))

    @cached_property
    def documents(self) -> list[DocumentRecord]:
        """The document table, in the order of ids. Raises DataError when a file of it is damaged."""
        return list(self.each_document())

    def each_document(self) -> Iterator[DocumentRecord]:
        """The same one by one, since a table may be large. Raises DataError as above."""
        return chain.from_iterable(part.documents() for part in self.parts)

    def names_of(self, documents: Container[int]) -> dict[int, str]:
        """Names of documents, by their ids, in one pass through the table. Raises DataError as above."""
        return {each.id: each.name for each in self.each_document() if each.id in documents}

    @cached_property
    def inputs(self) -> list[InputRecord]:
        """The files that the store was made of. Raises DataError when a list of them is damaged."""
        return [record for part in self.parts for record in part.inputs()]

    @cached_property
    def problems(self) -> list[ProblemRecord]:
        """What was wrong with documents. Raises DataError when a list of that is damaged."""
        return [problem for part in self.parts for problem in part.problems()]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store. Raises DataError when the store's copy is damaged."""
        return self.parts[0].tokenizer

    def split_rows(self, split: str) -> list[tuple[int, int]]:
        """The ranges [start, stop) of rows that a split has. Raises DataError when there is no such split."""
        if split not in self.manifest.splits:
            raise DataError(
                f"{self.path} has no split {split!r}, only {', '.join(self.manifest.splits)}: name one of these, or "
                "build a store with --split, --val-input or --test-input"
            )
        return list(self.manifest.splits[split].rows)

    def rows_of(self, split: str) -> np.ndarray:
        """int64 [n]: the numbers of these rows, one by one. Raises as above."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(*bounds) for bounds in self.split_rows(split))])

    def read_row(self, row: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start:stop] of a row as stored, padding included; uint16 or uint32.

        Raises IndexError for a row that does not exist, TypeError for what is no integer, DataError for a row that is
        damaged: damage never yields wrong tokens.
        """
        part, row = self._placed(row)
        return part.read_row(row, operator.index(start), None if stop is None else operator.index(stop))

    def segments_of(self, row: int) -> np.ndarray:
        """int64 [n, 4]: (start, length, document, document_start) of each stretch of a document in the row.

        Raises IndexError for a row that does not exist, TypeError for what is no integer, DataError when the table of
        segments is damaged.
        """
        part, row = self._placed(row)
        return part.segments_of(row)

    def lengths_of(self, row: int) -> np.ndarray:
        """uint32 [n]: the lengths of these stretches, which follow on each other. Raises as above."""
        part, row = self._placed(row)
        return part.lengths_of(row)

    def check_files(self, full: bool = False) -> list[str]:
        """What is wrong with the files of all parts: see `StorePart.check_files`."""
        return [problem for part in self.parts for problem in part.check_files(full)]

    def unknown_files(self) -> list[str]:
        """Files in the store's folder that are no part of it; of a part that is not, its folder."""
        known = {
            (Path(place) / name).as_posix()
            for place, manifest in self._manifests.items()
            for name in (*manifest.files, MANIFEST_NAME)
        }
        unknown = [name for name in list_files(self.path) if name not in known]
        return sorted({self._shorten(name) for name in unknown})

    def _shorten(self, name: str) -> str:
        place = "/".join(name.split("/")[:2])
        return place if name.startswith(f"{_PARTS_NAME}/") and place not in self._manifests else name

    def _placed(self, row: int) -> tuple[StorePart, int]:
        """The part that has a row, and its number as Python's integer, which one of NumPy's is not."""
        row = operator.index(row)
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row {row} is outside a store of {self.n_rows} rows")
        return self.parts[bisect_right(self.parts, row, key=lambda part: part.first_row) - 1], row


def part_path(store: Path, name: str) -> Path:
    """Where an appended part of a store lies."""
    return store / _PARTS_NAME / name


def read_part(store: Path, root: Manifest, name: str) -> Manifest:
    """The manifest of an appended part. Raises DataError when it is not the one that the `root` manifest names."""
    manifest = Manifest.read(part_path(store, name))
    if hashlib.sha256(manifest.to_bytes()).hexdigest() != root.parts[name]:
        raise DataError(f"{part_path(store, name)} is not the part that was appended to {store}: {WAY_OUT}")
    return manifest


def is_made(path: Path, settings: StoreSettings, input_sha256: str, shards: Mapping[str, FileRecord]) -> bool:
    """Whether a store or part is finished at `path`, and made of this input, by these settings, with these shards."""
    try:
        manifest = Manifest.read(path)
    except DataError:
        return False
    return (
        not settings_differences(manifest, settings)
        and manifest.input_sha256 == input_sha256
        and shards.items() <= manifest.files.items()
    )


def known_documents(path: Path | None) -> Known:
    """What a store holds already; nothing where there is none."""
    parts = Store.open(path).parts if path else []
    digests = "".join(document.sha256 for part in parts for document in part.documents())
    signatures = [found for part in parts if (found := part.signatures()) is not None]
    return Known(
        sha256=np.frombuffer(bytes.fromhex(digests), np.uint8).reshape(-1, 32),
        signatures=np.concatenate([np.zeros((0, N_PERMUTATIONS), np.uint32), *signatures]),
    )


def list_part(store: Path, name: str) -> None:
    """Adds a finished part, which lies at `part_path`, to a store's manifest. Harmless when it is there already.

    Raises DataError when the part was made with other settings, or the name is taken by another.
    """
    root, part = Manifest.read(store), Manifest.read(part_path(store, name))
    if name in root.parts:
        read_part(store, root, name)
        return
    if differences := settings_differences(root, part):
        raise DataError(f"{part_path(store, name)} does not fit {store}: {'; '.join(differences)}")
    digest = hashlib.sha256(part.to_bytes()).hexdigest()
    write_manifest(store, root.model_copy(update={"parts": {**root.parts, name: digest}}))
