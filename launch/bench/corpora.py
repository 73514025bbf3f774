"""Corpora for whoever has none: the sources of Python's standard library, and words that nobody knows."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError


def write_standard_library(folder: Path) -> None:
    """Copy the standard library's sources to `folder`, as .txt files; whole or not at all.

    Left out: what is installed beside it, and the few files that are not UTF-8 (tests of other encodings).
    """
    if folder.exists():
        print(f"{folder} is already there")
        return
    source = Path(sysconfig.get_path("stdlib"))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    n_files = n_bytes = n_skipped = 0
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source)
        if {"site-packages", "dist-packages"} & set(name.parts):
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            n_skipped += 1
            continue
        target = partial / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
        n_files, n_bytes = n_files + 1, n_bytes + len(text)
    if not n_files:
        raise DataError(f"no Python sources in {source}: name a folder of .txt files, make demo CORPUS=path")
    partial.rename(folder)
    print(
        f"{folder}: {n_files} files of Python's standard library, {n_bytes / 1e6:.1f} MB "
        f"({n_skipped} left out: not UTF-8)"
    )


def write_corpus(folder: Path, n_bytes: int) -> None:
    """Words that nobody knows, in one long document, a few shorter ones and many short ones."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz가나다é"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(1, 9, 5000)])
    folder.mkdir()
    shares = [0.5, *[0.1] * 4, *[0.1 / 40] * 40]
    for number, share in enumerate(shares):
        picks = np.minimum(rng.zipf(1.3, int(share * n_bytes / 6)), len(words)) - 1
        text = " ".join(words[picks])
        (folder / f"{number:02d}.txt").write_text(text.replace(" a", "\n"), encoding="utf-8")
