"""Settings of a build as a call in Python gives them."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build import build
from data_pipeline.cli import make_parser
from data_pipeline.config import BuildSettings, TextSettings
from data_pipeline.errors import DataError

INTEGERS = ("vocab_size", "seq_len", "stride", "rows_per_shard", "workers")


def settings(**changes: Any) -> BuildSettings:
    return BuildSettings(**{"inputs": "a.txt", "tokenizer": "bytes", "output": "store", **changes})


@pytest.mark.parametrize("value", ["1024", 1024.5, 1024.0, True, np.float64(1024), [1024]], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer(name: str, value: object) -> None:
    with pytest.raises(DataError, match=re.escape(f"{name} is {value!r}: expected an integer")):
        settings(**{"packing": "book", name: value})


@pytest.mark.parametrize("name", ["seq_len", "workers"])
def test_what_must_be_given(name: str) -> None:
    with pytest.raises(DataError, match=f"^{name} is None: expected an integer$"):
        settings(**{name: None})


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("split", "val=0.3", "{'val': 0.3}"),
        ("split", None, "{'val'"),
        ("policies", "empty=skip", "{'encoding': 'skip'}"),
    ],
)
def test_what_is_no_dict(name: str, value: object, example: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"{name} is {value!r}: expected a dict such as {example}")):
        settings(**{name: value})


def test_integers_of_numpy(tmp_path: Path) -> None:
    given = {name: np.int64(number) for name, number in zip(INTEGERS, (9, 16, 8, 4, 1), strict=True)}
    assert all(type(getattr(settings(packing="book", **given), name)) is int for name in INTEGERS)
    (tmp_path / "a.txt").write_text("abcdefgh" * 9)
    changes = {"inputs": tmp_path / "a.txt", "output": tmp_path / "store", "packing": "book"}
    store = build(settings(**changes, **{**given, "vocab_size": None})).store
    plain = build(settings(**changes, seq_len=16, stride=8, rows_per_shard=4))
    assert plain.already_built and json.loads((store.path / "manifest.json").read_bytes())["seq_len"] == 16


def test_the_text_is_as_the_command_line_has_it() -> None:
    given = settings(tokenizer="a.model", text=TextSettings(encoding="latin-1", normalize=("nfc", "bom")))
    assert given.text == TextSettings(encoding="iso8859-1", normalize=("bom", "nfc"))
    with pytest.raises(DataError, match="--encoding is 'klingon'"):
        settings(text=TextSettings(encoding="klingon"))


def test_the_page_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "library.md").read_text()
    (section,) = re.findall(r"`BuildSettings` has the options.*?`result.store` is", page, re.DOTALL)
    options = vars(make_parser().parse_args(["build", "--tokenizer", "bytes", "--output", "store"])).keys()
    for name in {each.name for each in fields(BuildSettings)}:
        assert re.search(rf"`{name}(`|=)", section) or name in options, name
    for option in options - {"run", "json"}:
        named = "no-" * (option in ("bos", "eos")) + option.replace("_", "-")
        assert f"`--{named}" in section or option in {each.name for each in fields(BuildSettings)}, option
