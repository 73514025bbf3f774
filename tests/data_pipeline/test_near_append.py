"""What is added with --duplicates near is held against the documents that the store has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from on_disk import files_of
from read_documents import write

from data_pipeline.build import BuildResult, build
from data_pipeline.config import BuildSettings
from data_pipeline.errors import DataError
from data_pipeline.layout import SIGNATURES_NAME, record_file, write_manifest
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.store import Store
from data_pipeline.verify import verify


def novel(name: str) -> str:
    return " ".join(f"{name}{n}" for n in range(300))


def reprint(name: str) -> str:
    return novel(name).replace(f"{name}150", "misprint")


def make(folder: Path, *inputs: str, append: bool = False, **changes: Any) -> BuildResult:
    """Builds a store of some of the folders in `folder`, or adds to it."""
    settings = BuildSettings(
        inputs=tuple(f"{folder}/{name}" for name in inputs),
        tokenizer="bytes",
        seq_len=64,
        split={"val": 0.2},
        append=append,
        **{"output": folder / "store", "duplicates": "near", **changes},
    )
    return build(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Its folder first has a store, the others are to be added."""
    for name in "abc":
        write(tmp_path / f"first/{name}.txt", novel(name))
    write(tmp_path / "first/empty.txt", "")
    write(tmp_path / "second/b_reprint.txt", reprint("b"))
    write(tmp_path / "second/d.txt", novel("d"))
    write(tmp_path / "third/b_other.txt", reprint("b") + " end")
    write(tmp_path / "third/d_reprint.txt", reprint("d"))
    write(tmp_path / "third/d_same.txt", novel("d"))
    write(tmp_path / "third/e.txt", novel("e"))
    write(tmp_path / "third/e_reprint.txt", reprint("e"))
    make(tmp_path, "first")
    return tmp_path


def found(store: Store) -> dict[str, str]:
    return {f"{one.document}: {one.problem}": one.detail for one in store.problems if "duplicate" in one.problem}


BEFORE = "of a document that the store held before"


def test_near_copies_of_what_the_store_has_are_not_added(folder: Path) -> None:
    before = Store.open(folder / "store")
    assert make(folder, "second", append=True).notes == ()
    make(folder, "third", append=True)
    store = Store.open(folder / "store")
    assert found(store) == {
        "b_reprint.txt: near-duplicate": BEFORE,
        "b_other.txt: near-duplicate": BEFORE,
        "d_reprint.txt: near-duplicate": BEFORE,
        "d_same.txt: duplicate": BEFORE,
        "e_reprint.txt: near-duplicate": "of e.txt",
    }
    assert {one.name for one in store.documents} - {one.name for one in before.documents} == {"d.txt", "e.txt"}
    assert [len(part.signatures()) for part in store.parts] == [len(before.documents), 1, 1]
    assert verify(folder / "store") == []


def test_who_adds_makes_no_difference(folder: Path) -> None:
    stores = []
    for workers in (1, 2):
        make(folder, "second", "third", append=True, workers=workers)
        stores.append(files_of(folder / "store"))
        (folder / "store").rename(folder / f"store_{workers}")
        make(folder, "first", workers=workers)
    assert stores[0] == stores[1]


def test_other_stores_have_no_signatures(folder: Path) -> None:
    store = make(folder, "first", output=folder / "other", duplicates="drop").store
    assert store.parts[0].signatures() is None
    assert not (store.path / SIGNATURES_NAME).exists()


def rewrite(path: Path, signatures: np.ndarray | None) -> None:
    """Gives a store other signatures, or takes them from it, as if it had been built so."""
    manifest = Manifest.read(path)
    files = dict(manifest.files)
    if signatures is None:
        (path / SIGNATURES_NAME).unlink()
        del files[SIGNATURES_NAME]
    else:
        np.save(path / SIGNATURES_NAME, signatures)
        files[SIGNATURES_NAME] = record_file(path / SIGNATURES_NAME)
    write_manifest(path, manifest.model_copy(update={"files": files}))


def test_a_store_without_signatures_says_that_near_copies_are_not_found(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder / "store", None)
    assert verify(folder / "store") == []
    for name in ("second", "third"):  # what was added has signatures
        caplog.clear()
        make(folder, name, append=True)
        (note,) = [message for message in caplog.messages if "signatures" in message]
        assert note.startswith(f"note: {folder}/store was built by a version that did not keep its documents' sig")
    assert found(Store.open(folder / "store")) == {
        "b_other.txt: near-duplicate": BEFORE,
        "d_reprint.txt: near-duplicate": BEFORE,
        "d_same.txt: duplicate": BEFORE,
        "e_reprint.txt: near-duplicate": "of e.txt",
    }


def test_damaged_signatures_are_noticed(folder: Path) -> None:
    store = folder / "store"
    whole = Store.open(store).parts[0].signatures()
    data = bytearray((store / SIGNATURES_NAME).read_bytes())
    data[-1] ^= 1
    (store / SIGNATURES_NAME).write_bytes(data)
    with pytest.raises(DataError, match=r"signatures.npy is damaged, its content does not match its checksum: restore"):
        make(folder, "second", append=True)
    assert json.loads((store / MANIFEST_NAME).read_bytes())["parts"] == {}
    assert any("signatures.npy is damaged" in problem for problem in verify(store))
    rewrite(store, whole[:-1])
    assert verify(store) == [f"{store} has signatures of shape [{len(whole) - 1}, 128], and {len(whole)} documents"]
