"""How far something is: as a bar and as lines."""

import pytest

from data_pipeline import bar
from data_pipeline.bar import Bar, how_far


def test_a_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for _ in Bar(range(3), desc="verify", unit="row"):
        pass
    assert capsys.readouterr() == ("", ""), "it took no half minute"
    monkeypatch.setattr(bar, "LINE_EVERY_S", 1e-9)
    for _ in Bar(range(3), desc="verify", unit="row"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["verify: 1 of 3 rows, 00:00 left", "verify: 2 of 3 rows, 00:00 left"]
    with Bar(desc="check", total=2**21, unit="B", unit_scale=True, disable=True) as shown:
        shown.update(2**20)
    assert capsys.readouterr().err == ""


def test_where_nobody_reads_it_there_is_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bar, "LINE_EVERY_S", 1e-9)
    monkeypatch.setattr("sys.stderr", None)
    with Bar(desc="decode", total=3, unit="row") as shown:
        shown.update()
    assert list(Bar(range(3), desc="verify", unit="row")) == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for _ in Bar(range(3), desc="verify", unit="row"):
        pass
    assert "verify: 100%|" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("verify", 250, 1000, "row", 60.0), "verify: 250 of 1,000 rows, 03:00 left"),
        (("tokenize", 5 << 20, 20 << 20, "B", 60.0, 1 << 20), "tokenize: 5.24MB of 21.0MB, 03:45 left"),
        (("tokenize", 5 << 20, 20 << 20, "B", 60.0, 5 << 20), "tokenize: 5.24MB of 21.0MB"),
    ],
)
def test_what_is_left_goes_by_what_was_done_since(arguments: tuple, line: str) -> None:
    assert how_far(*arguments) == line
