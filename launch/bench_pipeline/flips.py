"""Flipped bits in a store: the part `flips` of `python launch/benchmark.py pipeline-faults`.

One bit of one file of a small store, of any file, drawn half of the time by size and half of the time evenly. `verify`
must find it, and whoever reads the store must get what is right, or an error.
"""

import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench.corpora import write_corpus

from data_pipeline.errors import DataError
from data_pipeline.store import Store, list_files
from data_pipeline.verify import verify


@dataclass(frozen=True)
class Flip:
    """One flipped bit, and who noticed."""

    file: str
    bit: int
    verify: str
    """What `verify` found: "named" the file, "other" problems only, or "nothing"."""
    reading: str
    """What reading everything gave: "error", "right" values, or "wrong" ones."""


def read_all(path: Path) -> list[np.ndarray]:
    """Every row and every table. Raises DataError, and nothing else, where one cannot be had."""
    store = Store.open(path)
    rows = [store.read_row(row) for row in range(store.n_rows)]
    tables = [store.valid_tokens, *store.segments, store.token_bytes, store.tokenizer.token_bytes]
    records = (*store.documents, *store.inputs, *store.problems)
    return [*rows, *tables, np.array([str(record) for record in records])]


def small_store(folder: Path) -> Path:
    """A store of a few shards, with everything that a store can have: splits, problems, an appended part."""
    write_corpus(folder / "corpus", 60_000)
    (folder / "more").mkdir()
    (folder / "more" / "late.txt").write_text("This document came later.\n" * 200)
    (folder / "more" / "empty.txt").write_text("")
    program = [sys.executable, "-m", "data_pipeline"]
    model, store = str(folder / "small.model"), str(folder / "store")
    corpus, more = ["--input", str(folder / "corpus")], ["--input", str(folder / "more")]
    sizes = ["--seq-len", "512", "--rows-per-shard", "16", "--split", "val=0.2"]
    build = ["build", "--tokenizer", model, "--output", store, "--workers", "1", *sizes]
    for words in (
        ["tokenizer", *corpus, "--output", model, "--vocab-size", "600"],
        [*build, *corpus],
        [*build, *more, "--append"],
    ):
        subprocess.run([*program, *words], check=True, capture_output=True)
    return Path(store)


def draw_bit(sizes: Mapping[str, int], rng: random.Random) -> tuple[str, int]:
    """A file that is not empty, by its size or evenly, and a bit of it."""
    names = [name for name, size in sizes.items() if size]
    weights = [sizes[name] for name in names] if rng.random() < 0.5 else [1] * len(names)
    name = rng.choices(names, weights)[0]
    return name, rng.randrange(8 * sizes[name])


def flip_once(store: Path, name: str, bit: int, right: list[np.ndarray]) -> Flip:
    """Flips a bit, looks who notices, and flips it back."""
    path = store / name
    good = path.read_bytes()
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        problems = verify(store)
        found = "named" if any(name in problem for problem in problems) else "other" if problems else "nothing"
        try:
            same = all(np.array_equal(a, b) for a, b in zip(read_all(store), right, strict=True))
            reading = "right" if same else "wrong"
        except DataError:
            reading = "error"
    finally:
        path.write_bytes(good)
    return Flip(name, bit, found, reading)


def flips(times: int, seed: int) -> list[Flip]:
    """So many flips in a small store; a table on stdout."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="longhand-flips-") as name:
        store = small_store(Path(name))
        right = read_all(store)
        sizes = {name: (store / name).stat().st_size for name in list_files(store)}
        results = [flip_once(store, *draw_bit(sizes, rng), right) for _ in range(times)]
        if problems := verify(store):
            raise SystemExit(f"error: the store was not put back as it was: {problems}")
    print(flips_table(results, sizes))
    return results


def flips_table(results: Sequence[Flip], sizes: Mapping[str, int]) -> str:
    """A line for each file."""
    rows = [f"{'file':<40}{'bytes':>8}{'flips':>7}  {'verify':<22}reading"]
    for name in sizes:
        mine = [result for result in results if result.file == name]
        columns = (Counter(result.verify for result in mine), Counter(result.reading for result in mine))
        verified, read = (", ".join(f"{what} {n}" for what, n in sorted(column.items())) for column in columns)
        rows.append(f"{name:<40}{sizes[name]:>8,}{len(mine):>7}  {verified:<22}{read}")
    missed = sum(result.verify == "nothing" for result in results)
    wrong = sum(result.reading == "wrong" for result in results)
    rows.append(f"{len(results)} flips: {missed} not found by verify, {wrong} gave wrong values")
    return "\n".join(rows)
