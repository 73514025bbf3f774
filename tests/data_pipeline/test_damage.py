"""Damage is found by `verify` wherever it is, and never becomes wrong tokens."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from on_disk import flip
from small_stores import write_store

from data_pipeline.errors import DataError
from data_pipeline.layout import list_files, record_file, write_manifest
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ProblemRecord
from data_pipeline.part import StorePart
from data_pipeline.store import Store, list_part, part_path
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify

TEXT = "The quick brown fox jumps over the lazy dog, and then, being a fox, it does so again. 태초에\n"
DOCUMENTS = {f"{number}.txt": (TEXT * number).encode() for number in range(1, 9)}
PROBLEM = ProblemRecord("gone.txt", "encoding", "dropped", "byte 3 is 0xe9")


@pytest.fixture
def store(tmp_path: Path, tokenizer_file: Path) -> Store:
    """One shard; as a build has it that found a bad document."""
    path = tmp_path / "store"
    tokenizer = load_tokenizer(str(tokenizer_file))
    write_store(path, DOCUMENTS, tokenizer, val=["3.txt"], problems=[PROBLEM], seq_len=256, rows_per_shard=64)
    return Store.open(path)


@pytest.fixture
def grown(tmp_path: Path) -> Store:
    """A few shards, and as many in an appended part."""
    path = tmp_path / "grown"
    write_store(path, DOCUMENTS, val=["3.txt"], problems=[PROBLEM], seq_len=1024, rows_per_shard=2)
    write_store(
        part_path(path, "0001"), {"new.txt": TEXT.encode() * 30}, problems=[PROBLEM], seq_len=1024, rows_per_shard=2
    )
    list_part(path, "0001")
    return Store.open(path)


@pytest.mark.parametrize("which", ["store", "grown"])
def test_a_bit_flip_in_any_file_is_found(request: pytest.FixtureRequest, which: str) -> None:
    store = request.getfixturevalue(which)
    rng = random.Random(0)
    names = list_files(store.path)
    assert {"inputs.jsonl", "problems.jsonl", MANIFEST_NAME} < set(names)
    for name in names:
        path = store.path / name
        good = path.read_bytes()
        flip(path, rng.randrange(len(good)), rng.randrange(8))
        problems = verify(store.path)
        assert any(name in problem for problem in problems), name
        path.write_bytes(good)
    assert verify(store.path) == []


def test_bit_flips_never_become_wrong_tokens(grown: Store) -> None:
    """Wherever a bit is flipped, reading gives an error, or what was written."""
    rng = random.Random(1)
    rows = range(grown.n_rows)
    right = [(grown.read_row(row), grown.segments_of(row)) for row in rows]
    files = [grown.path / name for name in list_files(grown.path)]
    caught = 0
    for trial in range(100):
        path = files[trial % len(files)]
        good = path.read_bytes()
        flip(path, rng.randrange(len(good)), rng.randrange(8))
        try:
            fresh = Store.open(grown.path)
            for row in rows:
                try:
                    tokens, segments = fresh.read_row(row), fresh.segments_of(row)
                except DataError as error:
                    assert str(path.relative_to(grown.path)).split("/c/")[0] in str(error)
                    caught += 1
                else:
                    assert np.array_equal(tokens, right[row][0])
                    assert np.array_equal(segments, right[row][1])
        except DataError as error:
            assert str(path) in str(error)
            caught += 1
        path.write_bytes(good)
    assert caught > 50


def test_bit_flips_in_a_shard_are_errors_that_name_row_and_shard(store: Store) -> None:
    rng = random.Random(2)
    right = [store.read_row(row) for row in range(store.n_rows)]
    shard = store.path / "tokens/c/0/0"
    good = shard.read_bytes()
    caught = 0
    for _ in range(60):
        flip(shard, rng.randrange(len(good)), rng.randrange(8))
        for row, expected in enumerate(right):
            try:
                tokens = Store(store.path, store.manifest).read_row(row)
            except DataError as error:
                assert f"row {row} of {store.path}" in str(error)
                assert str(shard) in str(error)
                caught += 1
            else:
                assert np.array_equal(tokens, expected)
        shard.write_bytes(good)
    assert caught >= 55


def test_of_rows_that_are_read_at_once_the_damaged_one_is_named(grown: Store) -> None:
    part = grown.parts[1]
    rows = np.arange(part.first_row, part.stop_row)[[0, 2]]
    assert np.array_equal(part.read_chosen(rows), [grown.read_row(row) for row in rows])
    flip(part.path / "tokens/c/1/0", 20, 3)
    with pytest.raises(DataError, match=re.escape(f"row {rows[1]} of {part.path} is damaged in shard {part.path}")):
        StorePart(part.path, part.manifest, part.first_row, part.first_document).read_chosen(rows)


@pytest.mark.parametrize(
    "name",
    [
        "tokens/c/0/0",
        "valid_tokens/c/0",
        "documents.jsonl",
        "inputs.jsonl",
        "problems.jsonl",
        "tokenizer.model",
    ],
)
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
    flip(store.path / "tokens/c/0/0", 100)
    (store.path / "token_bytes/c/0").unlink()
    (store.path / "stray").write_text("")
    problems = "\n".join(verify(store.path))
    for problem in ("tokens/c/0/0 is damaged", "token_bytes/c/0 is missing", "stray is no part of the store"):
        assert problem in problems


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format_version": 2}'])
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
    path.write_bytes(path.read_bytes().replace(b'"format_version": 2', b'"format_version": 9'))
    with pytest.raises(DataError, match="has format version 9, this version reads 2"):
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
        ("tokens", put((0, 5), 30), "does not decode to its source"),
        ("tokens", put((0, 5), 1), "row 0 .* does not mark where documents begin and end"),
        ("tokens", put((0, 5), 60_000), "row 0 .* is missing from shard"),
        ("tokens", put((0, 5), 540), "row 0 .* is missing from shard"),
        ("tokens", put((-1, -1), 30), "is not padded with EOS"),
        ("valid_tokens", put(0, 7), "the segments of row 0 .* do not cover its valid tokens"),
        ("segments/start", put(0, 1), "the segments of row 0 .* leave gaps or overlap"),
        ("segments/length", put(0, 9), "the segments of row 0"),
        ("segments/document_start", put(0, 9), "is not covered exactly once"),
        ("segments/document", lambda values: np.add.at(values, 0, 1), "is not covered exactly once"),
        ("segments/document", put(0, 999), "documents that are not in its table"),
        ("segments/row_offsets", put(0, 1), "row_offsets does not fit"),
        ("segments/row_offsets", put(1, 0), "the segments of row"),
        ("segments/row_offsets", put(2, 0), "row_offsets does not fit"),
        ("segments/row_offsets", put(-1, 1), "row_offsets does not fit"),
        ("segments/row_offsets", lambda values: np.add.at(values, -1, -1), "row_offsets does not fit"),
    ],
)
def test_content_that_does_not_fit_together(
    store: Store, name: str, change: Callable[[np.ndarray], None], message: str
) -> None:
    forge(store, name, change)
    problems = verify(store.path)
    assert any(re.search(message, problem) for problem in problems), problems


def test_layout_that_does_not_fit_the_manifest(store: Store) -> None:
    other = store.manifest.model_copy(update={"rows_per_shard": 2})
    write_manifest(store.path, other)
    assert any("instead of (2, 256)" in problem for problem in verify(store.path))


def test_a_copied_store_is_the_same(store: Store, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "copy.zarr")
    assert Manifest.read(copy).fingerprint == store.manifest.fingerprint
    assert verify(copy) == []


@pytest.mark.parametrize("other", ["start", "length", "document"])
def test_tables_that_changed_places_are_not_read(store: Store, other: str) -> None:
    """Of one shape, and each whole: only the hash of its file tells whose chunk it is."""
    files = [store.path / f"segments/{name}/c/0" for name in ("document_start", other)]
    contents = [file.read_bytes() for file in files]
    for file, data in zip(files, reversed(contents), strict=True):
        file.write_bytes(data)
    reopened = Store(store.path, store.manifest)  # as after Store.open, where the sizes are equal too
    with pytest.raises(DataError, match="does not match its checksum"):
        reopened.segments_of(0)
