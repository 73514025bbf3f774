"""Commands that find no room for what they were asked for: they name it, and leave nothing of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_disk import fill
from small_stores import write_store

from data_pipeline.cli import main
from data_pipeline.output import naming
from data_pipeline.staging import write_figures


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", {"a.txt": b"some text", "b.txt": b"more"}, val=("b.txt",))
    return tmp_path / "store"


@pytest.mark.parametrize("command", ["build", "inspect", "overlap", "decode", "tokenizer"])
def test_what_there_is_no_room_for_is_named_and_leaves_nothing(
    command: str, store: Path, small_disk: Path, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "out"
    words = {
        "build": ["--input", corpus, "--tokenizer", "bytes", "--output", tmp_path / "built", "--json", output],
        "inspect": [store, "--json", output],
        "overlap": [store, "--json", output],
        "decode": [store, "--all", "--output", output],
        "tokenizer": ["--input", corpus, "--vocab-size", 540, "--output", output],
    }[command]
    filler = fill(small_disk)
    assert main([command, *map(str, words)]) == 2
    assert capfd.readouterr().err.endswith(f"error: [Errno 28] No space left on device: '{output}'\n")
    assert list(small_disk.iterdir()) == [filler]


def test_figures_of_before_stay_where_there_is_no_room_for_new_ones(store: Path, small_disk: Path) -> None:
    (small_disk / "out").write_text("of before")
    filler = fill(small_disk)
    assert main(["inspect", str(store), "--json", str(small_disk / "out")]) == 2
    assert (small_disk / "out").read_text() == "of before"
    (small_disk / "link").symlink_to("nothing")
    assert main(["inspect", str(store), "--json", str(small_disk / "link")]) == 2
    assert sorted(small_disk.iterdir()) == [filler, small_disk / "link", small_disk / "out"]


def test_figures_go_to_devices_and_through_links(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(store), "--json", "/dev/full"]) == 2
    assert capfd.readouterr().err == "error: [Errno 28] No space left on device: '/dev/full'\n"
    assert main(["inspect", str(store), "--json", "/dev/null"]) == 0
    for target in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").write_text("of before")
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        assert main(["inspect", str(store), "--json", str(link)]) == 0
        assert link.is_symlink() and json.loads(target.read_text())["rows"]


@pytest.mark.parametrize("to_a_file", [False, True])
def test_figures_go_to_standard_output(store: Path, tmp_path: Path, to_a_file: bool) -> None:
    words = [sys.executable, "-m", "data_pipeline", "inspect", str(store), "--json", "/dev/stdout"]
    with (tmp_path / "out").open("a") as file:
        done = subprocess.run(words, stdout=file if to_a_file else subprocess.PIPE, text=True, check=True)
    out = (tmp_path / "out").read_text() if to_a_file else done.stdout
    assert out.startswith("{\n") and out.rstrip().endswith("b.txt")


def test_figures_keep_the_mode_of_their_file(tmp_path: Path) -> None:
    for path, mode in ((tmp_path / "new", 0o666), (tmp_path / "there", 0o600)):
        if path.name == "there":
            path.touch(mode)
        before = os.umask(0)
        write_figures(path, "x" * 100)
        os.umask(before)
        assert path.stat().st_mode & 0o777 == mode and path.read_text() == "x" * 100


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("9 requested and 4 written"), "9 requested and 4 written: 'x'"),
        (OSError(28, "No space left"), "[Errno 28] No space left: 'x'"),
        (OSError(28, "No space left", "y"), "[Errno 28] No space left: 'y'"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ],
)
def test_only_what_has_no_room_and_no_name_is_given_one(error: OSError, words: str) -> None:
    with pytest.raises(OSError) as caught, naming(Path("x")):
        raise error
    assert str(caught.value) == words
