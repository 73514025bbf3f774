"""Folders that can be that of a run, and those that cannot."""

import errno
import os
from pathlib import Path

import pytest
from small_checkpoints import publish

from trainer.config import ConfigError
from trainer.run_folder import make_folders, refuse_other_files, refuse_unwritable

pytestmark = pytest.mark.usefixtures("process_group")


def test_a_run_is_not_begun_among_other_files(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        refuse_other_files(path)
    for name in ("longhand-train-7.log", "books.toml", "config.json", ".hidden"):  # a job's log is there before its run
        (tmp_path / name).write_text("")
    refuse_other_files(tmp_path)
    for name in ("emma.TXT", "pages.jsonl.gz", "manifest.json", "model.safetensors"):
        (tmp_path / name).write_text("a book")
        with pytest.raises(ConfigError, match=rf"has something else in it \({name}, for one\) and no run: "):
            refuse_other_files(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "emma.txt").write_text("a book")
    publish(tmp_path, 50)
    refuse_other_files(tmp_path)


def test_nor_within_a_store_of_which_all_is_hashed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    refuse_other_files(store / "run")  # manifests are of many kinds
    (store / "zarr.json").write_text("{}")
    (tmp_path / "link").symlink_to(store)
    for run_dir in (store / "run", store / "a" / "run", tmp_path / "link" / "run"):
        with pytest.raises(ConfigError, match=f"run.dir={run_dir} is in the store {store}, .* choose another folder"):
            refuse_other_files(run_dir)
    publish(store / "run", 50)  # of an earlier version
    refuse_other_files(store / "run")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ConfigError, match=f"cannot read run.dir={tmp_path}: Permission denied: choose another folder"):
        refuse_other_files(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to run.dir=.*file/run: Not a directory: choose another"):
        make_folders(tmp_path / "file" / "run")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=rf"run.dir={run_dir}: {tmp_path}/file: Not a directory: choose another"):
            refuse_unwritable(run_dir)
    refuse_unwritable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=rf"run.dir={tmp_path}/new: {tmp_path}: Permission denied: choose another"):
        refuse_unwritable(tmp_path / "new")
