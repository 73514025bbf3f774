"""What a mixture trains on is held against what evaluations hold out."""

import json
import shutil
from pathlib import Path

import pytest
from small_stores import write_store

from data_pipeline.store import Store
from trainer.config import DataConfig
from trainer.leakage import inherited, leaks


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Store]:
    """Both books and web train on what books holds out; of web one text under another name, and an empty one."""
    write_store(tmp_path / "books", {"a": b"train", "v": b"held out", "w": b"held, too", "x": b""}, val=("v", "w", "x"))
    write_store(tmp_path / "web", {"b": b"page", "c": b"held out", "d": b"", "e": b"held, too"}, val=("e",))
    write_store(tmp_path / "clean", {"b": b"page"})
    return {name: Store.open(tmp_path / name) for name in ("books", "web", "clean")}


def data(stores: dict[str, Store], *names: str, **splits: str) -> DataConfig:
    mixture = {name: {"store": stores[name].path, "weight": 1.0, "split": splits.get(name)} for name in names}
    return DataConfig(store=stores["books"].path, mixture=mixture)


def found(stores: dict[str, Store], *names: str, **splits: str) -> list[str]:
    return leaks(data(stores, *names, **splits), {"": stores["books"], **stores})


def test_documents_that_are_held_out_and_trained_on_are_counted(stores: dict[str, Store]) -> None:
    (note,) = found(stores, "books", "clean", "web")
    assert note.startswith("1 of the 2 documents that evaluations hold out ('val' of ")
    assert f"are in 'train' of data.mixture.web, {stores['web'].path}, too: the run is trained on them" in note
    (note,) = found(stores, "web", web="val")
    assert note.startswith("1 of the 2 documents") and "are in 'val' of data.mixture.web" in note


def origin(folder: Path, data: DataConfig, fingerprints: object) -> Path:
    """A folder as of launch/export.py: of a model that was trained on this."""
    folder.mkdir()
    run = {"data": data.model_dump(mode="json"), "store_fingerprint": fingerprints}
    (folder / "origin.json").write_text(json.dumps({"run": run}))
    return folder


def test_what_an_exported_model_was_trained_on_is_held_against_what_it_is_scored_on(
    tmp_path: Path, stores: dict[str, Store]
) -> None:
    web, books = stores["web"], stores["books"]
    own = origin(tmp_path / "model", DataConfig(store=web.path), web.manifest.fingerprint)
    (note,) = inherited(own, books, "val")
    assert note == (
        f"1 of the 2 documents of 'val' of {books.path} are in 'train' of {web.path}, on which the model in {own} was "
        "trained: they are no held-out text for it"
    )
    (note,) = inherited(own, web, "train")
    assert note == f"the model in {own} was trained on 'train' of {web.path}: it is no held-out text"
    moved = Store.open(web.path.rename(tmp_path / "moved"))
    assert inherited(own, moved, "train") == [
        f"the model in {own} was trained on 'train' of {moved.path}: it is no held-out text"
    ]
    moved.path.rename(web.path)
    assert inherited(own, web, "val") == inherited(own, stores["clean"], "val") == [], "of one store inspect says it"
    mixed = data(stores, "clean", "web")
    fingerprints = {f"{name}.store": stores[name].manifest.fingerprint for name in ("clean", "web")}
    assert len(inherited(origin(tmp_path / "mixed", mixed, fingerprints), books, "val")) == 1


def test_where_it_is_not_known_what_a_model_was_trained_on(tmp_path: Path, stores: dict[str, Store]) -> None:
    web, books = stores["web"], stores["books"]
    for folder, store, why in (
        ("another", web.path, "is another store now"),
        ("gone", tmp_path / "x", "is no store now"),
    ):
        (note,) = inherited(origin(tmp_path / folder, DataConfig(store=store), "0"), books, "val")
        assert f"was trained on documents of 'val' of {books.path} is not known: {store}" in note and why in note
    assert inherited(tmp_path / "none", books, "val") == []
    (tmp_path / "none").mkdir()
    for text in ("{", "[]", '{"run": {}}', '{"run": {"data": {"stores": 1}}}'):
        (tmp_path / "none" / "origin.json").write_text(text)
        assert inherited(tmp_path / "none", books, "val") == []


def test_a_table_that_is_damaged_is_a_note(tmp_path: Path, stores: dict[str, Store]) -> None:
    """Training does not read it, and one rank alone looks."""
    path = stores["web"].path / "documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"page", b"Page").replace(b'"b"', b'"B"'))
    (note,) = found(stores, "web")
    assert note.startswith("whether the mixture trains on held-out documents is not known: ")
    assert "documents.jsonl" in note
    own = origin(tmp_path / "model", DataConfig(store=stores["web"].path), stores["web"].manifest.fingerprint)
    (note,) = inherited(own, stores["books"], "val")
    assert note.startswith(f"whether the model in {own} was trained on documents of 'val' of ")
    assert "is not known: " in note and "documents.jsonl" in note


def test_tables_that_would_take_minutes_are_not_read(stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.leakage.MOST_DOCUMENTS", 3)
    books = stores["books"].path
    assert found(stores, "web") == [
        f"data.mixture.web has too many documents to look for held-out ones of {books} there"
    ]


def test_what_a_source_holds_out_is_held_against_the_other_sources(stores: dict[str, Store]) -> None:
    write = data(stores, "clean", "web").model_dump()
    write["mixture"]["web"]["eval_split"] = "val"
    assert leaks(DataConfig(**write), {"": stores["clean"], **stores}) == []
    write["mixture"]["books"] = {"store": stores["books"].path, "weight": 1.0, "split": "val"}
    (note,) = leaks(DataConfig(**write), {"": stores["clean"], **stores})
    assert note.startswith(
        f"1 of the 1 documents that evaluations hold out ('val' of {stores['web'].path}) are in 'val'"
    )
    assert "of data.mixture.books" in note


def test_data_store_that_is_a_source_too_is_looked_at_once(stores: dict[str, Store]) -> None:
    write = data(stores, "books", "web").model_dump()
    write["mixture"]["books"]["eval_split"] = "val"
    (note,) = leaks(DataConfig(**write), {"": stores["books"], **stores})
    assert [note] == found(stores, "books", "web")


def test_data_store_that_is_a_source_elsewhere_is_named(tmp_path: Path, stores: dict[str, Store]) -> None:
    copy = Store.open(shutil.copytree(stores["books"].path, tmp_path / "copy"))
    mixture = {"web": {"store": stores["web"].path, "weight": 1.0}}
    mixture["books"] = {"store": copy.path, "weight": 1.0, "eval_split": "val"}
    data = DataConfig(store=stores["books"].path, mixture=mixture)
    (note,) = leaks(data, {"": stores["books"], "books": copy, "web": stores["web"]})
    assert f"('val' of {stores['books'].path})" in note


def test_no_table_is_read_that_nothing_is_looked_for_in(
    stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a run on one store, whatever its size: all ranks wait for this."""
    read: list[Path] = []
    monkeypatch.setattr("trainer.leakage._hashes", lambda store, _: read.append(store.path) or [])
    assert found(stores) == found(stores, "books") == read == []
    found(stores, "clean", "web")
    assert read == [stores[name].path for name in ("books", "clean", "web")], "each once"


def test_nothing_is_said_where_nothing_is_shared(stores: dict[str, Store]) -> None:
    assert found(stores, "books", "clean") == found(stores) == []


def test_a_source_that_would_take_minutes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "few", {"v": b"page"}, val=("v",))
    write_store(tmp_path / "many", {"a": b"page", "b": b"another", "c": b"third", "d": b"fourth"})
    few, many = Store.open(tmp_path / "few"), Store.open(tmp_path / "many")
    mixture = {"many": {"store": many.path, "weight": 1.0}}
    monkeypatch.setattr("trainer.leakage.MOST_DOCUMENTS", 3)
    assert leaks(DataConfig(store=few.path, mixture=mixture), {"": few, "many": many}) == [
        f"data.mixture.many has too many documents to look for held-out ones of {few.path} there"
    ]


def test_nor_are_too_many_held_out_documents(stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.leakage.MOST_DOCUMENTS", 3)
    books = stores["books"].path
    assert found(stores, "clean") == [
        f"data.mixture.clean has too many documents to look for held-out ones of {books} there"
    ]


def test_nor_are_they_before_an_exported_model_is_scored(
    tmp_path: Path, stores: dict[str, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    web, books = stores["web"], stores["books"]
    own = origin(tmp_path / "model", DataConfig(store=web.path), web.manifest.fingerprint)
    assert inherited(own, books, "val")
    monkeypatch.setattr("trainer.leakage.MOST_DOCUMENTS", 3)
    (note,) = inherited(own, books, "val")
    assert "is not known" in note and "too many documents" in note
