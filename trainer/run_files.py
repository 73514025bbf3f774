"""What is in the folder of a run, and how two of its files are read: run.json, what the run is, and metrics.jsonl, what
it has reported.

record.py and metrics.py write them and say what is in them; they need DeepSpeed and TensorBoard, which readers do
without. A run may go on meanwhile, so the last line of metrics.jsonl may be on its way, or cut short by a kill: it
counts once its end is there.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from reformer.config import ConfigError

RECORD, METRICS, LOCK = "run.json", "metrics.jsonl", "lock"
CHECKPOINTS, TENSORBOARD, PROFILE, RANKS, STACKS = "checkpoints", "tensorboard", "profile", "ranks", "stacks"
BEFORE = "before"
"""What resumes have replaced."""
RUN_FILES = {RECORD, METRICS, LOCK, CHECKPOINTS, TENSORBOARD, PROFILE, RANKS, STACKS}
"""What tells a run's folder from others."""
TAIL_BYTES = 2**22
"""Thousands of lines of metrics.jsonl."""

Line = dict[str, Any]
"""Of metrics.jsonl: `step`, and by tag what was reported of it; None for what was not finite."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace a file, which no other process writes, at once: readers find the former content or this one.

    Raises OSError.
    """
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    partial.replace(path)


def read_record(run_dir: Path) -> dict[str, Any]:
    """The object of run.json, which has the configuration at least.

    Raises ConfigError where there is none, or it is damaged.
    """
    file = run_dir / RECORD
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _no_run(file, error) from None
    try:
        record = json.loads(content)
        if not (isinstance(record, dict) and isinstance(record.get("config"), dict)):
            raise ValueError("no object with a config")
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    return record


def read_metrics(run_dir: Path) -> list[Line]:
    """All lines of metrics.jsonl. Raises ConfigError where there is no such file, or a line is damaged."""
    file, lines = run_dir / METRICS, []
    for number, line in enumerate(_whole_lines(file), start=1):
        try:
            lines.append(_parsed(line))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged in its line {number}: {error}") from None
    return lines


def read_metrics_tail(run_dir: Path, n_bytes: int = TAIL_BYTES) -> list[Line]:
    """The lines in so many bytes at the end of metrics.jsonl, none without that file; what is damaged is left out.

    Raises ConfigError where it cannot be read.
    """
    try:
        with (run_dir / METRICS).open("rb") as file:
            begin = max(0, file.seek(0, 2) - n_bytes)
            file.seek(begin)
            candidates = file.read().split(b"\n")[bool(begin) : -1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from None
    lines = []
    for line in candidates:
        with suppress(ValueError):
            lines.append(_parsed(line))
    return lines


def _whole_lines(file: Path) -> Iterator[bytes]:
    """One at a time, without their ends. Raises ConfigError where the file cannot be read."""
    try:
        with file.open("rb") as content:
            for line in content:
                if not line.endswith(b"\n"):  # what is read after it, of a run that goes on, would be its other part
                    return
                yield line[:-1]
    except OSError as error:
        raise _no_run(file, error) from None


def _no_run(file: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{file.parent} is not the folder of a run: cannot read {file}: {error.strerror}")


def _parsed(line: bytes) -> Line:
    """Raises ValueError for what is no line of metrics.jsonl."""
    # parse_constant: NaN and the like, which are no JSON.
    values = json.loads(line, object_pairs_hook=_by_shared_names, parse_constant=lambda _: None)
    if not (isinstance(values, dict) and isinstance(values.get("step"), int)):
        raise ValueError("no object with a step")
    return values


def _by_shared_names(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. All share the strings of their names, which would be two thirds of the memory (measured)."""
    return {sys.intern(name): value for name, value in pairs}
