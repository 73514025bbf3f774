"""A store and what was appended to it read as one, and who has it open notices nothing."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from on_disk import files_of
from small_stores import write_store

from data_pipeline.decode import decode_all, decode_document
from data_pipeline.errors import DataError
from data_pipeline.manifest import MANIFEST_NAME, Manifest, merge
from data_pipeline.store import Store, list_part, part_path
from data_pipeline.verify import verify

FIRST = {"a.txt": b"the first document of all", "b.txt": bytes(range(100)), "c.txt": b"held out"}
MORE = {"d.txt": b"a later one, " * 5, "e.txt": b""}
LAST = {"f.txt": b"and the last"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    write_store(path, FIRST, val=["c.txt"])
    return path


def append(path: Path, name: str, contents: dict[str, bytes], **settings: object) -> None:
    write_store(part_path(path, name), contents, **settings)
    list_part(path, name)


def test_parts_read_as_one(root: Path) -> None:
    before = Store.open(root)
    append(root, "0001", MORE)
    append(root, "0002", LAST, val=["f.txt"])
    store = Store.open(root)
    first, second, third = store.parts
    assert [part.first_row for part in store.parts] == [0, before.n_rows, before.n_rows + second.manifest.n_rows]
    assert store.n_rows == third.stop_row > second.stop_row > first.stop_row
    train, val = before.manifest.splits["train"].rows, before.manifest.splits["val"].rows
    assert store.split_rows("train") == [*train, (first.stop_row, second.stop_row)]
    assert store.split_rows("val") == [*val, (second.stop_row, third.stop_row)]
    assert [document.name for document in store.documents] == [*FIRST, *MORE, *LAST]
    assert [document.id for document in store.documents] == list(range(6))
    assert [record.name for record in store.inputs] == [*FIRST, *MORE, *LAST]
    assert list(store.manifest.splits) == ["train", "val"]
    assert store.manifest.splits["train"].documents == 4
    before.refuse_replaced()
    for row in range(before.n_rows):
        assert np.array_equal(store.read_row(row), before.read_row(row))
    for name, content in {**FIRST, **MORE, **LAST}.items():
        assert b"".join(decode_document(store, name)) == content
    assert verify(root) == []


def test_segments_and_valid_tokens_are_numbered_on(root: Path) -> None:
    append(root, "0001", MORE)
    store = Store.open(root)
    assert np.array_equal(np.unique(store.segments.row), np.arange(store.n_rows))
    assert np.array_equal(np.unique(store.segments.document), np.arange(5))
    assert np.array_equal(np.bincount(store.segments.row, store.segments.length), store.valid_tokens)
    for row in range(store.n_rows):
        of_row = store.segments.row == row
        assert np.array_equal(store.segments_of(row), np.stack([c[of_row] for c in store.segments[1:]], axis=1))
    for row in (-1, store.n_rows):
        with pytest.raises(IndexError, match=f"row {row} is outside a store of {store.n_rows} rows"):
            store.read_row(row)


def test_a_reader_keeps_what_there_was(root: Path) -> None:
    reader = Store.open(root)
    right = [reader.read_row(row) for row in range(reader.n_rows)]
    files = files_of(root)
    del files[MANIFEST_NAME]
    append(root, "0001", MORE)
    assert files.items() <= files_of(root).items()
    for store in (reader, pickle.loads(pickle.dumps(reader))):
        assert store.n_rows == len(right)
        assert all(np.array_equal(store.read_row(row), tokens) for row, tokens in enumerate(right))
    assert Store.open(root).n_rows > reader.n_rows


def test_a_pickled_store_has_its_parts(root: Path) -> None:
    append(root, "0001", MORE)
    store = Store.open(root)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.manifest == store.manifest
    assert np.array_equal(copy.read_row(store.n_rows - 1), store.read_row(store.n_rows - 1))


def test_the_fingerprint_covers_all_parts_and_no_library(root: Path, tmp_path: Path) -> None:
    append(root, "0001", MORE)
    alone = Manifest.read(root)
    assert alone.model_copy(update={"library_versions": {"zarr": "9"}}).fingerprint == alone.fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    append(root, "0002", LAST)
    assert Store.open(root).manifest.fingerprint != Store.open(copy).manifest.fingerprint
    versions = Manifest.read(part_path(copy, "0001")).model_copy(update={"library_versions": {"zarr": "9"}})
    (part_path(copy, "0001") / MANIFEST_NAME).write_bytes(versions.to_bytes())
    (copy / MANIFEST_NAME).write_bytes(Manifest.read(copy).model_copy(update={"parts": {}}).to_bytes())
    list_part(copy, "0001")
    append(copy, "0002", LAST)
    assert Store.open(root).manifest.fingerprint == Store.open(copy).manifest.fingerprint


def test_splits_and_problems_of_all_parts_are_in_their_order(root: Path) -> None:
    """Whichever part has them."""
    whole = Manifest.read(root)
    train, val = whole.splits.values()
    first = whole.model_copy(update={"splits": {"val": val}, "problems": {"empty/kept": 1}})
    second = whole.model_copy(update={"splits": {"train": train, "test": val}, "problems": {"duplicate/kept": 2}})
    merged = merge({".": first, "parts/0001": second})
    assert list(merged.splits) == ["train", "test", "val"]
    assert list(merged.problems.items()) == [("duplicate/kept", 2), ("empty/kept", 1)]


def test_listing_twice_changes_nothing(root: Path) -> None:
    append(root, "0001", MORE)
    once = (root / MANIFEST_NAME).read_bytes()
    list_part(root, "0001")
    assert (root / MANIFEST_NAME).read_bytes() == once


def test_a_part_that_is_not_listed_is_no_part(root: Path) -> None:
    write_store(part_path(root, "0001"), MORE)
    assert Store.open(root).n_rows == Manifest.read(root).n_rows
    assert verify(root, quick=True) == []
    assert verify(root) == [f"{root}/parts/0001 is no part of the store"]


def test_a_part_of_other_settings_is_refused(root: Path) -> None:
    write_store(part_path(root, "0001"), MORE, eos=False, packing="stream", text={"encoding": "latin-1"})
    with pytest.raises(DataError, match=r"packing: bestfit -> stream; eos: True -> False; encoding: utf-8 -> latin-1"):
        list_part(root, "0001")
    assert Manifest.read(root).parts == {}


def test_a_part_of_another_store_is_found(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_store(other, FIRST)
    append(root, "0001", MORE)
    append(other, "0001", LAST)
    shutil.rmtree(part_path(root, "0001"))
    shutil.copytree(part_path(other, "0001"), part_path(root, "0001"))
    message = "parts/0001 is not the part that was appended"
    with pytest.raises(DataError, match=message):
        Store.open(root)
    with pytest.raises(DataError, match=message):
        list_part(root, "0001")
    for quick in (True, False):
        (problem,) = verify(root, quick)
        assert message in problem


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "one.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"one\.npz is a file, not a store: build one with"):
        Store.open(tmp_path / "one.npz")
    with pytest.raises(DataError, match=r"one\.npz/below does not exist"):
        Store.open(tmp_path / "one.npz" / "below")


def test_a_missing_part_is_found(root: Path) -> None:
    append(root, "0001", MORE)
    append(root, "0002", LAST)
    shutil.rmtree(part_path(root, "0001"))
    with pytest.raises(DataError, match="parts/0001 does not exist"):
        Store.open(root)
    assert ["parts/0001 does not exist" in problem for problem in verify(root)] == [True]


def test_a_damaged_part_does_not_hide_what_is_wrong_elsewhere(root: Path) -> None:
    append(root, "0001", MORE)
    (part_path(root, "0001") / MANIFEST_NAME).write_text("{}")
    (root / "tokens/c/0/0").unlink()
    problems = "\n".join(verify(root))
    assert "parts/0001/manifest.json is damaged" in problems
    assert "tokens/c/0/0 is missing" in problems
    assert "no part of the store" not in problems


def test_a_manifest_edited_by_hand_is_found(root: Path) -> None:
    append(root, "0001", MORE)
    content = json.loads((root / MANIFEST_NAME).read_text())
    content["parts"] = {}
    (root / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n")
    assert "manifest.json is damaged" in verify(root)[0]


def test_a_damaged_row_is_named_as_the_store_numbers_it(root: Path) -> None:
    append(root, "0001", MORE)
    row = Store.open(root).n_rows - 1
    shard = part_path(root, "0001") / "tokens/c/1/0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(DataError, match=rf"row {row} of .* in shard {shard}"):
        Store.open(root).read_row(row)


def test_every_document_is_written_out(root: Path, tmp_path: Path) -> None:
    append(root, "0001", MORE)
    assert decode_all(Store.open(root), tmp_path / "out") == 5
    for name, content in {**FIRST, **MORE}.items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_a_part_may_hold_no_rows(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_store(bare, {"a.txt": b"text"}, bos=False, eos=False)
    append(bare, "0001", {"empty.txt": b""}, bos=False, eos=False)
    append(bare, "0002", {"z.txt": b"more"}, bos=False, eos=False)
    store = Store.open(bare)
    assert b"".join(decode_document(store, "z.txt")) == b"more"
    assert store.read_row(store.n_rows - 1)[:4].tolist() == list(b"more")
    assert verify(bare) == []


def test_documents_of_one_name_are_found(root: Path) -> None:
    append(root, "0001", {"d.txt": b"new", "a.txt": b"another text of a name that is taken"})
    assert verify(root) == ["2 documents are named 'a.txt'"]
