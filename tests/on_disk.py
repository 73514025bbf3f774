"""Files of tests: what a folder holds, damage, and small disks."""

import errno
import subprocess
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


def resize(disk: Path, n_bytes: int) -> None:
    """Gives the fixture `small_disk` another size."""
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room that there is on the fixture `small_disk`."""
    resize(disk, 1 << 20)
    with (disk / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return disk / "filler"
