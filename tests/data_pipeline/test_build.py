"""A store is a pure function of its inputs and settings, and holds every byte of them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from on_disk import files_of

from data_pipeline import blocks, documents, files, inputs, scratch, stages
from data_pipeline import build as build_module
from data_pipeline.decode import decode_all, decode_document, decode_row
from data_pipeline.errors import DataError
from data_pipeline.layout import chunk_tokens
from data_pipeline.manifest import Manifest
from data_pipeline.staging import partial_path
from data_pipeline.store import Store, list_files
from data_pipeline.team import Team
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.verify import verify


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
def test_any_number_of_workers_gives_the_same_bytes(
    make_store: Callable[..., Store], tmp_path: Path, packing: str
) -> None:
    stores = [
        make_store(workers=n, output=tmp_path / f"{n}.zarr", packing=packing, rows_per_shard=3) for n in (1, 2, 3)
    ]
    first, *others = [files_of(store.path) for store in stores]
    assert sum(name.startswith("tokens/c/") for name in first) > 10
    for other in others:
        assert other == first


def test_huge_documents_are_cut_the_same_way(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small blocks and tasks, so that the corpus is a corpus of huge documents."""
    for module in (blocks, build_module, documents):
        monkeypatch.setattr(module, "BLOCK_BYTES", 512)
    monkeypatch.setattr(blocks, "BOUNDARY_REACH_BYTES", 100)
    one = make_store(output=tmp_path / "one.zarr")
    monkeypatch.setattr(stages, "TASK_BYTES", (1024, 1024))
    other = make_store(output=tmp_path / "other.zarr")
    assert files_of(one.path) == files_of(other.path)
    assert one.manifest.block_bytes == 512
    assert verify(one.path) == []


def test_the_path_of_the_corpus_does_not_matter(make_store: Callable[..., Store], corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "elsewhere")
    one = make_store(output=tmp_path / "one.zarr")
    other = make_store(inputs=(str(tmp_path / "elsewhere"),), output=tmp_path / "other.zarr")
    assert files_of(one.path) == files_of(other.path)


@pytest.mark.parametrize("packing", ["bestfit", "stream"])
@pytest.mark.parametrize("tokenizer", ["small", "bytes"])
def test_every_byte_comes_back(
    make_store: Callable[..., Store],
    odd_documents: dict[str, bytes],
    tokenizer_file: Path,
    tmp_path: Path,
    packing: str,
    tokenizer: str,
) -> None:
    store = make_store(packing=packing, tokenizer="bytes" if tokenizer == "bytes" else str(tokenizer_file))
    assert verify(store.path) == []
    assert decode_all(store, tmp_path / "decoded") == len(odd_documents)
    assert files_of(tmp_path / "decoded") == odd_documents
    for name, expected in odd_documents.items():
        assert b"".join(decode_document(store, name)) == expected
    rows = b"".join(decode_row(store, row) for row in range(store.n_rows))
    assert sorted(rows) == sorted(b"".join(odd_documents.values()))


def test_bytes_take_what_is_no_text(make_store: Callable[..., Store], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    (tmp_path / "noise").write_bytes(noise)
    store = make_store(inputs=(str(tmp_path / "noise"),), tokenizer="bytes", split={})
    assert (store.vocab_size, store.manifest.bos_id, store.manifest.eos_id) == (258, 256, 257)
    assert b"".join(decode_document(store, "noise")) == noise


def test_documents_begin_and_end(make_store: Callable[..., Store]) -> None:
    store = make_store()
    for document in store.documents:
        mine = store.segments.document == document.id
        row, start, length, _, _ = (column[mine] for column in store.segments)
        assert store.read_row(int(row[0]))[start[0]] == store.manifest.bos_id
        assert store.read_row(int(row[-1]))[start[-1] + length[-1] - 1] == store.manifest.eos_id
        assert length.sum() == document.tokens


def test_plain_zarr_reads_it(make_store: Callable[..., Store]) -> None:
    store = make_store()
    group = zarr.open(store.path, mode="r")
    tokens = group["tokens"]
    assert tokens.shape == (store.n_rows, 256)
    assert tokens.dtype == np.uint16
    assert tokens.shards == (8, 256)
    assert tokens.chunks == (1, 256)
    assert int(tokens.fill_value) == 65_535
    assert np.array_equal(tokens[:], np.stack([store.read_row(row) for row in range(store.n_rows)]))
    assert group["valid_tokens"][:].sum() == sum(document.tokens for document in store.documents)
    assert group["token_bytes"].shape == (store.vocab_size,)


def test_slices_of_a_row(make_store: Callable[..., Store]) -> None:
    store = make_store()
    assert np.array_equal(store.read_row(3, 10, 20), store.read_row(3)[10:20])
    with pytest.raises(IndexError):
        store.read_row(store.n_rows)


@pytest.mark.parametrize(
    ("seq_len", "expected"),
    [(2, 2), (65_536, 65_536), (131_072, 65_536), (100_000, 50_000), (100_003, 100_003), (2**20, 65_536)],
)
def test_long_rows_are_cut_into_chunks(seq_len: int, expected: int) -> None:
    assert chunk_tokens(seq_len) == expected


def test_a_row_of_several_chunks(make_store: Callable[..., Store]) -> None:
    store = make_store(seq_len=131_072)
    assert zarr.open(store.path, mode="r")["tokens"].chunks == (1, 65_536)
    assert verify(store.path) == []


def test_splits_keep_apart(make_store: Callable[..., Store]) -> None:
    store = make_store(split={"val": 0.2, "test": 0.2})
    splits = store.manifest.splits
    assert list(splits) == ["train", "test", "val"]
    ranges = [store.split_rows(split) for split in splits]
    assert [start for ((start, _),) in ranges] == [0, *(stop for ((_, stop),) in ranges[:-1])]
    split_of = {document.id: document.split for document in store.documents}
    for split, ((start, stop),) in zip(splits, ranges, strict=True):
        inside = (store.segments.row >= start) & (store.segments.row < stop)
        assert {split_of[number] for number in store.segments.document[inside].tolist()} == {split}
    assert sum(split.documents for split in splits.values()) == len(store.documents)


def test_val_input_is_the_val_split(make_store: Callable[..., Store], tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "val.txt").write_text("held out\n" * 10)
    store = make_store(split={}, val_inputs=(str(held_out),))
    assert [document.name for document in store.documents if document.split == "val"] == ["val.txt"]
    assert store.manifest.splits["val"].n_bytes == 90


def test_the_manifest_tells_of_what_is_there(make_store: Callable[..., Store], corpus: Path) -> None:
    store = make_store()
    manifest = Manifest.read(store.path)
    assert manifest == store.manifest
    assert sorted([*manifest.files, "manifest.json"]) == list_files(store.path)
    on_disk = json.loads((store.path / "manifest.json").read_bytes())
    assert on_disk["seq_len"] == 256
    train = manifest.splits["train"]
    members = [document for document in store.documents if document.split == "train"]
    assert train.tokens == sum(document.tokens for document in members)
    assert train.n_bytes == sum((corpus / document.name).stat().st_size for document in members)
    spelled = np.array([store.tokenizer.is_byte_fallback[store.read_row(row)].sum() for row in range(store.n_rows)])
    assert sum(split.byte_fallback_tokens for split in manifest.splits.values()) == spelled.sum() > 0
    newer = manifest.model_copy(update={"library_versions": {"zarr": "99"}})
    assert newer.fingerprint == manifest.fingerprint
    assert manifest.model_copy(update={"seq_len": 512}).fingerprint != manifest.fingerprint


def test_token_bytes_measure_the_text(make_store: Callable[..., Store]) -> None:
    store = make_store()
    n_bytes = sum(
        int(store.token_bytes[store.read_row(row)[: store.valid_tokens[row]]].sum()) for row in range(store.n_rows)
    )
    assert n_bytes == sum(document.n_bytes for document in store.documents)


def test_building_again_is_no_work(make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store().path
    before, gone = files_of(path), path.with_name(f".{path.name}.partial.1f.gone")
    gone.mkdir()  # what a kill in the end of the first build would have left

    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(stages, "tokenize", fail)
    assert files_of(make_store(workers=2).path) == before and not gone.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 128}, "seq_len: 256 -> 128"),
        ({"packing": "stream"}, "packing: bestfit -> stream"),
        ({"rows_per_shard": 4}, "rows_per_shard: 8 -> 4"),
        ({"split": {"val": 0.3}}, "split: val=0.2 -> val=0.3"),
        ({"split": {}}, "split: val=0.2 -> none"),
        ({"tokenizer": "bytes"}, "tokenizer_kind: sentencepiece -> bytes"),
    ],
)
def test_other_settings_are_refused(make_store: Callable[..., Store], changes: dict, message: str) -> None:
    before = files_of(make_store().path)
    with pytest.raises(DataError, match=message) as error:
        make_store(**changes)
    assert "another --output, or delete this one" in str(error.value)
    assert files_of(make_store().path) == before


def test_other_inputs_are_refused(make_store: Callable[..., Store], corpus: Path, tmp_path: Path) -> None:
    make_store()
    other = shutil.copytree(corpus, tmp_path / "other")
    (other / "plain.txt").write_bytes((other / "plain.txt").read_bytes() + b"!")
    (other / "new.txt").write_text("new")
    (other / "crlf.txt").unlink()
    with pytest.raises(DataError) as error:
        make_store(inputs=(str(other),))
    for difference in ("1 document added: new.txt", "removed: crlf.txt", "changed: plain.txt"):
        assert difference in str(error.value)


def test_what_changed_is_noticed_after_an_append(make_store: Callable[..., Store], tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    make_store(inputs=(old,), split={})
    (tmp_path / "old" / "old.txt").write_text("OLD")
    make_store(inputs=(new,), split={}, append=True)
    with pytest.raises(DataError, match=r"built from other input: 1 document changed: old.txt"):
        make_store(inputs=(old,), split={})
    with pytest.raises(DataError, match=r"old.txt is not what the store was built from"):
        make_store(inputs=(old, new), split={}, append=True)


@pytest.fixture
def changed(make_store: Callable[..., Store], tmp_path: Path) -> Callable[..., Store]:
    """Builds one document. Builds after that find another of its size in its place, that says it is older."""
    path = tmp_path / "in" / "a.txt"
    path.parent.mkdir()
    path.write_text("text")
    make_store(inputs=(str(path),), split={})
    path.write_text("TEXT")
    os.utime(path, (1, 1))
    return lambda **changes: make_store(**{"inputs": (str(path.parent),), "split": {}, **changes})


def test_times_of_files_say_nothing_of_what_they_hold(changed: Callable[..., Store], tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "store.zarr", tmp_path / "copy")
    for output in (tmp_path / "store.zarr", tmp_path / "copy"):
        with pytest.raises(DataError, match=r"built from other input: 1 document changed: a.txt"):
            changed(output=output)
    for more in (False, True):
        if more:
            (tmp_path / "in" / "more.txt").write_text("more")
        with pytest.raises(DataError, match=r"a.txt is not what the store was built from under the name 'a.txt'"):
            changed(append=True)
    (tmp_path / "in" / "more.txt").unlink()
    (tmp_path / "in" / "a.txt").write_text("text")
    assert changed().n_rows == changed(append=True).n_rows == 1


@pytest.mark.parametrize("is_alone", [True, False])
def test_inputs_of_a_finished_store_are_read_once(
    changed: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool
) -> None:
    (tmp_path / "in" / "a.txt").write_text("text")
    read: list[str] = []
    monkeypatch.setattr(inputs, "hash_file", lambda file: read.append(file.name) or files.hash_file(file))
    if not is_alone:  # work that was stopped lies beside it
        partial_path(tmp_path / "store.zarr").mkdir()
    assert changed().n_rows == 1
    assert read == ["a.txt"]


@pytest.mark.parametrize("append", [False, True])
def test_one_process_of_several_reads_the_inputs_of_a_finished_store(
    changed: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    monkeypatch.setattr(build_module, "find_team", lambda _: Team("mpi-1", 1, 2, "MPI"))
    assert changed(append=append).n_rows == 1
    monkeypatch.setattr(build_module, "find_team", lambda _: Team("mpi-1", 0, 2, "MPI"))
    with pytest.raises(DataError, match=r"a.txt"):
        changed(append=append)


def test_what_could_not_be_read_is_no_change_as_long_as_it_cannot(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("text")
    real = files._open

    def fail(location: str) -> object:
        if location.endswith("b.txt"):
            raise PermissionError(13, "Permission denied")
        return real(location)

    settings = {"inputs": (str(tmp_path / "in"),), "split": {}, "policies": {"unreadable": "skip"}}
    with monkeypatch.context() as patch:
        patch.setattr(files, "_open", fail)
        before = files_of(make_store(**settings).path)
        assert files_of(make_store(**settings).path) == before
        assert files_of(make_store(**settings, append=True).path) == before
    with pytest.raises(DataError, match=r"1 document changed: b.txt"):
        make_store(**settings)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_may_lead_to_the_output(make_store: Callable[..., Store], tmp_path: Path, exists: bool) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    if exists:
        (tmp_path / "elsewhere").mkdir()
    store = make_store(output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert files_of(tmp_path / "elsewhere") == files_of(store.path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert files_of(make_store(output=tmp_path / "link").path) == files_of(store.path)


def test_the_tokenizer_is_stored_as_it_was_when_it_was_read(
    make_store: Callable[..., Store], tokenizer_file: Path, tmp_path: Path
) -> None:
    model = shutil.copy(tokenizer_file, tmp_path / "a.model")
    load_tokenizer(str(model), None)  # as a build asks for it, so that it is kept in memory
    model.write_bytes(b"another")
    store = make_store(tokenizer=str(model))
    assert store.tokenizer.sha256 == store.manifest.tokenizer_sha256


def test_a_failed_build_leaves_nothing(
    make_store: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch, "read_parts", fail)
    with pytest.raises(DataError, match="no room is left on the disk"):
        make_store()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_the_ranks_says_what_was_left_out(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    monkeypatch.setattr(build_module, "find_team", lambda _: Team("mpi-1", rank, 2, "MPI"))
    make_store()
    assert caplog.text.count("note: left out 1 file of other kinds") == (rank == 0)


BAD = {"good.txt": b"good", "bad.txt": b"b\xffd", "none.txt": b""}


@pytest.fixture
def make_bad(make_store: Callable[..., Store], tmp_path: Path) -> Callable[..., Store]:
    """Builds documents of which one is not valid UTF-8 and one is empty."""
    for name, data in BAD.items():
        (tmp_path / "bad" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(data)
    return lambda **changes: make_store(**{"inputs": (str(tmp_path / "bad"),), "split": {}, **changes})


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ("skip", "strict", r"'bad.txt' \(is not valid utf-8.*\) was dropped, and --on-bad encoding=strict stops at it"),
        ("skip", "replace", "was dropped, and --on-bad encoding=replace keeps what can be had of it.*encoding=skip as"),
        ("replace", "skip", "was replaced, and --on-bad encoding=skip leaves it out.*--output, or .* encoding=replace"),
    ],
)
def test_other_policies_are_refused(
    make_bad: Callable[..., Store], before: str, now: str, message: str, append: bool
) -> None:
    built = files_of(make_bad(policies={"encoding": before}).path)
    with pytest.raises(DataError, match=message):
        make_bad(policies={"encoding": now}, append=append)
    assert files_of(make_bad(policies={"encoding": before}, append=append).path) == built


def test_what_replace_leaves_nothing_of_is_not_taken_for_skipped(make_bad: Callable[..., Store]) -> None:
    options = {"bos": False, "eos": False, "policies": {"encoding": "replace"}}
    built = make_bad(**options)
    assert {(problem.problem, problem.action) for problem in built.problems} == {
        ("encoding", "replaced"),
        ("empty", "dropped"),
    }
    assert files_of(make_bad(**options).path) == files_of(built.path)


def test_policies_for_which_there_was_no_cause_may_change(make_store: Callable[..., Store]) -> None:
    before = files_of(make_store(policies={"encoding": "skip"}).path)
    assert files_of(make_store(policies={"truncated": "replace"}).path) == before
