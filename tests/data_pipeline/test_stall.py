"""A process that stood still, and wakes when others have done its work, harms nothing that is published."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
from on_disk import files_of

from data_pipeline import build as build_module
from data_pipeline import layout, stages
from data_pipeline.errors import DataError
from data_pipeline.staging import partial_path
from data_pipeline.store import Store, list_files
from data_pipeline.team import Team

TEAM = Team("one", 0, 2, "MPI")
"""Whoever works on the store is of one job."""


class Killed(Exception):
    """In place of a SIGKILL."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build_module, "find_team", lambda _: TEAM)
    return partial_path(tmp_path / "store.zarr")


@pytest.fixture
def later(tmp_path: Path, corpus: Path) -> tuple[str, ...]:
    """The inputs of an append."""
    (tmp_path / "later.txt").write_text("a later document\n" * 1000)
    return str(corpus), str(tmp_path / "later.txt")


@pytest.fixture
def stall(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Makes the next shard wait, its claim having expired, until `others` have been at work."""

    def at(others: Callable[[], object]) -> None:
        real = layout.write_shard

        def write_shard(*arguments: Any) -> Any:
            monkeypatch.setattr(stages.layout, "write_shard", real)
            for claim in work.glob("shards/*.claim"):
                claim.unlink()
            others()
            return real(*arguments)

        monkeypatch.setattr(stages.layout, "write_shard", write_shard)

    return at


@pytest.fixture
def killed_before_listing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """An append that is killed when its part is in place, before the store's manifest names it."""

    def append(make: Callable[[], object]) -> None:
        def die(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(stages.store, "list_part", die)
            make()

    return append


def test_a_writer_wakes_when_the_store_is_published(
    make_store: Callable[..., Store], stall: Callable[..., None], work: Path, tmp_path: Path
) -> None:
    undisturbed = files_of(make_store(output=tmp_path / "undisturbed").path)
    stall(make_store)
    assert files_of(make_store().path) == undisturbed
    assert not work.exists()


def test_a_writer_wakes_while_the_store_is_being_published(
    make_store: Callable[..., Store], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has begun by then is nowhere where others look for what they publish."""
    undisturbed = files_of(make_store(output=tmp_path / "undisturbed").path)
    rows = Store.open(tmp_path / "undisturbed").read_row(0)[None]
    begun, published, errors = Event(), Event(), []
    fsync, writers = os.fsync, []

    def wait(file: int) -> None:
        if current_thread() in writers:
            begun.set()
            assert published.wait(20)
        fsync(file)

    def write() -> None:
        try:
            layout.write_shard(work / "content", 0, rows)
        except FileNotFoundError as error:
            errors.append(error)

    def listed(path: Path) -> list[str]:
        if not writers:
            writers.append(Thread(target=write))
            writers[0].start()
            assert begun.wait(20)
        return list_files(path)

    monkeypatch.setattr(os, "fsync", wait)
    monkeypatch.setattr(stages.layout, "list_files", listed)
    found = make_store()
    published.set()
    writers[0].join()
    assert len(errors) == 1, "which stages.write_shard takes for the work of others"
    assert files_of(found.path) == undisturbed


def test_a_writer_wakes_when_a_part_is_published_but_not_listed(
    make_store: Callable[..., Store],
    stall: Callable[..., None],
    killed_before_listing: Callable[..., None],
    later: tuple[str, ...],
    work: Path,
    tmp_path: Path,
) -> None:
    make_store(output=tmp_path / "undisturbed")
    undisturbed = files_of(make_store(output=tmp_path / "undisturbed", inputs=later, append=True).path)
    make_store()
    stall(lambda: killed_before_listing(lambda: make_store(inputs=later, append=True)))
    assert files_of(make_store(inputs=later, append=True).path) == undisturbed
    assert not work.exists()


def test_what_a_planner_begins_when_it_wakes_is_not_taken_for_a_part(
    make_store: Callable[..., Store], killed_before_listing: Callable[..., None], later: tuple[str, ...], work: Path
) -> None:
    before = make_store()
    killed_before_listing(lambda: make_store(inputs=later, append=True))
    part = files_of(before.path / "parts" / "0001")
    layout.create_tokens(work / "content", before.manifest, 1)
    after = make_store(inputs=later, append=True)
    assert files_of(before.path / "parts" / "0001") == part
    assert after.documents[-1].name == "later.txt"
    assert not work.exists()


@pytest.mark.parametrize("missing", ["zarr.json", "tokens/zarr.json", "tokens/c/1/0"])
def test_what_is_not_whole_is_not_published(
    make_store: Callable[..., Store], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = stages.finish

    def lose(of: stages.Work, number: int) -> None:
        (work / "content" / missing).unlink()
        real(of, number)

    monkeypatch.setattr(stages, "finish", lose)
    with pytest.raises(DataError, match=rf"{missing} is not what was written: remove {work} and build again"):
        make_store()
    assert not (tmp_path / "store.zarr").exists()
