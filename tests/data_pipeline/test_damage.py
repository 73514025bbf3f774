"""Damage is found by `verify` wherever it is, and never becomes wrong tokens."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr

from data_pipeline.errors import DataError
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.store import Store, list_files, record_file, write_manifest
from data_pipeline.verify import verify


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store(rows_per_shard=64)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_bit_flip_in_any_file_is_found(store: Store) -> None:
    rng = random.Random(0)
    for name in list_files(store.path):
        path = store.path / name
        good = path.read_bytes()
        for _ in range(2):
            flip(path, rng.randrange(len(good) * 8))
            problems = verify(store.path)
            assert any(name in problem for problem in problems), name
            path.write_bytes(good)
    assert verify(store.path) == []


def test_bit_flips_never_become_wrong_tokens(make_store: Callable[..., Store]) -> None:
    """In the shard, and in the metadata that says how to read it: an error, or the right tokens."""
    store = make_store(seq_len=1024, rows_per_shard=64)
    rng = random.Random(1)
    rows = range(store.n_rows)
    right = [store.read_row(row) for row in rows]
    shard, metadata = store.path / "tokens/c/0/0", store.path / "tokens/zarr.json"
    caught = 0
    for path, trials in ((shard, 150), (metadata, 50)):
        good = path.read_bytes()
        for _ in range(trials):
            flip(path, rng.randrange(len(good) * 8))
            try:
                fresh = Store.open(store.path)
                for row in rows:
                    try:
                        tokens = fresh.read_row(row)
                    except DataError as error:
                        assert f"row {row} of {store.path}" in str(error)
                        assert str(shard) in str(error)
                        caught += 1
                    else:
                        assert np.array_equal(tokens, right[row])
            except DataError as error:
                assert path == metadata, error
                caught += 1
            path.write_bytes(good)
    assert caught > 150


@pytest.mark.parametrize("name", ["tokens/c/0/0", "valid_tokens/c/0", "documents.jsonl", "tokenizer.model"])
def test_a_missing_file_is_found(store: Store, name: str) -> None:
    (store.path / name).unlink()
    for quick in (True, False):
        assert any(f"{name} is missing" in problem for problem in verify(store.path, quick))
    with pytest.raises(DataError, match=rf"{name} is missing: restore it"):
        Store.open(store.path)


def test_a_truncated_shard_is_found(store: Store) -> None:
    path = store.path / "tokens/c/0/0"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    assert f"has {len(data) - 100} bytes instead of {len(data)}" in verify(store.path, quick=True)[0]
    with pytest.raises(DataError, match=r"tokens/c/0/0 has .* bytes instead of"):
        Store.open(store.path)
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DataError, match=r"row 0 .*tokens/c/0/0"):
            Store(store.path, store.manifest).read_row(0)


def test_a_shard_that_vanishes_while_it_is_used(store: Store) -> None:
    store.read_row(0)
    (store.path / "tokens/c/0/0").unlink()
    with pytest.raises(DataError, match=r"row 1 of .* is missing from shard"):
        store.read_row(1)


def test_every_problem_is_reported(store: Store) -> None:
    flip(store.path / "tokens/c/0/0", 800)
    (store.path / "token_bytes/c/0").unlink()
    (store.path / "stray").write_text("")
    problems = "\n".join(verify(store.path))
    for problem in ("tokens/c/0/0 is damaged", "token_bytes/c/0 is missing", "stray is no part of the store"):
        assert problem in problems


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format_version": 1}'])
def test_a_broken_manifest(store: Store, content: bytes) -> None:
    (store.path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        Store.open(store.path)


def test_a_changed_manifest(store: Store) -> None:
    """Still valid in form, but not what was written."""
    path = store.path / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"seq_len": 256', b'"seq_len": 257'))
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        Store.open(store.path)


def test_a_manifest_of_another_version(store: Store) -> None:
    path = store.path / MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 9'))
    with pytest.raises(DataError, match="has format version 9, this version reads 1"):
        Store.open(store.path)


def forge(store: Store, name: str, change: Callable[[np.ndarray], None]) -> None:
    """Changes an array and signs the result, as a bug in the build would have."""
    array = zarr.open_group(store.path, mode="r+")[name]
    values = array[:]
    change(values)
    array[:] = values
    files = {name: record_file(store.path / name) for name in list_files(store.path) if name != MANIFEST_NAME}
    write_manifest(store.path, store.manifest.model_copy(update={"files": files}))


def put(place: tuple[int, ...] | int, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tokens", put((0, 5), 3), "does not decode to its source"),
        ("tokens", put((0, 5), 60_000), "row 0 .* is missing from shard"),
        ("tokens", put((-1, -1), 3), "is not padded with EOS"),
        ("valid_tokens", put(0, 7), "the segments of row 0 do not cover its valid tokens"),
        ("segments/start", put(0, 1), "the segments of row 0 leave gaps or overlap"),
        ("segments/length", put(0, 9), "the segments of row 0"),
        ("segments/document_start", put(0, 9), "is not covered exactly once"),
        ("segments/document", lambda values: np.add.at(values, 0, 1), "is not covered exactly once"),
        ("segments/document", put(0, 999), "documents that are not in its table"),
    ],
)
def test_content_that_does_not_fit_together(
    store: Store, name: str, change: Callable[[np.ndarray], None], message: str
) -> None:
    forge(store, name, change)
    problems = verify(store.path)
    assert any(re.search(message, problem) for problem in problems), problems


def test_layout_that_does_not_fit_the_manifest(store: Store) -> None:
    other = store.manifest.model_copy(update={"rows_per_shard": 32})
    write_manifest(store.path, other)
    assert any("has shards (64, 256) instead of (32, 256)" in problem for problem in verify(store.path))


def test_a_copied_store_is_the_same(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "copy.zarr")
    assert Manifest.read(copy).fingerprint == store.manifest.fingerprint
    assert verify(copy) == []
