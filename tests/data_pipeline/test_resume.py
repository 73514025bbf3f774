"""An unfinished build goes on, and refuses what would make it another one."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from on_disk import files_of

from data_pipeline import jobs, scratch, stages
from data_pipeline.errors import DataError
from data_pipeline.jobs import membership
from data_pipeline.staging import partial_path
from data_pipeline.store import Store
from data_pipeline.verify import verify


class Interrupted(Exception):
    """In place of a SIGKILL."""


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes a stage stop before its task number n, once."""

    def at(stage: str, number: int) -> None:
        real = getattr(stages, stage)

        def stop(work: stages.Work, task: int) -> None:
            if task == number:
                monkeypatch.setattr(stages, stage, real)
                raise Interrupted
            real(work, task)

        monkeypatch.setattr(stages, stage, stop)

    return at


STAGES = [("tokenize_task", 2), ("plan", 0), ("write_shard", 3), ("finish", 0)]


@pytest.mark.parametrize(("stage", "number"), STAGES)
def test_it_goes_on_and_ends_the_same(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], tmp_path: Path, stage: str, number: int
) -> None:
    undisturbed = files_of(make(output=tmp_path / "undisturbed").path)
    interrupt(stage, number)
    with pytest.raises(Interrupted):
        make()
    assert not (tmp_path / "store").exists()
    assert files_of(make().path) == undisturbed
    assert not partial_path(tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 512}, "seq_len: 32768 -> 512"),
        ({"tokenizer": "bytes"}, "tokenizer_kind: sentencepiece -> bytes"),
        ({"duplicates": "drop"}, "duplicates: keep -> drop"),
        ({"eos": False}, "eos: True -> False"),
    ],
)
def test_other_settings_are_refused(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], changes: dict[str, Any], message: str
) -> None:
    interrupt("write_shard", 3)
    with pytest.raises(Interrupted):
        make()
    with pytest.raises(DataError, match=rf"holds an unfinished build of .*{message}.*to start afresh"):
        make(**changes)
    make()


def test_other_inputs_are_refused(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], books: Path
) -> None:
    interrupt("write_shard", 3)
    with pytest.raises(Interrupted):
        make()
    old = (books / "2.txt").read_bytes()
    (books / "2.txt").write_bytes(old + b"more\n")
    (books / "3.txt").touch()
    differences = "1 document added: 3.txt; 1 document changed: 2.txt"
    with pytest.raises(
        DataError, match=rf"from other inputs: {differences}. Run it with the inputs as they were, times"
    ):
        make()
    message = (
        rf"inputs and settings: eos: True -> False; {differences}. Run the command that began it with the inputs as"
    )
    with pytest.raises(DataError, match=message):
        make(eos=False)


def test_an_input_that_changes_meanwhile(
    make: Callable[..., Store], books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = files_of(make(output=tmp_path / "undisturbed").path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in books.iterdir()}
    real = stages.tokenize
    n_done = 0

    def change(task: scratch.TokenizeTask) -> None:
        nonlocal n_done
        if n_done == n_good:
            Path(task.files[0].location).write_text("changed")
        real(task)
        n_done += 1

    for n_good, way_out in (
        (0, r": run the command again$"),
        (
            1,
            r", and .*/\.store\.partial was begun.* same command again, or remove .*/\.store\.partial to start afresh$",
        ),
    ):
        n_done = 0
        with monkeypatch.context() as patch:
            patch.setattr(stages, "tokenize", change)
            with pytest.raises(DataError, match=rf"\d\.txt changed while it was being read{way_out}"):
                make()
        assert partial_path(tmp_path / "store").exists() == bool(n_good)
        if n_good:
            with pytest.raises(DataError, match=r"unfinished build of .* from other inputs: 1 document changed"):
                make()
        for path, (data, mtime_ns) in before.items():
            path.write_bytes(data)
            os.utime(path, ns=(mtime_ns, mtime_ns))
    assert files_of(make().path) == undisturbed


def test_the_plan_may_change_until_it_is_made(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt("plan", 0)
    with pytest.raises(Interrupted):
        make()

    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    with pytest.raises(DataError, match="from other settings: duplicates: keep -> near"):
        make(duplicates="near")
    changes = {"seq_len": 1 << 14, "packing": "book", "stride": 1 << 13, "rows_per_shard": 4, "duplicates": "drop"}
    changes |= {"split": {"val": 0.5}, "near_threshold": 0.9}
    with monkeypatch.context() as patch:
        patch.setattr(stages, "tokenize", fail)
        changed = make(**changes)
    assert files_of(changed.path) == files_of(make(output=tmp_path / "other", **changes).path)


def test_a_policy_may_change_and_only_what_it_applies_to_is_done_again(
    make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"1.txt is not valid utf-8 at byte 1050000"):
        make(policies={})
    done: list[int] = []
    real = scratch.tokenize
    monkeypatch.setattr(stages, "tokenize", lambda task: (done.append(task.number), real(task)))
    with pytest.raises(DataError, match=r"1.txt is not valid"):
        make(policies={"empty": "skip"})
    done.clear()
    replaced = files_of(make(policies={"encoding": "replace"}).path)
    assert 0 not in done, "the tokens of 0.txt were good"
    assert replaced == files_of(make(output=tmp_path / "other").path)


def test_policies_of_a_build_that_was_planned(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], tmp_path: Path
) -> None:
    interrupt("write_shard", 3)
    with pytest.raises(Interrupted):
        make(policies={"encoding": "replace"})
    skipped = make(policies={"encoding": "skip"})
    assert [document.name for document in skipped.documents] == ["0.txt", "2.txt"]
    assert files_of(skipped.path) == files_of(make(output=tmp_path / "other", policies={"encoding": "skip"}).path)


def test_a_second_builder_is_refused(make: Callable[..., Store], tmp_path: Path) -> None:
    output = tmp_path / "store"
    with (
        membership(partial_path(output), "another", output, keep=lambda: True),
        pytest.raises(DataError, match=r"store is being built by another process: wait for it to end, or stop it"),
    ):
        make()
    make()


def test_leftovers_of_a_build_that_was_killed_after_its_last_step(make: Callable[..., Store], tmp_path: Path) -> None:
    built = files_of(make().path)
    work = partial_path(tmp_path / "store")
    (work / "tokens").mkdir(parents=True)
    (work / "tokens" / "00000000.npz").touch()
    assert files_of(make().path) == built
    assert not work.exists()


def test_a_folder_that_appears_in_the_place_of_the_store_is_kept(
    make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = tmp_path / "store", stages.finish

    def late(work: stages.Work, number: int) -> None:
        store.mkdir()
        (store / "mine").write_text("precious")
        real(work, number)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "finish", late)
        with pytest.raises(DataError, match=r"store appeared while it was being written here: remove it and run again"):
            make()
    assert [path.read_text() for path in store.iterdir()] == ["precious"]
    shutil.rmtree(store)
    assert verify(make().path) == []


def test_an_append_that_was_killed(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], books: Path, tmp_path: Path
) -> None:
    before = make()
    (books / "3.txt").write_text("new\n" * 1000)
    (books / "4.txt").write_text("newer\n" * 1000)
    for stage, number in STAGES[1:]:
        interrupt(stage, 0 if stage == "write_shard" else number)
        with pytest.raises(Interrupted):
            make(append=True)
        assert Store.open(before.path).n_rows == before.n_rows
    after = make(append=True)
    assert [document.name for document in after.documents[3:]] == ["3.txt", "4.txt"]
    assert not partial_path(tmp_path / "store").exists()


def test_a_store_that_was_begun_but_not_planned_may_get_other_rows(
    make: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stages.write_json

    def stop(path: Path, facts: Any) -> None:
        if path.parent.name == "plan":
            raise Interrupted
        real(path, facts)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_json", stop)
        with pytest.raises(Interrupted):
            make()
    changed = files_of(make(seq_len=1 << 14).path)
    assert changed == files_of(make(output=tmp_path / "other", seq_len=1 << 14).path)


@pytest.fixture
def keep_work() -> Iterator[Callable[[str], None]]:
    """Makes the end of a build, or the removal of its work directory, stop before the entry of this name, once."""
    patch = pytest.MonkeyPatch()

    def at(last: str) -> None:
        def remove(work: Path) -> None:
            patch.undo()
            for entry in sorted(work.iterdir()):
                if entry.name == last:
                    raise OSError
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

        def write_json(path: Path, facts: Any) -> None:
            if path.parent.name == last:
                patch.undo()
                raise OSError
            real(path, facts)

        real = stages.write_json
        patch.setattr(stages, "write_json", write_json)
        patch.setattr(jobs, "shutil", SimpleNamespace(rmtree=remove))

    yield at
    patch.undo()


@pytest.mark.parametrize("last", ["finish", "job.json", "tokens"])
def test_what_was_left_of_a_finished_append_is_not_taken_for_the_next(
    make: Callable[..., Store], keep_work: Callable[[str], None], books: Path, tmp_path: Path, last: str
) -> None:
    for book in books.iterdir():
        book.write_text(book.name)
    make()
    (books / "3.txt").write_text("new\n" * 1000)
    keep_work(last)
    with contextlib.suppress(OSError):
        make(append=True)
    assert any(path.name.startswith(".store.partial") for path in tmp_path.iterdir())
    (books / "4.txt").write_text("newer\n" * 1000)
    after = make(append=True)
    assert [document.name for document in after.documents[3:]] == ["3.txt", "4.txt"]
    assert verify(after.path, sources=[str(books)]) == []
    assert not any(path.name.startswith(".store.partial") for path in tmp_path.iterdir())


@pytest.mark.parametrize("last", ["finish", "tokens"])
def test_a_store_that_was_removed_is_built_again(
    make: Callable[..., Store], keep_work: Callable[[str], None], books: Path, tmp_path: Path, last: str
) -> None:
    for book in books.iterdir():
        book.write_text(book.name)
    for text in ("the same", "another"):
        keep_work(last)
        with contextlib.suppress(OSError):
            make()
        shutil.rmtree(tmp_path / "store")
        (books / "2.txt").write_text(text)
        assert files_of(make().path) == files_of(make(output=tmp_path / text).path)
        shutil.rmtree(tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decisive": {"seq_len": 64}}, "seq_len: 64 -> 32768"),
        ({"settings": {"policies": {"encoding": "skip"}}}, "--on-bad: .*'encoding': 'skip'"),
    ],
)
def test_processes_that_disagree_are_stopped(
    make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, changes: dict[str, dict[str, Any]], message: str
) -> None:
    real = stages.start

    def start(work: stages.Work, number: int) -> None:
        """As by another of the same job, that was started with other options."""
        decisive = work.decisive.model_copy(update=changes.get("decisive"))
        settings = dataclasses.replace(work.settings, **changes.get("settings", {}))
        real(dataclasses.replace(work, decisive=decisive, settings=settings), number)

    monkeypatch.setattr(stages, "start", start)
    with pytest.raises(DataError, match=rf"store disagree: {message}.*Start all of them by the same command"):
        make()


def test_a_finished_store_leaves_the_work_of_an_unfinished_append_alone(
    make: Callable[..., Store], interrupt: Callable[[str, int], None], books: Path, tmp_path: Path
) -> None:
    make()
    old = shutil.copytree(books, tmp_path / "old")
    (books / "3.txt").write_text("new\n" * 1000)
    interrupt("write_shard", 0)
    with pytest.raises(Interrupted):
        make(append=True)
    kept = set(files_of(partial_path(tmp_path / "store") / "tokens"))
    make(inputs=(str(old),))
    assert set(files_of(partial_path(tmp_path / "store") / "tokens")) == kept
    make(append=True)
    assert not partial_path(tmp_path / "store").exists()
