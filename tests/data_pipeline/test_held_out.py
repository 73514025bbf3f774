"""What is held out by --val-input is not trained on: neither the same file, nor a copy of a document."""

import random
from pathlib import Path

import fsspec
import pytest
from on_disk import files_of
from read_documents import write

from data_pipeline import blocks, documents, stages
from data_pipeline import build as build_module
from data_pipeline.build import build
from data_pipeline.config import BuildSettings
from data_pipeline.dataset import RowDataset
from data_pipeline.errors import DataError
from data_pipeline.files import InputFile, check_held_out, find_files
from data_pipeline.inputs import snapshot
from data_pipeline.overlap import find_overlap
from data_pipeline.report import inspect, summary
from data_pipeline.store import Store
from data_pipeline.verify import verify

# The same file


def check(files: list[InputFile]) -> None:
    """All of them are new."""
    check_held_out(files, {file.name for file in files})


def test_a_file_is_either_trained_on_or_held_out(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    write(tmp_path / "in/a.txt")
    write(tmp_path / "in/valid/v.txt")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "valid")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/l.txt").symlink_to(tmp_path / "in/valid/v.txt")
    memory.pipe({"/in/a.txt": b"text", "/in/valid/v.txt": b"text"})
    inside = tmp_path / "in"
    for train, held_out in (
        (inside, inside / "valid"),
        (inside, tmp_path / "link"),
        (inside, tmp_path / "links"),
        (inside, f"{tmp_path}/in/../in/v*/*.txt"),
        (inside, f"file://{tmp_path}/in/valid"),
        ("memory://in", "memory://in/valid"),
    ):
        with pytest.raises(DataError, match=r"in/valid/v.txt by --input, named 'valid/v.txt', and .*.txt by --val-in"):
            check(find_files([str(train)], {"val": [str(held_out)]}, False))
    files = find_files([f"{inside}/*.txt"], {"val": [str(inside / "valid")]}, False)
    check(files)
    assert [(file.name, file.split) for file in files] == [("a.txt", None), ("v.txt", "val")]
    with pytest.raises(DataError, match=r"one file is given twice: .*in/a.txt by --input"):
        find_files([str(inside)], {"val": [str(inside)]}, False)


def test_a_build_that_would_hold_out_what_it_trains_on_does_not_begin(tmp_path: Path) -> None:
    write(tmp_path / "train/a.txt")
    write(tmp_path / "train/val/v.txt")
    (tmp_path / "val").symlink_to(tmp_path / "train/val")
    with pytest.raises(DataError, match=r"one file is given twice: .*train/val/v.txt by --input"):
        make(tmp_path)
    assert not (tmp_path / "store").exists()
    make(tmp_path, inputs=(f"{tmp_path}/train/*.txt",))
    with pytest.raises(DataError, match=r"one file is given twice: .*train/val/v.txt by --input"):
        make(tmp_path, append=True)  # which would train on what the store holds out


# A copy of a document

NOVEL = " ".join(f"word{n}" for n in range(300))
REPRINT = NOVEL.replace("word150", "misprint")


def settings(folder: Path, output: str = "store", **changes: object) -> BuildSettings:
    """Of the folders train and val in `folder`."""
    given = {
        "inputs": (str(folder / "train"),),
        "val_inputs": (str(folder / "val"),),
        "tokenizer": "bytes",
        "output": folder / output,
        "seq_len": 512,
        "rows_per_shard": 2,
    }
    return BuildSettings(**{**given, **changes})  # type: ignore[arg-type]


def make(folder: Path, output: str = "store", **changes: object) -> Store:
    return build(settings(folder, output, **changes)).store


def split_of(store: Store) -> dict[str, str]:
    return {document.name: document.split for document in store.documents}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names of train come first, and last."""
    for name in ("a", "z"):
        write(tmp_path / f"train/{name}_copy.txt", "a copy")
        write(tmp_path / f"train/{name}_novel.txt", REPRINT)
    write(tmp_path / "train/other.txt", "another text")
    write(tmp_path / "val/copied.txt", "a copy")
    write(tmp_path / "val/novel.txt", NOVEL)
    return tmp_path


def test_of_copies_the_one_in_train_goes(folder: Path) -> None:
    exact = make(folder, "exact", duplicates="drop")
    assert split_of(exact) == {"a_novel.txt": "train", "copied.txt": "val", "novel.txt": "val", "other.txt": "train"}
    near = make(folder, "near", duplicates="near")
    assert split_of(near) == {"copied.txt": "val", "novel.txt": "val", "other.txt": "train"}
    assert [(problem.document, problem.problem, problem.detail) for problem in near.problems] == [
        ("a_copy.txt", "duplicate", "of copied.txt"),
        ("a_novel.txt", "near-duplicate", "of novel.txt"),
        ("z_copy.txt", "duplicate", "of copied.txt"),
        ("z_novel.txt", "duplicate", "of a_novel.txt"),
    ]
    for store in (exact, near):
        assert verify(store.path) == []
        assert "in train too" not in inspect(store)


def test_a_test_split_of_files_that_are_named(folder: Path) -> None:
    """It keeps what val and train have, too; the rest is as ever."""
    write(folder / "test/novel_again.txt", NOVEL)
    write(folder / "test/own.txt", "only here")
    tested = {"test_inputs": (str(folder / "test"),)}
    store = make(folder, duplicates="drop", **tested)
    assert split_of(store) == {
        "a_novel.txt": "train",
        "copied.txt": "val",
        "novel_again.txt": "test",
        "other.txt": "train",
        "own.txt": "test",
    }
    assert list(store.manifest.splits) == ["train", "test", "val"] and verify(store.path) == []
    assert build(settings(folder, duplicates="drop", **tested)).already_built
    with pytest.raises(DataError, match=r"was built from other input: 2 documents removed: novel_again.txt, own"):
        make(folder, duplicates="drop")
    with pytest.raises(DataError, match="--val-input or --test-input name other files of it than before"):
        make(folder, duplicates="drop", val_inputs=tested["test_inputs"], test_inputs=(str(folder / "val"),))
    with pytest.raises(
        DataError, match=r"by --test-input, named 'v.txt', and .* by --val-input|by --val-input.* --test"
    ):
        write(folder / "both/v.txt")
        (folder / "links").mkdir()
        (folder / "links/w.txt").symlink_to(folder / "both/v.txt")
        make(folder, "both_ways", val_inputs=(str(folder / "both"),), test_inputs=(str(folder / "links"),))
    with pytest.raises(DataError, match="the split test is given twice: drop either --test-input or test= in --split"):
        make(folder, "twice", split={"test": 0.1}, **tested)
    mixed = make(folder, "mixed", val_inputs=(), split={"val": 0.5}, **tested)
    assert {split_of(mixed)[name] for name in ("novel_again.txt", "own.txt")} == {"test"}
    assert "val" in split_of(mixed).values()


@pytest.mark.parametrize("others", [(), ("more",)], ids=["nothing new", "with new files"])
def test_what_is_appended_moves_no_document_to_another_split(folder: Path, others: tuple[str, ...]) -> None:
    write(folder / "more/more.txt")
    store = make(folder)
    inputs = tuple(str(folder / name) for name in others) or (str(folder / "train"),)
    again = {"append": True, "inputs": inputs, "val_inputs": (str(folder / "val"),)}
    assert build(settings(folder, **again)).already_built is not bool(others)
    held = min(name for name, split in split_of(store).items() if split == "val")
    moved = {**again, "val_inputs": (), "test_inputs": (str(folder / "val"),)}
    message = (
        f"{held} is in the store already, and its document '{held}' in the split 'val': --append moves none to 'test'"
    )
    with pytest.raises(DataError, match=message):
        build(settings(folder, **moved))


def test_an_appended_file_of_another_name_s_content_is_told_as_that(folder: Path) -> None:
    """It is not in the store: that it has a name which is there is what is wrong."""
    store = make(folder)
    name = min(name for name, split in split_of(store).items() if split == "train")
    write(folder / "other" / name, "not what is there")
    again = {"append": True, "inputs": (str(folder / "train"),), "val_inputs": (str(folder / "other"),)}
    again["inputs"] = tuple(str(path) for path in (folder / "train").iterdir() if path.name != name)
    with pytest.raises(
        DataError, match=f"{name} is not what the store was built from under the name .*: rename the fil"
    ):
        build(settings(folder, **again))


def test_records_that_are_held_out_later_are_told_too(tmp_path: Path) -> None:
    write(tmp_path / "train/more.txt", "more")
    write(tmp_path / "held.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    options = {"val_inputs": (), "inputs": (f"{tmp_path}/train", f"{tmp_path}/held.jsonl")}
    build(settings(tmp_path, **options))
    again = {**options, "append": True, "inputs": (f"{tmp_path}/train",), "test_inputs": (f"{tmp_path}/held.jsonl",)}
    message = (
        r"held.jsonl is in the store already, and its document 'held.jsonl/0' in the split 'train': --append moves"
    )
    with pytest.raises(DataError, match=message):
        build(settings(tmp_path, **again))


def test_splits_that_are_far_off_by_tokens_and_padding_are_told(tmp_path: Path) -> None:
    """A share is one of documents; of few that differ in length it may be hardly any of the tokens, or most."""
    for number in range(20):
        write(tmp_path / f"train/{number}.txt", f"{number} " * (1000 if number == 3 else 5))
    options = {"val_inputs": (), "split": {"val": 0.2}, "packing": "book"}
    notes = build(settings(tmp_path, **options)).notes
    share, padding = sorted(notes, reverse=True)
    assert share.startswith("val=0.2 of the documents are 0.0") and "to choose, name files with --val-input" in share
    assert " of the tokens, since documents differ in length: " in share
    assert padding.endswith("choose a smaller --seq-len, or --packing bestfit")
    named = {**options, "test_inputs": (f"{tmp_path}/train/3.txt",), "packing": "bestfit"}
    named["inputs"] = tuple(f"{tmp_path}/train/{number}.txt" for number in range(20) if number != 3)
    assert build(settings(tmp_path, "named", **named)).notes == (), "of the others, val has its share"
    few = {**options, "packing": "bestfit", "split": {"val": 0.01}, "inputs": (f"{tmp_path}/train/1[0-3].txt",)}
    caught, note = build(settings(tmp_path, "few", **few)).notes
    assert caught.startswith("val=0.01 caught none of 4 documents") and note.startswith(
        "val=0.01 of the documents are 0.25 of the tokens, being 1 of 4: to choose, name"
    )
    even = {**options, "packing": "bestfit", "split": {"val": 0.2}, "inputs": (f"{tmp_path}/train/1*.txt",)}
    assert build(settings(tmp_path, "even", **even)).notes == ()


def test_files_are_recorded_as_they_always_have_been() -> None:
    """A build that an earlier version began goes on, and the hash of a corpus is the same."""
    found = [InputFile(f"{split}.txt", "/x", 5, 7, split) for split in (None, "val", "test")]
    assert snapshot(found) == {"None.txt": (5, 7, False), "val.txt": (5, 7, True), "test.txt": (5, 7, "test")}


def test_near_copies_where_no_two_documents_are_equal(tmp_path: Path) -> None:
    write(tmp_path / "train/a_other.txt", "another text")
    write(tmp_path / "train/b_novel.txt", REPRINT)
    write(tmp_path / "val/novel.txt", NOVEL)
    (problem,) = make(tmp_path, duplicates="near").problems
    assert (problem.document, problem.detail) == ("b_novel.txt", "of novel.txt")


def test_variants_of_a_sequence_without_a_space_are_no_near_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks and parts they share. A sequence that is whole in one part is a copy of the same letters."""
    for module in (blocks, build_module, documents):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(blocks, "BOUNDARY_REACH_BYTES", 16)
    monkeypatch.setattr(stages, "TASK_BYTES", (4096, 4096))
    sequence = "".join(random.Random(0).choices("ACGT", k=25 * 4096))
    write(tmp_path / "train/long.txt", sequence)
    write(tmp_path / "train/long_variant.txt", sequence[:-1] + "N")
    write(tmp_path / "train/y_short.txt", sequence[:400])
    write(tmp_path / "train/z_short.txt", sequence[:400].lower())
    write(tmp_path / "val/other.txt", sequence[:399] + "N")
    (problem,) = make(tmp_path, duplicates="near").problems
    assert (problem.document, problem.detail) == ("z_short.txt", "of y_short.txt")


def test_a_store_may_be_all_held_out(folder: Path) -> None:
    """Texts to evaluate a model on."""
    store = make(folder, inputs=())
    assert split_of(store) == {"copied.txt": "val", "novel.txt": "val"} and list(store.manifest.splits) == ["val"]
    assert verify(store.path) == [] and summary(store)["also_in_train"] == {"val": 0}
    assert make(folder, inputs=()).manifest == store.manifest, "it is there"
    after = make(folder, inputs=(), val_inputs=(), test_inputs=(str(folder / "train/other.txt"),), append=True)
    assert split_of(after)["other.txt"] == "test" and verify(store.path) == []
    with pytest.raises(DataError, match="has no split 'train', only test, val"):
        RowDataset(after)
    with pytest.raises(DataError, match="has no split 'train': name the stores that are trained on with --train"):
        find_overlap(after, ["val"], [after])
    assert find_overlap(after, ["test"], [make(folder, "trained")])[0].overlapping == 0
    for changes, message in (
        ({"val_inputs": ()}, "no files are named: give --input, or --val-input or --test-input for a store of these"),
        ({"split": {"test": 0.5}}, "--split holds out a share of the documents of --input, and there is none: leave"),
    ):
        with pytest.raises(DataError, match=message):
            make(folder, inputs=(), **changes)


@pytest.mark.parametrize("duplicates", ["drop", "near"])
def test_which_copy_goes_does_not_depend_on_who_builds(folder: Path, duplicates: str) -> None:
    one, other = (files_of(make(folder, f"{n}", duplicates=duplicates, workers=n).path) for n in (1, 2))
    assert one == other


def test_what_a_store_holds_already_stays(folder: Path) -> None:
    """Also in train. What is added is held against it, and then as ever."""
    make(folder, duplicates="drop")
    write(folder / "more/b_new.txt", "new")
    write(folder / "more/b_copy.txt", "a copy")
    write(folder / "more_val/new.txt", "new")
    write(folder / "more_val/other_copy.txt", "another text")
    more = {"inputs": (str(folder / "more"),), "val_inputs": (str(folder / "more_val"),)}
    after = make(folder, duplicates="drop", append=True, **more)
    assert list(split_of(after).items())[-1] == ("new.txt", "val")
    assert split_of(after).keys().isdisjoint({"b_new.txt", "b_copy.txt", "other_copy.txt"})
    assert split_of(after)["other.txt"] == "train"
    assert summary(after)["also_in_train"] == {"val": 0}


def test_copies_that_are_kept_are_counted_in_so_many_words(folder: Path) -> None:
    write(folder / "val/empty.txt", "")
    write(folder / "train/nothing.txt", "")
    store = make(folder)
    assert summary(store)["also_in_train"] == {"val": 1}
    assert "\n1 of the 3 documents of val are in train too, byte for byte: a new store" in inspect(store)
    write(folder / "more/new.txt", NOVEL)
    after = make(folder, append=True, inputs=(str(folder / "more"),), val_inputs=())
    assert summary(after)["also_in_train"] == {"val": 2}


def test_a_split_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train/a.txt", "a copy")
    write(tmp_path / "train/b.txt", "a copy")
    write(tmp_path / "val/a_copy.txt", "a copy")
    with pytest.raises(
        DataError, match=r"of --input is left of the 2 that were found: 2 duplicates. Change --duplicates, or add"
    ):
        make(tmp_path, duplicates="drop")
    assert split_of(make(tmp_path)) == {"a.txt": "train", "a_copy.txt": "val", "b.txt": "train"}
    write(tmp_path / "broken/a.jsonl", "{not JSON")
    write(tmp_path / "blank/a.jsonl", "\n")
    for changes in ({}, {"split": {"test": 0.1}}):
        with pytest.raises(DataError, match="the files of --input hold no documents: add some"):
            make(tmp_path, "blank_train", inputs=(str(tmp_path / "blank"),), **changes)
    with pytest.raises(
        DataError, match=r"of --val-input is left of the 1 that were found: 1 with the problem unreadable. Ch"
    ):
        make(tmp_path, "other", val_inputs=(str(tmp_path / "broken"),), policies={"unreadable": "skip"})


def test_a_copy_of_the_first_document_of_all_says_so(tmp_path: Path) -> None:
    write(tmp_path / "train/a.txt", "a copy")
    write(tmp_path / "train/b.txt", "a copy")
    (problem,) = make(tmp_path, val_inputs=(), duplicates="drop").problems
    assert (problem.document, problem.detail) == ("b.txt", "of a.txt")


def test_nor_does_an_append_with_new_files_move_a_document(folder: Path) -> None:
    store = make(folder)
    write(folder / "more/more.txt")
    moved = {"append": True, "inputs": (str(folder / "more"),), "val_inputs": (), "test_inputs": (str(folder / "val"),)}
    with pytest.raises(
        DataError, match=r"is in the store already, .* in the split 'val': --append moves none to 'test'"
    ):
        make(folder, **moved)
    assert Store.open(store.path).n_rows == store.n_rows
