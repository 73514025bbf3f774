"""Are the input files those that a build began with, or that a store was made of?

Names and sizes are compared always, times where a build is unfinished. A finished store is a pure function of what its
inputs hold, so it knows of no times: the inputs are read once more and compared by their hashes. That is one process's
business, where several are at work.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.bar import Bar
from data_pipeline.config import POLICIES
from data_pipeline.documents import Reading, Span, read_parts
from data_pipeline.errors import BadDocument, DataError
from data_pipeline.files import InputFile, check_folders, hash_file
from data_pipeline.manifest import (
    UNREADABLE,
    ProblemRecord,
    StoreSettings,
    document_differences,
    hash_input,
    settings_differences,
    split_mark,
)
from data_pipeline.part import StorePart

_HASHING_THREADS = 8
"""Hashing leaves Python's lock alone, and waits for files for the rest."""


_PLAN_SETTINGS = ("seq_len", "packing", "stride", "split", "rows_per_shard", "near_threshold")
"""What may change as long as nothing is planned: the tokens of documents do not depend on it."""


def compare_with_snapshot(
    folder: Path,
    output: Path,
    before: Mapping[str, Any],
    settings: StoreSettings,
    files: Sequence[InputFile],
    planned: bool,
) -> None:
    """Raises DataError when the unfinished build in `folder` began with other settings or other files.

    `before`: the settings of that build, and its files by name, as `snapshot` gives them. `planned`: whether it has
    decided where everything goes.
    """
    old_settings = StoreSettings.model_validate(before["settings"])
    if not planned:
        free = list(_PLAN_SETTINGS)
        if "near" not in (old_settings.duplicates, settings.duplicates):  # for which documents get signatures
            free.append("duplicates")
        old_settings = old_settings.model_copy(update={name: getattr(settings, name) for name in free})
    other_settings = settings_differences(old_settings, settings)
    old = {name: tuple(facts) for name, facts in before["files"].items()}
    other_inputs = document_differences(old, snapshot(files))
    others, way_out = "settings", "Run the command that began it"
    if other_inputs:
        others = "inputs and settings" if other_settings else "inputs"
        way_out = (
            f"{way_out if other_settings else 'Run it'} with the inputs as they were, times of modification included"
        )
    if other_settings or other_inputs:
        raise DataError(
            f"{folder} holds an unfinished build of {output} from other {others}: "
            f"{'; '.join(other_settings + other_inputs)}. {way_out}, or remove {folder} to start afresh"
        )


def compare_with_others(
    output: Path, job: Mapping[str, Any], settings: StoreSettings, policies: Mapping[str, str], tokenizer_sha256: str
) -> None:
    """Raises DataError when this process would build something else than `job` says, by which the others go.

    tokenizer_sha256: of the tokenizer as this process has read it, perhaps later than the settings, or on another node.
    """
    differences = settings_differences(StoreSettings.model_validate(job["settings"]), settings)
    if job["policies"] != policies:
        differences.append(f"--on-bad: {job['policies']} -> {policies}")
    if tokenizer_sha256 != settings.tokenizer_sha256:
        differences.append("the file of the tokenizer is another")
    if differences:
        raise DataError(
            f"the processes that build {output} disagree: {'; '.join(differences)}. Start all of them by the same "
            "command, with the same tokenizer"
        )


def snapshot(files: Sequence[InputFile]) -> dict[str, tuple[int, int | None, str | bool]]:
    """What identifies each file while a build lasts, by its name."""
    return {file.name: (file.n_bytes, file.mtime_ns, split_mark(file.split)) for file in files}


def hash_files(files: Sequence[InputFile], hashes: Sequence[str]) -> str:
    """The hash of a corpus, given the sha256 (hex) of each of its files."""
    return hash_input([(f.name, f.n_bytes, sha256, f.split) for f, sha256 in zip(files, hashes, strict=True)])


def check_same_input(output: Path, part: StorePart, files: Sequence[InputFile], contents: bool) -> None:
    """Raises DataError when `output`, or rather its first part, was made of other files than these.

    contents: whether to read and compare what they hold, and not their names and sizes only.
    """
    old = {record.name: record for record in part.inputs()}
    sizes = {name: record.n_bytes for name, record in old.items()}
    differences = document_differences(sizes, {file.name: file.n_bytes for file in files})
    if not differences:
        recorded = [old[file.name].sha256 for file in files]
        hashes = _hash_all(files, recorded) if contents else recorded
        now = {file.name: digest for file, digest in zip(files, hashes, strict=True)}
        differences = document_differences({name: record.sha256 for name, record in old.items()}, now)
        if not differences and hash_files(files, hashes) != part.manifest.input_sha256:
            differences = ["--val-input or --test-input name other files of it than before"]
    if differences:
        raise DataError(
            f"{output} was built from other input: {'; '.join(differences)}. Build into another --output, delete this "
            "one first, or add documents with --append"
        )


def new_files(files: Sequence[InputFile], parts: Sequence[StorePart]) -> list[InputFile]:
    """The files that a store, all of its parts, does not have.

    Raises DataError for one that would give two documents the same name.
    """
    recorded = {record.name for part in parts for record in part.inputs()}
    fresh = {file.name: file.location for file in files if file.name not in recorded}
    if fresh:
        check_folders({name: f"{name} of the store" for name in recorded} | fresh, fresh)
    return [file for file in files if file.name in fresh]


def notes_on_signatures(parts: Sequence[StorePart], duplicates: str) -> list[str]:
    """What the user should know of the parts of a store in which near copies cannot be looked for."""
    unsigned = [part.path for part in parts if not part.has_signatures] if duplicates == "near" else []
    return [
        f"{path} was built by a version that did not keep its documents' signatures: near copies of them are not found "
        "among what is added, exact ones are. To have them found, build the store again"
        for path in unsigned
    ]


def check_splits(files: Sequence[InputFile], parts: Sequence[StorePart]) -> None:
    """Raises DataError for a document of files to be held out that a store, one of its parts, has in another split.

    Files of a name that it has are the same: see `check_unchanged`.
    """
    held_out = {file.name: file for file in files if file.split}
    for record in (record for part in parts for record in part.documents()) if held_out else ():
        file = held_out.get(record.name) or held_out.get(record.name.rpartition("/")[0])
        if file is not None and record.split != file.split:
            raise DataError(
                f"{file.location} is in the store already, and its document {record.name!r} in the split "
                f"{record.split!r}: --append moves none to {file.split!r}. Leave it out of {file.option}, or build a "
                "new store"
            )


def check_unchanged(files: Sequence[InputFile], parts: Sequence[StorePart]) -> None:
    """Raises DataError for a file that has changed since a store, one of its parts, was made of it: all are read."""
    recorded = {record.name: record for part in parts for record in part.inputs()}
    present = [file for file in files if file.name in recorded]
    changed = [file for file in present if file.n_bytes != recorded[file.name].n_bytes]
    if not changed:
        old = [recorded[file.name].sha256 for file in present]
        hashes = zip(present, old, _hash_all(present, old), strict=True)
        changed = [file for file, before, now in hashes if before != now]
    if changed:
        raise DataError(
            f"{changed[0].location} is not what the store was built from under the name {changed[0].name!r}, and "
            "--append changes nothing that is there: rename the file, or build a new store"
        )


def check_same_policies(output: Path, part: StorePart, files: Sequence[InputFile], reading: Reading) -> None:
    """Raises DataError when a document of these files had a problem that would be treated otherwise now."""
    by_name = {file.name: file for file in files}
    skipped: set[str] = set()
    doubtful: dict[InputFile, list[ProblemRecord]] = defaultdict(list)
    keeps_empty = part.manifest.bos or part.manifest.eos
    for record in part.problems():
        file = by_name.get(record.document) or by_name.get(record.document.rpartition("/")[0])
        if file is None or record.problem not in POLICIES:  # of another file, or a duplicate
            continue
        policy = reading.policy(record.problem)
        if policy == "strict" or (policy == "skip" and record.action == "replaced"):
            raise _treated_otherwise(output, record, policy)
        if policy == "skip":
            skipped.add(record.document)
        elif record.action == "dropped" and (record.problem != "empty" or keeps_empty):
            doubtful[file].append(record)
    # Left out by `skip`, or by `replace` because it left nothing to keep? That takes another look at the file.
    for file, records in doubtful.items():
        if open_records := [record for record in records if record.document not in skipped]:
            kept = _kept_documents(file, reading, keeps_empty)
            for record in open_records:
                if record.document in kept:
                    raise _treated_otherwise(output, record, "replace")


def _treated_otherwise(output: Path, record: ProblemRecord, policy: str) -> DataError:
    now = {"strict": "stops at it", "skip": "leaves it out", "replace": "keeps what can be had of it"}[policy]
    before = "replace" if record.action == "replaced" else "skip"
    return DataError(
        f"{output} was built otherwise: document {record.document!r} ({record.detail}) was {record.action}, and "
        f"--on-bad {record.problem}={policy} {now}. Build into another --output, or with --on-bad "
        f"{record.problem}={before} as before"
    )


def _kept_documents(file: InputFile, reading: Reading, keeps_empty: bool) -> set[str]:
    """The names of the documents of a file that are not left out."""
    kept = set()
    for part in read_parts(file, Span(0, 0, file.n_bytes), reading):
        with suppress(BadDocument):
            if sum(map(len, part.blocks)) or keeps_empty:
                kept.add(file.document_name(part.record))
    return kept


def _hash_all(files: Sequence[InputFile], recorded: Sequence[str]) -> list[str]:
    """The sha256 (hex) of each file, given what is recorded of it."""
    hashes = []
    with (
        ThreadPoolExecutor(_HASHING_THREADS) as pool,
        Bar(desc="check", total=sum(file.n_bytes for file in files), unit="B", unit_scale=True) as bar,
    ):
        for file, digest in zip(files, pool.map(_hash, files, recorded), strict=True):
            hashes.append(digest)
            bar.update(file.n_bytes)
    return hashes


def _hash(file: InputFile, recorded: str) -> str:
    try:
        return hash_file(file)
    except DataError:
        if recorded == UNREADABLE:  # as it was
            return recorded
        raise
