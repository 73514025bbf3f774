"""run.json and metrics.jsonl read back: while they are written, and when they are damaged."""

import io
import json
import re
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest

from trainer.config import ConfigError
from trainer.run_files import METRICS, RECORD, read_metrics, read_metrics_tail, read_record

WHOLE = [{"step": 1, "train/loss": 5.0}, {"step": 2, "train/loss": None}]
TEXT = '{"step": 1, "train/loss": 5.0}\n{"step": 2, "train/loss": NaN}\n{"step": 3, "train/lo'


def test_a_line_counts_once_its_end_is_there(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text(TEXT)
    assert read_metrics(tmp_path) == read_metrics_tail(tmp_path) == WHOLE
    assert read_metrics_tail(tmp_path, len(TEXT) - 1) == WHOLE[1:]
    file.write_text(TEXT.rpartition("\n")[0])
    assert read_metrics(tmp_path) == read_metrics_tail(tmp_path) == WHOLE[:1]
    file.write_text("")
    assert read_metrics(tmp_path) == read_metrics_tail(tmp_path) == []


class Growing(io.BytesIO):
    """A file that a run adds to while it is read: at what is its end for now, a line is not whole."""

    def __next__(self) -> bytes:
        line = self.readline(15)
        if not line:
            raise StopIteration
        return line


def test_a_line_whose_end_comes_while_it_is_read_is_not_taken_for_two(tmp_path: Path) -> None:
    file = Growing(b'{"step": 1}\n{"step": 2, "eval/loss": 5.0}\n')
    with mock.patch.object(Path, "open", return_value=file):
        assert read_metrics(tmp_path) == [{"step": 1}]


def test_names_are_in_memory_once_and_not_in_each_line(tmp_path: Path) -> None:
    """And of a name that is in a line twice the last value counts, as in any JSON that Python reads."""
    names = [f"{number:0200d}" for number in range(10)]
    line = json.dumps({"step": 1, **dict.fromkeys(names, 0)})
    (tmp_path / METRICS).write_text(f'{line[:-1]}, "step": 2}}\n' * 1000)
    tracemalloc.start()
    lines = read_metrics(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines == [{"step": 2, **dict.fromkeys(names, 0)}] * 1000
    assert peak < 1_000_000, "of which the names alone would take two, and the file two"


@pytest.mark.parametrize("damage", [b"\xff", b"", b"{", b"5", b'{"train/loss": 5.0}'])
def test_a_damaged_line_is_an_error_and_no_hindrance_for_the_newest(tmp_path: Path, damage: bytes) -> None:
    first, second, rest = TEXT.encode().split(b"\n")
    (tmp_path / METRICS).write_bytes(b"\n".join([first, damage, second, rest]))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / METRICS} is damaged in its line 2: ")):
        read_metrics(tmp_path)
    assert read_metrics_tail(tmp_path) == WHOLE


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"config": null}', '{"config": {}'])
def test_a_damaged_record(tmp_path: Path, damage: str) -> None:
    file = tmp_path / RECORD
    file.write_text(json.dumps({"config": {"run": {"steps": 3}}}))
    assert read_record(tmp_path)["config"]["run"]["steps"] == 3
    file.write_text(damage)
    with pytest.raises(ConfigError, match=re.escape(f"{file} is damaged: ")):
        read_record(tmp_path)


def test_what_is_no_run(tmp_path: Path) -> None:
    for read, name in ((read_record, RECORD), (read_metrics, METRICS)):
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} is not the folder of a run: cannot read")) as told:
            read(tmp_path)
        assert str(told.value).startswith(f"{tmp_path} is not the folder") and str(tmp_path / name) in str(told.value)
    assert read_metrics_tail(tmp_path) == []
