"""run.json and metrics.jsonl read back: while they are written, and when they are damaged."""

import json
import re
from pathlib import Path

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
