"""Where everything goes: from the columns of the tokenized parts to documents, splits and rows, by pure functions.

Arrays only, a few hundred bytes per document: a million documents of a terabyte take seconds.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline import duplicates
from data_pipeline.duplicates import Known
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile
from data_pipeline.manifest import DocumentRecord, ProblemRecord, SplitRecord
from data_pipeline.packing import Segments, pack
from data_pipeline.scratch import PROBLEMS, Columns
from data_pipeline.splits import assign_splits


class PlanSettings(NamedTuple):
    """What of a build's settings decides its plan."""

    seq_len: int
    packing: str
    stride: int
    bos: bool
    eos: bool
    split: Mapping[str, float]
    appends: bool
    """Whether the documents are added to a store, which has its splits."""
    duplicates: str
    near_threshold: float


class Documents(NamedTuple):
    """All documents that were found, in the order of the corpus: arrays [n]."""

    file: np.ndarray
    record: np.ndarray
    """int64: number of the record in its file, -1 where the file is the document."""
    n_bytes: np.ndarray
    n_tokens: np.ndarray
    n_byte_fallback: np.ndarray
    scratch_start: np.ndarray
    """int64: place of the first token in the scratch tokens."""
    bad: np.ndarray
    replaced: np.ndarray
    sha256: np.ndarray
    """uint8 [n, 32]"""
    minhash: np.ndarray
    """uint32 [n, N_PERMUTATIONS], or [n, 0]"""


class Plan(NamedTuple):
    """The decisions: arrays over the documents that are kept, numbered anew, and over segments."""

    segments: Segments
    """In rows; documents by their new numbers."""
    source: np.ndarray
    """int64 [n_segments]: place of each segment's first token in the scratch tokens."""
    kept: np.ndarray
    """int64 [n]: the documents that are kept, as numbered in `Documents`."""
    split: np.ndarray
    """int64 [n]: the split of each, by its number in `split_names`."""
    duplicate_of: np.ndarray
    """int64 [all documents]: the one that it repeats, see `_find_duplicates`; -1 none, -2 one that the store has."""
    near_duplicate_of: np.ndarray
    """int64 [all documents]: the same, for near-duplicates."""
    split_names: list[str]
    split_rows: dict[str, tuple[int, int]]
    """Rows [start, stop) of each split that has any, "train" first."""
    notes: list[str]
    """For the user."""

    @property
    def n_rows(self) -> int:
        return int(self.segments.row[-1]) + 1 if len(self.segments.row) else 0


def merge_parts(columns: Columns) -> Documents:
    """The documents, each out of its parts."""
    starts = np.flatnonzero(columns.first)
    file = columns.file[starts]
    first_of_file = np.searchsorted(file, file)
    record = np.where(columns.record[starts] < 0, -1, np.arange(len(starts)) - first_of_file)
    offsets = np.cumsum(columns.n_tokens) - columns.n_tokens
    minhash = columns.minhash
    if minhash.size and len(starts) < len(minhash):
        minhash = np.minimum.reduceat(minhash, starts, axis=0)

    def total(column: np.ndarray) -> np.ndarray:
        return np.add.reduceat(column, starts) if len(starts) else column

    def largest(column: np.ndarray) -> np.ndarray:
        return np.maximum.reduceat(column, starts) if len(starts) else column

    return Documents(
        file=file,
        record=record,
        n_bytes=total(columns.n_bytes),
        n_tokens=total(columns.n_tokens),
        n_byte_fallback=total(columns.n_byte_fallback),
        scratch_start=offsets[starts],
        bad=largest(columns.bad),
        replaced=largest(columns.replaced),
        sha256=columns.sha256[starts],
        minhash=minhash,
    )


def make_plan(documents: Documents, given_split: np.ndarray, known: Known, settings: PlanSettings) -> Plan:
    """Decides which documents are kept, in which split, and where in which row.

    given_split str [n_files]: the split that a file's documents form, or "" where the settings' split decides. Raises
    DataError when a split cannot be made, or no document is left; but for what is appended, which may be nothing new.
    """
    if not len(documents.file) and not settings.appends:
        raise DataError(
            "the inputs hold no documents: their arrays have no items (a first dimension of 0), or their files no "
            "records. Add some"
        )
    good = documents.bad == 0
    given = given_split[documents.file]
    same, near = _find_duplicates(documents, good, given, known, settings)
    dropped = ~good
    if settings.duplicates != "keep":
        dropped |= (same != -1) | (near != -1)
    if not settings.appends:
        options = np.unique(given_split)  # of files, which may have no documents
        for name in options:
            option = f" of --{name}-input" if name else " of --input" if len(options) > 1 else ""
            _check_left(option, documents.bad[given == name], dropped[given == name], settings)
    kept = np.flatnonzero(~dropped)
    split, names, notes = _assign(documents.sha256[kept], given[kept], settings)
    segments, split_rows = _pack_splits(documents.n_tokens[kept], split, names, settings)
    source = documents.scratch_start[kept][segments.document] + segments.document_start
    return Plan(segments, source, kept, split, same, near, names, split_rows, notes)


def _check_left(option: str, bad: np.ndarray, dropped: np.ndarray, settings: PlanSettings) -> None:
    """Raises DataError where all documents of an option are dropped; bad: as in `Documents`."""
    if not dropped.all():
        return
    if not len(bad):
        raise DataError(f"the files{option} hold no documents: add some")
    problems = Counter(PROBLEMS[number - 1] for number in bad[bad > 0].tolist())
    reasons = [f"{n:,} with the problem {problem}" for problem, n in problems.items()]
    ways_out = ["--on-bad"] if problems else []
    if "empty" in problems and not (settings.bos or settings.eos):
        ways_out += ["--no-bos", "--no-eos"]
    if n_copies := int((bad == 0).sum()):
        reasons.append(f"{n_copies:,} duplicates")
        ways_out.append("--duplicates")
    raise DataError(
        f"no document{option} is left of the {len(bad):,} that were found: {' and '.join(reasons)}. Change "
        f"{' or '.join(ways_out)}, or add documents"
    )


def _find_duplicates(
    documents: Documents, good: np.ndarray, given: np.ndarray, known: Known, settings: PlanSettings
) -> tuple[np.ndarray, np.ndarray]:
    """For each document the first one that it repeats, exactly and nearly. Documents without a byte repeat none.

    Those that are held out come first, of test before val, whatever their names: it is other copies that go.
    """
    same = np.full(len(good), -1, np.int64)
    near = same.copy()
    candidates = np.flatnonzero(good & (documents.n_bytes > 0))
    rank = np.select([given == "test", given == "val"], [0, 1], 2)
    candidates = candidates[np.argsort(rank[candidates], kind="stable")]
    same[candidates] = _renumber(duplicates.exact(documents.sha256[candidates], known.sha256), candidates)
    if settings.duplicates == "near":
        candidates = candidates[same[candidates] == -1]
        every = np.array_equal(candidates, np.arange(len(good)))  # then without a copy: 512 MB for a million documents
        minhash = documents.minhash if every else documents.minhash[candidates]
        found = duplicates.near(minhash, settings.near_threshold, known.signatures)
        near[candidates] = _renumber(found, candidates)
    return same, near


def _renumber(found: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Numbers among the candidates as numbers among all documents; negative ones as they are."""
    return np.where(found < 0, found, candidates[np.maximum(found, 0)]) if len(candidates) else found


def _assign(sha256: np.ndarray, given: np.ndarray, settings: PlanSettings) -> tuple[np.ndarray, list[str], list[str]]:
    """The split of each document: --val-input and --test-input decide for their own, the hash for the rest."""
    codes = np.zeros(len(sha256), np.int64)
    names = ["train"]
    notes: list[str] = []
    drawn = given == ""
    if settings.split:
        codes[drawn], names, notes = assign_splits(sha256[drawn], settings.split, not settings.appends)
    for name in np.unique(given[~drawn]):
        names = [*names, str(name)]  # which --split cannot name as well
        codes[given == name] = len(names) - 1
    return codes, names, notes


def _pack_splits(
    lengths: np.ndarray, split: np.ndarray, names: Sequence[str], settings: PlanSettings
) -> tuple[Segments, dict[str, tuple[int, int]]]:
    """Lays documents of `lengths` [n] tokens into rows; each split has rows of its own."""
    parts, split_rows, first_row = [], {}, 0
    for code, name in enumerate(names):
        members = np.flatnonzero(split == code)
        part = pack(lengths[members], settings.seq_len, settings.packing, settings.stride)
        if not len(part.row):
            continue
        parts.append(part._replace(row=part.row + first_row, document=members[part.document]))
        split_rows[name] = (first_row, int(parts[-1].row[-1]) + 1)
        first_row = split_rows[name][1]
    if not parts:  # of what is appended
        return pack(lengths[:0], settings.seq_len, settings.packing, settings.stride), {}
    return Segments(*map(np.concatenate, zip(*parts, strict=True))), split_rows


def document_records(documents: Documents, plan: Plan, files: Sequence[InputFile]) -> Iterator[DocumentRecord]:
    """The table of the documents that are kept."""
    for number, index in enumerate(plan.kept.tolist()):
        yield DocumentRecord(
            id=number,
            name=files[documents.file[index]].document_name(int(documents.record[index])),
            n_bytes=int(documents.n_bytes[index]),
            sha256=documents.sha256[index].tobytes().hex(),
            split=plan.split_names[plan.split[number]],
            tokens=int(documents.n_tokens[index]),
        )


def problem_records(
    documents: Documents,
    plan: Plan,
    files: Sequence[InputFile],
    problems: Sequence[tuple[int, str, str, str]],
    drops_duplicates: bool,
) -> list[ProblemRecord]:
    """What was wrong with which document, in the order of the corpus.

    problems: (document, problem, policy, detail) as the tasks met them.
    """

    def name(index: int) -> str:
        return files[documents.file[index]].document_name(int(documents.record[index]))

    found: dict[tuple[int, str], ProblemRecord] = {}
    for index, problem, _, detail in problems:  # one of each kind: a document may be in many parts
        action = "dropped" if documents.bad[index] else "replaced"
        found.setdefault((index, problem), ProblemRecord(name(index), problem, action, detail))
    action = "dropped" if drops_duplicates else "kept"
    for kind, originals in (("duplicate", plan.duplicate_of), ("near-duplicate", plan.near_duplicate_of)):
        for index in np.flatnonzero(originals != -1).tolist():
            original = int(originals[index])
            detail = f"of {name(original)}" if original >= 0 else "of a document that the store held before"
            found[index, kind] = ProblemRecord(name(index), kind, action, detail)
    return [found[key] for key in sorted(found)]


def split_records(documents: Documents, plan: Plan) -> dict[str, SplitRecord]:
    """What each split that has rows holds."""
    segments = plan.segments
    records = {}
    for name, (start, stop) in plan.split_rows.items():
        members = plan.kept[plan.split == plan.split_names.index(name)]
        rows = slice(*np.searchsorted(segments.row, (start, stop)))
        row, document = segments.row[rows], segments.document[rows]
        mixed = np.unique(row[1:][(row[1:] == row[:-1]) & (document[1:] != document[:-1])])
        records[name] = SplitRecord(
            rows=((start, stop),),
            documents=len(members),
            n_bytes=int(documents.n_bytes[members].sum()),
            tokens=int(documents.n_tokens[members].sum()),
            byte_fallback_tokens=int(documents.n_byte_fallback[members].sum()),
            placed_tokens=int(segments.length[rows].sum()),
            mixed_rows=len(mixed),
        )
    return records


def count_problems(problems: Sequence[ProblemRecord]) -> dict[str, int]:
    """How often each problem met each action, by "problem/action"."""
    return dict(sorted(Counter(f"{problem.problem}/{problem.action}" for problem in problems).items()))
