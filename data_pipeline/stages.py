"""The five stages of a build, as any of its workers goes through them: start, tokenize, plan, write, finish.

What goes where is decided between the halves (`planning.py`), by pure functions of the inputs and settings, before
anyone writes a row. Every stage leaves records (`jobs.py`), so a build that was killed goes on where it was. All of
it lies in one work directory beside the output:

    job.json, files.jsonl   what is built from what
    start/                  whether this job has looked at the inputs
    tokens/                 token files and records of the tokenize stage
    plan/                   where everything goes
    shards/                 a record for each shard that is written
    content/                the store that grows; renamed to its final place
"""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import layout, store
from data_pipeline.config import POLICIES, BuildSettings
from data_pipeline.documents import Reading, Span, check_field, plan_tasks
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile, check_held_out, find_files
from data_pipeline.inputs import (
    check_splits,
    check_unchanged,
    compare_with_others,
    compare_with_snapshot,
    hash_files,
    new_files,
    notes_on_signatures,
    snapshot,
)
from data_pipeline.jobs import alone, done_tasks, record_name, run_stage
from data_pipeline.manifest import (
    FileRecord,
    InputRecord,
    Manifest,
    StoreSettings,
    library_versions,
)
from data_pipeline.packing import Segments
from data_pipeline.plan_notes import notes_on_plan
from data_pipeline.planning import (
    Documents,
    Plan,
    PlanSettings,
    count_problems,
    document_records,
    make_plan,
    merge_parts,
    problem_records,
    split_records,
)
from data_pipeline.scratch import (
    RECORD_SUFFIX,
    ScratchTokens,
    TokenizeTask,
    concatenate,
    read_record,
    tokenize,
)
from data_pipeline.staging import publishing, read_json, write_json
from data_pipeline.tokenizer import load_tokenizer, token_dtype

TASK_BYTES = (4 << 20, 256 << 20)
"""Input that a task of the tokenize stage covers, from small corpora to large: a second or so of work, so that the
last tasks keep nobody waiting, but not so many of them that their records become a burden to the file system."""
_TASKS = 16_384
_OF_THE_PLAN = ("plan", "shards", "content", "finish")
"""What is void without a plan, and must not outlive it: the plan goes first."""
_SEGMENTS = (*Segments._fields, "source")
"""Columns of the plan that lie in files of their own, of which a worker maps the part that it needs."""


@dataclass(frozen=True)
class Work:
    """What every worker of a build knows from the start."""

    folder: Path
    settings: BuildSettings
    decisive: StoreSettings
    target: Path
    """Where the content goes: the output, or the place of a part in it."""
    append_to: Path | None
    """The store to which the part is appended."""

    @cached_property
    def reading(self) -> Reading:
        settings = self.settings
        return Reading(settings.text, self.decisive.tokenizer_kind, settings.vocab_size or 0, self.policies)

    @property
    def policies(self) -> dict[str, str]:
        return {problem: self.settings.policies.get(problem, allowed[0]) for problem, allowed in POLICIES.items()}

    @cached_property
    def files(self) -> list[InputFile]:
        """The input files. To be asked for after the stage `start`."""
        with (self.folder / "files.jsonl").open(encoding="utf-8") as lines:
            return [InputFile(*json.loads(line)) for line in lines]

    @cached_property
    def tasks(self) -> list[list[Span]]:
        """The tasks of the tokenize stage."""
        total = sum(file.n_bytes for file in self.files)
        smallest, largest = TASK_BYTES
        return plan_tasks(self.files, self.settings.text, min(max(total // _TASKS, smallest), largest))

    @cached_property
    def n_rows(self) -> int:
        """Rows to write. To be asked for after the stage `plan`."""
        return int(read_json(self.folder / "plan" / f"{record_name(0)}.json")["n_rows"])

    @cached_property
    def input_hashes(self) -> list[str]:
        """The sha256 (hex) of each file, as it was read. To be asked for after the stage `plan`."""
        return [digest.tobytes().hex() for digest in np.load(self.folder / "plan" / "inputs.npy")]

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.decisive.rows_per_shard)


def go_through(work: Work, stopped: Callable[[], bool] = lambda: False) -> None:
    """Takes part in all stages until the store is published, or until `stopped()`."""
    begin(work)
    costs = [-sum(span.stop - span.start for span in task) for task in work.tasks]
    largest_first = np.argsort(costs, kind="stable").tolist()
    run_stage(work.folder / "tokens", RECORD_SUFFIX, largest_first, partial(tokenize_task, work), stopped)
    if stopped():
        return
    run_stage(work.folder / "plan", ".json", [0], partial(plan, work), stopped)
    if stopped():
        return
    run_stage(work.folder / "shards", ".json", range(work.n_shards), partial(write_shard, work), stopped)
    if stopped():
        return
    run_stage(work.folder / "finish", ".json", [0], partial(finish, work), stopped)


def begin(work: Work) -> None:
    """The stage `start`: finds the inputs, or compares them with what this build began with.

    Raises DataError when this process would build something else than whoever went through the stage.
    """
    run_stage(work.folder / "start", ".json", [0], partial(start, work))
    tokenizer = load_tokenizer(work.settings.tokenizer, work.settings.vocab_size)
    compare_with_others(
        work.settings.output, read_json(work.folder / "job.json"), work.decisive, work.policies, tokenizer.sha256
    )


def start(work: Work, number: int) -> None:
    """Finds the input files and writes what is built from what, and what the user should know about that.

    Raises DataError when there is an unfinished build of other inputs or settings.
    """
    settings = work.settings
    notes: list[str] = []
    found = find_files(settings.inputs, settings.held_out, work.decisive.tokenizer_kind == "integers", notes)
    files = found
    if work.append_to is not None:
        parts = store.Store.open(work.append_to).parts
        notes += notes_on_signatures(parts, settings.duplicates)
        check_unchanged(found, parts)
        check_splits(found, parts)
        files = new_files(found, parts)
    else:  # what is added must be read as the rest was
        check_field(files, work.reading)
    job = work.folder / "job.json"
    if _is_planned(work) and not (work.folder / "content").exists() and not work.target.exists():
        job.unlink(missing_ok=True)  # it was published, and whoever did that was killed before all was cleared away
    if job.exists():
        before = read_json(job)
        compare_with_snapshot(work.folder, settings.output, before, work.decisive, files, _is_planned(work))
        if before["policies"] != work.policies:
            _forget_tasks_with_problems(work)
    else:
        check_held_out(found, {file.name for file in files})
        _forget(work, "plan", "tokens")
    if not _is_planned(work):
        _forget(work, *_OF_THE_PLAN)
    with publishing(work.folder / "files.jsonl") as output:
        output.writelines(json.dumps([*asdict(file).values()]).encode() + b"\n" for file in files)
    facts = {"settings": work.decisive.model_dump(mode="json"), "policies": work.policies, "files": snapshot(files)}
    write_json(job, facts)
    write_json(work.folder / "start" / f"{record_name(number)}.json", {"notes": notes})


def _is_planned(work: Work) -> bool:
    return (work.folder / "plan" / f"{record_name(0)}.json").exists()


def _forget_tasks_with_problems(work: Work) -> None:
    """Other policies than before: tasks that met something to which a policy applies, and what came of them, go."""
    tokens = work.folder / "tokens"
    outdated = []
    for task in done_tasks(tokens, RECORD_SUFFIX) if tokens.exists() else ():
        record = tokens / (record_name(task) + RECORD_SUFFIX)
        if any(work.policies[problem] != policy for _, problem, policy, _ in read_record(record).problems):
            outdated.append(record)
    if outdated:
        _forget(work, *_OF_THE_PLAN)
        for record in outdated:
            record.unlink()


def _forget(work: Work, *folders: str) -> None:
    """Removes parts of the work directory, each at once: one that was half removed would be taken for a whole."""
    for name in folders:
        gone = work.folder / f"{name}.{uuid.uuid4().hex}.gone"
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree((work.folder / name).rename(gone))


def tokenize_task(work: Work, number: int) -> None:
    """Does a task of the tokenize stage."""
    settings = work.settings
    spans = work.tasks[number]
    tokenize(
        TokenizeTask(
            number=number,
            folder=work.folder / "tokens",
            tokenizer=settings.tokenizer,
            n_values=settings.vocab_size,
            spans=spans,
            files=[work.files[span.file] for span in spans],
            reading=work.reading,
            bos=settings.bos,
            eos=settings.eos,
            near=settings.duplicates == "near",
        )
    )


def plan(work: Work, number: int) -> None:
    """Decides where everything goes, and begins the store."""
    folder = work.folder / "plan"
    records = [read_record(work.folder / "tokens" / f"{record_name(n)}{RECORD_SUFFIX}") for n in range(len(work.tasks))]
    columns = concatenate(record.columns for record in records)
    offsets = np.cumsum([0, *(int(record.columns.n_tokens.sum()) for record in records)])
    parts = np.concatenate(([0], np.cumsum([len(record.columns.file) for record in records])))
    document_of_part = np.cumsum(columns.first) - 1
    problems = [
        (int(document_of_part[parts[task] + part]), problem, policy, detail)
        for task, record in enumerate(records)
        for part, problem, policy, detail in record.problems
    ]
    sha256 = np.zeros((len(work.files), 32), np.uint8)
    for files, hashes in ((record.input_file, record.input_sha256) for record in records):
        sha256[files] = hashes
    documents = merge_parts(columns)
    del records, columns  # which hold all signatures once more
    given_split = np.array([file.split or "" for file in work.files], str)
    known = store.known_documents(work.append_to)
    made = make_plan(documents, given_split, known, plan_settings(work))
    _save_arrays(folder, {"offsets": offsets, **made.segments._asdict(), "source": made.source})
    _save_arrays(folder, {f"documents.{name}": column for name, column in documents._asdict().items()})
    _save_arrays(folder, {f"plan.{name}": getattr(made, name) for name in _PLAN_ARRAYS})
    _save_arrays(folder, {"inputs": sha256})
    _begin_content(work, made.n_rows)
    arrays = work.files if work.decisive.tokenizer_kind == "integers" else []
    made.notes.extend(notes_on_plan(documents, made, plan_settings(work), arrays))
    facts = {name: getattr(made, name) for name in _PLAN_FACTS}
    write_json(folder / f"{record_name(number)}.json", {**facts, "n_rows": made.n_rows, "problems": problems})


_PLAN_ARRAYS = ("kept", "split", "duplicate_of", "near_duplicate_of")
_PLAN_FACTS = ("split_names", "split_rows", "notes")


def plan_settings(work: Work) -> PlanSettings:
    """What of the settings decides the plan."""
    decisive = {name: getattr(work.decisive, name) for name in PlanSettings._fields if name != "appends"}
    return PlanSettings(**decisive, appends=work.append_to is not None)


def _begin_content(work: Work, n_rows: int) -> None:
    fresh = work.folder / f"content.{uuid.uuid4().hex}"
    layout.create_tokens(fresh, work.decisive, n_rows)
    try:
        fresh.rename(work.folder / "content")
    except OSError:  # there is one: of a plan that was made twice
        shutil.rmtree(fresh)


def write_shard(work: Work, number: int) -> None:
    """Gathers the rows of a shard and writes it, whole."""
    settings, folder = work.decisive, work.folder / "plan"
    first_row = number * settings.rows_per_shard
    stop_row = min(first_row + settings.rows_per_shard, work.n_rows)
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _SEGMENTS}
    part = slice(*np.searchsorted(columns["row"], (first_row, stop_row)))
    places = [columns[name][part].tolist() for name in ("row", "start", "length", "source")]
    dtype = token_dtype(settings.vocab_size)
    rows = np.full((stop_row - first_row, settings.seq_len), settings.eos_id, dtype)
    with ScratchTokens(work.folder / "tokens", np.load(folder / "offsets.npy"), dtype) as tokens:
        for row, begin, length, source in zip(*places, strict=True):
            tokens.read_into(rows[row - first_row, begin : begin + length], source)
    try:
        name, record = layout.write_shard(work.folder / "content", first_row, rows)
    except FileNotFoundError:
        if _is_published(work):  # by others, who did this task too when our claim had expired
            return
        raise DataError(f"{work.folder / 'content'} was removed meanwhile: run the same command again") from None
    write_json(work.folder / "shards" / f"{record_name(number)}.json", {"name": name, **record.model_dump()})


def finish(work: Work, number: int) -> None:
    """Writes all but the tokens, and publishes the store by one rename; a part of a store becomes part of it."""
    record = work.folder / "finish" / f"{record_name(number)}.json"
    with alone(record.with_suffix(".lock")):
        if record.exists():
            return
        if not _is_published(work):
            _publish(work, work.folder / "content")
        if work.append_to is not None:
            store.list_part(work.append_to, work.target.name)
        write_json(record, {})


def _is_published(work: Work) -> bool:
    """Whether the target is there, and is what the plan makes."""
    input_sha256 = hash_files(work.files, work.input_hashes)
    return work.target.exists() and store.is_made(work.target, work.decisive, input_sha256, _shard_records(work))


def _publish(work: Work, content: Path) -> None:
    shards = _shard_records(work)
    layout.check_whole(content, shards)  # before anything is removed for it
    layout.remove_all_but_tokens(content)
    _write_sidecars(work, content, shards)
    if work.append_to is not None and work.target.exists():
        shutil.rmtree(work.target)  # of an append that was killed, and whose work directory was removed
    work.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        content.rename(work.target)
    except OSError as error:
        raise DataError(f"{work.target} appeared while it was being written here: remove it and run again") from error


def _shard_records(work: Work) -> dict[str, FileRecord]:
    shards = [read_json(work.folder / "shards" / f"{record_name(n)}.json") for n in range(work.n_shards)]
    return {shard.pop("name"): FileRecord(**shard) for shard in shards}


def _write_sidecars(work: Work, content: Path, shards: Mapping[str, FileRecord]) -> None:
    settings, files = work.settings, work.files
    documents, made, facts = _load_plan(work.folder / "plan")
    found = [tuple(problem) for problem in facts["problems"]]
    problems = problem_records(documents, made, files, found, drops_duplicates=settings.duplicates != "keep")
    tokenizer = load_tokenizer(settings.tokenizer, settings.vocab_size)
    table = document_records(documents, made, files)
    inputs = [
        InputRecord(file.name, file.n_bytes, sha256) for file, sha256 in zip(files, work.input_hashes, strict=True)
    ]
    signatures = documents.minhash[made.kept] if settings.duplicates == "near" else None
    layout.write_sidecars(content, made.segments, made.n_rows, tokenizer, table, inputs, problems, signatures)
    others = (name for name in layout.list_files(content) if name not in shards)
    records = {**shards, **{name: layout.record_file(content / name) for name in others}}
    manifest = Manifest(
        **work.decisive.model_dump(),
        input_sha256=hash_files(files, work.input_hashes),
        splits=split_records(documents, made),
        problems=count_problems(problems),
        parts={},
        files=dict(sorted(records.items())),
        library_versions=library_versions(settings.duplicates == "near"),
    )
    layout.write_manifest(content, manifest)


def _load_plan(folder: Path) -> tuple[Documents, Plan, dict[str, Any]]:
    facts = read_json(folder / f"{record_name(0)}.json")
    documents = Documents(*(np.load(folder / f"documents.{name}.npy") for name in Documents._fields))
    arrays = {name: np.load(folder / f"{name}.npy") for name in _SEGMENTS}
    made = Plan(
        segments=Segments(*(arrays[name] for name in Segments._fields)),
        source=arrays["source"],
        **{name: np.load(folder / f"plan.{name}.npy") for name in _PLAN_ARRAYS},
        split_names=facts["split_names"],
        split_rows={name: (start, stop) for name, (start, stop) in facts["split_rows"].items()},
        notes=facts["notes"],
    )
    return documents, made, facts


def _save_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        with publishing(folder / f"{name}.npy") as output:
            np.save(output, array)
