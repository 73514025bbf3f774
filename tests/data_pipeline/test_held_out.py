"""What is held out by --val-input is not trained on: neither the same file, nor a copy of a document."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import DataError
from data_pipeline.files import find_files


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """An empty file system behind memory://."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def names(*inputs: object) -> list[str]:
    return [file.name for file in find_files([str(source) for source in inputs], [], False)]


# The same file


def test_a_file_is_either_trained_on_or_held_out(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    write(tmp_path / "in/a.txt")
    write(tmp_path / "in/valid/v.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "valid")
    memory.pipe({"/in/a.txt": b"text", "/in/valid/v.txt": b"text"})
    inside = tmp_path / "in"
    for train, held_out in (
        (inside, inside / "valid"),
        (inside, tmp_path / "link"),
        (inside, f"{tmp_path}/in/../in/v*/*.txt"),
        ("memory://in", "memory://in/valid"),
    ):
        with pytest.raises(DataError, match=r"in/valid/v.txt by --input, named 'valid/v.txt', and .*v.txt by --val-in"):
            find_files([str(train)], [str(held_out)], False)
    files = find_files([f"{inside}/*.txt"], [str(inside / "valid")], False)
    assert [(file.name, file.held_out) for file in files] == [("a.txt", False), ("v.txt", True)]


@pytest.mark.parametrize("link", ["b.txt", "deep/b.txt"])
def test_a_file_that_is_given_twice_is_an_error(tmp_path: Path, link: str) -> None:
    """By a link to it, or by itself and its folder. A copy is another file."""
    folder, path = tmp_path / "in", write(tmp_path / "in/deep/a.txt")
    with pytest.raises(DataError, match=r"deep/a.txt by --input, named 'a.txt', .* Give it once: leave out one of"):
        names(folder, path)
    write(folder / link)
    assert names(folder) == sorted(["deep/a.txt", link])
    (folder / link).unlink()
    (folder / link).symlink_to(path)
    with pytest.raises(DataError, match=rf"one file comes in twice: .*/{link} by --input"):
        names(folder)
