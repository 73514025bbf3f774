"""Where the files of an input are: a file, a folder, a glob, a list of these, or an fsspec URL of one.

What is hidden, or in a store, is left out of folders and of what globs match.
"""

import glob
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.kinds import Wanted
from data_pipeline.manifest import STORE_FILES
from data_pipeline.output import as_path
from data_pipeline.urls import described, file_system, mtime_ns


class Found(NamedTuple):
    """A file before it has its name: `below` is its path below the place where it was looked for."""

    below: str
    location: str
    n_bytes: int
    mtime_ns: int | None


def find(source: str, wanted: Wanted) -> Iterator[Found]:
    """The files of an input. Raises DataError where there are none, or one cannot be read."""
    if source.startswith("@"):
        return _find_listed(source, wanted)
    source = source.removeprefix("file://")
    if "://" in source:
        return _find_remote(source, wanted)
    if source.startswith("~"):
        source = str(as_path(source))
    path = Path(source).absolute()
    if path.is_dir():
        return _find_in_folder(path, wanted)
    if not path.exists() and glob.has_magic(source):
        return _find_matches(str(Path(source)))
    if not path.exists():
        raise DataError(f"input {source} does not exist: expected a file, a folder, a glob, @LIST or a URL")
    return iter([_stat(path.name, str(path))])


def _find_listed(source: str, wanted: Wanted) -> Iterator[Found]:
    """The inputs that stand in a file. Each is named as it stands there: many listed files may share a last name."""
    try:
        lines = as_path(source[1:]).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list of inputs {source[1:]}: {error}") from error
    inputs = [line.strip() for line in lines if line.strip()]
    if not inputs:
        raise DataError(f"the list of inputs {source[1:]} is empty: expected a path or URL on each line")
    for line in inputs:
        if line.startswith("@"):
            raise DataError(f"the list of inputs {source[1:]} names the list {line}: a list holds paths and URLs only")
        folder = _listed_folder(line)
        try:
            files = list(find(line, wanted))
        except DataError as error:
            paths = "" if "://" in line else ", whose paths are relative to the working directory"
            raise DataError(f"{error} (of the list {source[1:]}{paths})") from None
        for found in files:
            yield found._replace(below=posixpath.join(folder, found.below))


def _listed_folder(line: str) -> str:
    """Where the files of a listed input are below, as a relative path."""
    path = posixpath.normpath(line.partition("://")[2] or line)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    if glob.has_magic(path):
        return "/".join(parts[: _first_magic(parts)])
    return "/".join(parts if "://" not in line and Path(line).is_dir() else parts[:-1])


def _first_magic(parts: Sequence[str]) -> int:
    return next(number for number, part in enumerate(parts) if glob.has_magic(part))


def _find_in_folder(folder: Path, wanted: Wanted) -> Iterator[Found]:
    n_found = 0
    pending = [(str(folder), "")]
    while pending:
        location, below = pending.pop()
        try:
            entries = list(os.scandir(location))
        except OSError as error:
            raise DataError(f"cannot read folder {location}: {error.strerror}") from error
        if {*STORE_FILES} <= {entry.name for entry in entries}:
            continue  # its tables are no documents
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.is_symlink():
                    raise DataError(
                        f"{entry.path} is a link to a folder: name that folder as an input of its own, or remove the "
                        "link"
                    )
                pending.append((entry.path, f"{below}{entry.name}/"))
            elif wanted.has(entry.path, str(folder)):
                n_found += 1
                yield _stat(below + entry.name, entry.path)
    if not n_found:
        raise _nothing_in(str(folder), wanted)


def _nothing_in(folder: str, wanted: Wanted) -> DataError:
    kinds = ".npy or .npz" if wanted.arrays else ".txt, .jsonl, .parquet or FASTA"
    return DataError(
        f"no {kinds} files in {folder}: expected at least one, in it or below it, compressed or not. A file of another "
        "kind can be named directly"
    )


def _find_matches(pattern: str) -> Iterator[Found]:
    parts = pattern.split("/")
    root = "/".join(parts[: _first_magic(parts)])
    found = (path for path in glob.iglob(pattern, recursive=True) if not Path(path).is_dir())  # noqa: PTH207 (absolute)
    paths = _outside_stores(found, root, os.path.exists)
    if not paths:
        raise DataError(f"no file matches {pattern}: expected at least one, hidden ones and those in stores aside")
    return (_stat(path.removeprefix(root).lstrip("/"), str(Path(path).absolute())) for path in paths)


def _stat(below: str, path: str) -> Found:
    try:
        status = os.stat(path)  # noqa: PTH116 (a Path for each of a million files takes seconds)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file: leave it out of the corpus")
    return Found(below, path, status.st_size, status.st_mtime_ns)


def _find_remote(url: str, wanted: Wanted) -> Iterator[Found]:
    system, path = file_system(url)
    try:
        if system.isfile(path):
            root, infos = posixpath.dirname(path), {path: system.info(path)}
        elif glob.has_magic(path):
            parts = path.split("/")
            root, infos = "/".join(parts[: _first_magic(parts)]), system.glob(path, detail=True)
            asked = _is_hidden(path.removeprefix(root))
            shown = [path for path in infos if asked or not _is_hidden(path.removeprefix(root))]
            infos = {path: infos[path] for path in _outside_stores(shown, root, system.exists)}
        else:
            root, infos = path, system.find(path, detail=True)
            shown = [path for path, info in infos.items() if not _is_hidden(path.removeprefix(root))]
            infos = {
                path: infos[path]
                for path in _outside_stores(shown, root, infos.__contains__)
                if infos[path]["type"] == "file" and wanted.has(system.unstrip_protocol(path), url)
            }
    except Exception as error:  # storage clients raise errors of their own
        raise DataError(f"cannot list {url}: {described(error)}") from error
    infos = {path: info for path, info in infos.items() if info["type"] == "file"}
    if not infos:
        raise _nothing_in(url, wanted)
    for path, info in infos.items():
        if info["size"] is None:
            raise DataError(f"the size of {path} in {url} is not known, and it is needed: copy the file to a disk")
        location = system.unstrip_protocol(path)
        yield Found(path.removeprefix(root).lstrip("/"), location, info["size"], mtime_ns(info))


def _is_hidden(below: str) -> bool:
    return any(part.startswith(".") for part in below.split("/"))


def _outside_stores(paths: Iterable[str], root: str, exists: Callable[[str], bool]) -> list[str]:
    """Those of files below `root` that are in no store."""

    @cache
    def is_inside(folder: str) -> bool:
        is_store = all(exists(posixpath.join(folder, name)) for name in STORE_FILES)
        above = posixpath.dirname(folder)
        return is_store or (len(root) <= len(above) < len(folder) and is_inside(above))

    return [path for path in paths if not is_inside(posixpath.dirname(path))]
