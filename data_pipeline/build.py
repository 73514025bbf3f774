"""The story of a build: scan, tokenize, plan, write, publish.

What goes where is decided between the halves, by pure functions of the inputs and settings, before anyone writes a
row. Each shard is assembled by one worker and written once, whole. So the store is the same to the byte for any
number of workers.
"""

import importlib.metadata
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipeline import store
from data_pipeline.config import BuildSettings
from data_pipeline.errors import DataError
from data_pipeline.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    DocumentRecord,
    FileRecord,
    Manifest,
    SplitRecord,
    StoreSettings,
    document_differences,
    hash_input,
    settings_differences,
)
from data_pipeline.packing import Segments, pack
from data_pipeline.parallel import Map, worker_map
from data_pipeline.scratch import ScratchTokens, TokenizeTask, scratch_path, tokenize, write_index
from data_pipeline.sources import BLOCK_BYTES, Document, find_documents, plan_tasks, scan_documents
from data_pipeline.splits import assign_splits
from data_pipeline.staging import staged
from data_pipeline.tokenizer import PIECE_CHARS, Tokenizer, load_tokenizer, token_dtype

TASK_BYTES = 4 << 20
"""Text that a worker tokenizes at a time: a second or less, so that the last tasks keep nobody waiting."""


class Corpus(NamedTuple):
    """The documents as they were found, each with its sha256 (hex) and its split."""

    documents: list[Document]
    digests: list[str]
    splits: list[str]


class TokenCounts(NamedTuple):
    """Per document, int64 [n_documents]: tokens, BOS and EOS included, and how many of them are byte fallback."""

    tokens: np.ndarray
    byte_fallback: np.ndarray


class Plan(NamedTuple):
    """Where everything goes. Segments name documents of the corpus."""

    segments: Segments
    split_rows: dict[str, tuple[int, int]]

    @property
    def n_rows(self) -> int:
        return int(self.segments.row[-1]) + 1


class ShardTask(NamedTuple):
    """What one call of `assemble_shard` does: rows [first_row, stop_row) out of stretches of the scratch tokens."""

    output: Path
    scratch: Path
    first_row: int
    stop_row: int
    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    source: np.ndarray
    """Place of each segment's first token in the scratch tokens."""
    settings: StoreSettings


@dataclass(frozen=True)
class BuildResult:
    """A finished store, and what the user should know about how it came to be."""

    store: store.Store
    already_built: bool
    notes: tuple[str, ...]


def build(settings: BuildSettings) -> BuildResult:
    """Builds the store that `settings` describe, or finds that it is there.

    Raises DataError, and leaves nothing, for input or settings that make no store; also when the output is there but
    was made of other input or settings.
    """
    tokenizer = load_tokenizer(settings.tokenizer)
    decisive = _store_settings(settings, tokenizer)
    _check_output(settings.output, decisive)
    with worker_map(settings.workers) as run:
        documents = find_documents(settings.inputs, settings.val_inputs)
        digests = scan_documents(documents, utf8=tokenizer.kind == "sentencepiece", run=run)
        splits, notes = _assign(documents, digests, settings)
        corpus = Corpus(documents, digests, splits)
        if (settings.output / MANIFEST_NAME).exists():
            existing = store.Store.open(settings.output)
            _check_same_input(existing, corpus)
            return BuildResult(existing, True, ())
        with staged(settings.output) as partial:
            manifest = _write_store(partial, corpus, decisive, settings.tokenizer, run)
    return BuildResult(store.Store(settings.output, manifest), False, tuple(notes))


def _write_store(partial: Path, corpus: Corpus, settings: StoreSettings, tokenizer_name: str, run: Map) -> Manifest:
    scratch = partial / "scratch"
    scratch.mkdir(parents=True)
    counts = tokenize_documents(corpus.documents, tokenizer_name, settings, scratch, run)
    plan = plan_rows(counts.tokens, corpus.splits, settings)
    store.create_tokens(partial, settings, plan.n_rows)
    shard_files = write_shards(partial, plan, counts.tokens, settings, scratch, run)
    shutil.rmtree(scratch)

    table = [
        DocumentRecord(number, document.name, document.n_bytes, digest, split, int(tokens))
        for number, (document, digest, split, tokens) in enumerate(zip(*corpus, counts.tokens, strict=True))
    ]
    store.write_sidecars(partial, plan.segments, plan.n_rows, load_tokenizer(tokenizer_name), table)
    other_files = {
        name: store.record_file(partial / name) for name in store.list_files(partial) if name not in shard_files
    }
    manifest = Manifest(
        **settings.model_dump(),
        input_sha256=_input_sha256(corpus),
        splits=_split_records(plan, table, counts),
        files=dict(sorted({**shard_files, **other_files}.items())),
        library_versions=_library_versions(),
    )
    store.write_manifest(partial, manifest)
    return manifest


def tokenize_documents(
    documents: Sequence[Document], tokenizer: str, settings: StoreSettings, scratch: Path, run: Map
) -> TokenCounts:
    """Tokenizes everything into scratch files. Returns what each document came to."""
    sizes = [document.n_bytes for document in documents]
    tasks = [
        TokenizeTask(
            tokenizer,
            spans,
            [documents[span.document] for span in spans],
            settings.block_bytes,
            scratch_path(scratch, number),
        )
        for number, spans in enumerate(plan_tasks(sizes, settings.block_bytes, TASK_BYTES))
    ]
    counts = TokenCounts(np.zeros(len(documents), np.int64), np.zeros(len(documents), np.int64))
    tokens_per_task = []
    with tqdm(desc="tokenize", total=sum(sizes), unit="B", unit_scale=True, disable=None) as bar:
        for task, results in zip(tasks, run(tokenize, tasks), strict=True):
            for document, n_tokens, n_byte_fallback in results:
                counts.tokens[document] += n_tokens
                counts.byte_fallback[document] += n_byte_fallback
            tokens_per_task.append(sum(result.n_tokens for result in results))
            bar.update(sum(span.stop - span.start for span in task.spans))
    write_index(scratch, tokens_per_task)
    return counts


def plan_rows(lengths: np.ndarray, splits: Sequence[str], settings: StoreSettings) -> Plan:
    """Lays documents of `lengths` [n_documents] tokens into rows; each split has rows of its own, train first."""
    names = np.array(splits)
    parts, split_rows, first_row = [], {}, 0
    for split in _split_order(splits):
        members = np.flatnonzero(names == split)
        part = pack(lengths[members], settings.seq_len, settings.packing)
        part = part._replace(row=part.row + first_row, document=members[part.document])
        split_rows[split] = (first_row, int(part.row[-1]) + 1)
        first_row = split_rows[split][1]
        parts.append(part)
    return Plan(Segments(*map(np.concatenate, zip(*parts, strict=True))), split_rows)


def write_shards(
    output: Path, plan: Plan, lengths: np.ndarray, settings: StoreSettings, scratch: Path, run: Map
) -> dict[str, FileRecord]:
    """Writes all shards, each once and by one worker. Returns a record of each file."""
    segments = plan.segments
    source = (np.cumsum(lengths) - lengths)[segments.document] + segments.document_start
    tasks = []
    for first_row in range(0, plan.n_rows, settings.rows_per_shard):
        stop_row = min(first_row + settings.rows_per_shard, plan.n_rows)
        part = slice(*np.searchsorted(segments.row, (first_row, stop_row)))
        columns = segments.row[part], segments.start[part], segments.length[part], source[part]
        tasks.append(ShardTask(output, scratch, first_row, stop_row, *columns, settings))
    files = {}
    with tqdm(desc="write", total=int(lengths.sum()), unit="token", unit_scale=True, disable=None) as bar:
        for task, (name, record) in zip(tasks, run(assemble_shard, tasks), strict=True):
            files[name] = record
            bar.update(int(task.length.sum()))
    return files


def assemble_shard(task: ShardTask) -> tuple[str, FileRecord]:
    """Gathers the rows of a shard and writes it. Returns the name and record of its file."""
    dtype = token_dtype(task.settings.vocab_size)
    tokens = ScratchTokens(task.scratch, dtype)
    rows = np.full((task.stop_row - task.first_row, task.settings.seq_len), task.settings.eos_id, dtype)
    for row, start, length, source in zip(task.row, task.start, task.length, task.source, strict=True):
        rows[row - task.first_row, start : start + length] = tokens.read(int(source), int(length))
    return store.write_shard(task.output, task.first_row, rows)


def _store_settings(settings: BuildSettings, tokenizer: Tokenizer) -> StoreSettings:
    return StoreSettings.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "seq_len": settings.seq_len,
            "packing": settings.packing,
            "split": dict(sorted(settings.split.items())),
            "rows_per_shard": settings.rows_per_shard,
            "tokenizer_kind": tokenizer.kind,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "block_bytes": BLOCK_BYTES,
            "piece_chars": PIECE_CHARS,
        }
    )


def _check_output(output: Path, settings: StoreSettings) -> None:
    """Refuses, before any long work, an output that is taken by something else than this store."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(f"{output} exists and is not a store: choose another --output, or remove it")
    differences = settings_differences(Manifest.read(output), settings)
    if differences:
        raise DataError(_taken(output, differences))


def _check_same_input(existing: store.Store, corpus: Corpus) -> None:
    if existing.manifest.input_sha256 == _input_sha256(corpus):
        return
    old = {document.name: (document.sha256, document.split) for document in existing.documents}
    new = {d.name: (digest, split) for d, digest, split in zip(*corpus, strict=True)}
    raise DataError(_taken(existing.path, document_differences(old, new)))


def _taken(output: Path, differences: list[str]) -> str:
    return (
        f"{output} was built otherwise: {'; '.join(differences)}. Build into another --output, or delete this one first"
    )


def _assign(
    documents: Sequence[Document], digests: Sequence[str], settings: BuildSettings
) -> tuple[list[str], list[str]]:
    """The split of each document, and notes for the user: --val-input decides for its own, the hash for the rest."""
    if not settings.split:
        return ["val" if document.held_out else "train" for document in documents], []
    free = [digest for document, digest in zip(documents, digests, strict=True) if not document.held_out]
    assigned, notes = assign_splits(free, settings.split)
    names = iter(assigned)
    return ["val" if document.held_out else next(names) for document in documents], notes


def _input_sha256(corpus: Corpus) -> str:
    return hash_input([(d.name, d.n_bytes, digest, split) for d, digest, split in zip(*corpus, strict=True)])


def _split_order(splits: Sequence[str]) -> list[str]:
    return sorted(set(splits), key=lambda split: (split != "train", split))


def _split_records(plan: Plan, table: Sequence[DocumentRecord], counts: TokenCounts) -> dict[str, SplitRecord]:
    records = {}
    for split, rows in plan.split_rows.items():
        members = [document for document in table if document.split == split]
        records[split] = SplitRecord(
            rows=(rows,),
            documents=len(members),
            n_bytes=sum(document.n_bytes for document in members),
            tokens=sum(document.tokens for document in members),
            byte_fallback_tokens=int(counts.byte_fallback[[document.id for document in members]].sum()),
        )
    return records


def _library_versions() -> dict[str, str]:
    libraries = ("numcodecs", "numpy", "sentencepiece", "zarr")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in libraries}}
