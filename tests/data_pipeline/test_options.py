"""Options of several values: what is given in several goes comes together."""

import argparse
from pathlib import Path

import pytest

from data_pipeline.cli import main, make_parser
from data_pipeline.output import SEVERAL
from data_pipeline.store import Store

NEEDED = {
    "tokenizer": ["--output", "a.model"],
    "build": ["--tokenizer", "bytes", "--output", "store"],
    "verify": ["store"],
    "overlap": ["store"],
}
"""What else a command must be given; a STORE before an option that would take it for a value."""


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("tokenizer", "--input"),
        ("build", "--input"),
        ("build", "--val-input"),
        ("build", "--test-input"),
        ("verify", "--source"),
        ("overlap", "--held-out"),
        ("overlap", "--train"),
    ],
)
def test_no_go_replaces_another(command: str, option: str) -> None:
    words = [command, *NEEDED[command], option, "a", "b", option, "c", option, "d"]
    given = getattr(make_parser().parse_args(words), option[2:].replace("-", "_"))
    assert list(map(str, given)) == ["a", "b", "c", "d"]


def test_normalizations_come_together() -> None:
    words = ["build", *NEEDED["build"], "--input", "a", "--normalize", "nfc", "--normalize", "bom", "newlines"]
    assert make_parser().parse_args(words).normalize == ["nfc", "bom", "newlines"]


def test_the_first_go_replaces_the_default_and_is_forgotten_by_the_next_call() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, **SEVERAL, default=[7])
    parser.add_argument("--none", **SEVERAL)
    for _ in range(2):
        assert parser.parse_args(["--number", "1", "--number", "7", "2"]).number == [1, 7, 2]
        assert vars(parser.parse_args([])) == {"number": [7], "none": None}


def test_a_store_has_all_that_was_given_in_several_goes(tmp_path: Path) -> None:
    for name in "abcdefghi":
        (tmp_path / name).write_text("" if name in "bd" else name)
    (tmp_path / "a").rename(tmp_path / "a.gz")  # which it is not
    words = ["build", "--tokenizer", "bytes", "--output", str(tmp_path / "store"), "--seq-len", "16", "--workers", "1"]
    for option, names in (("--input", ["a.gz", *"bchi"]), ("--val-input", "de"), ("--test-input", "fg")):
        words += [word for name in names for word in (option, str(tmp_path / name))]
    policies = ["--on-bad", "truncated=skip", "--on-bad", "empty=skip"]
    assert main([*words, *policies, "--split", "dev=0.1", "--split", "eval=0.2"]) == 0
    store = Store.open(tmp_path / "store")
    assert sorted(document.name for document in store.documents) == [*"cefghi"]
    assert store.manifest.split == {"dev": 0.1, "eval": 0.2}
    assert store.manifest.problems == {"truncated/dropped": 1, "empty/dropped": 2}
