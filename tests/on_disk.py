"""Files of tests: what a folder holds, and damage."""

from pathlib import Path

from data_pipeline.layout import list_files


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder and below it, by its path there."""
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Change a bit of a file; bytes below 0 count from its end."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)
