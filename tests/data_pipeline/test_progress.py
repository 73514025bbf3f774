"""What a user sees of a build while it runs."""

import logging
import re
import time
from collections.abc import Callable

import pytest

from data_pipeline import duplicates, progress
from data_pipeline.store import Store


def test_a_long_plan_gives_signs_of_life(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says nothing itself, and with --duplicates near it can be the longest stage."""
    found = duplicates.exact

    def slow(*arrays: object) -> object:
        time.sleep(1)
        return found(*arrays)  # type: ignore[arg-type]

    monkeypatch.setattr(duplicates, "exact", slow)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.1)
    with caplog.at_level(logging.INFO):
        make_store()
    lines = [message for message in caplog.messages if message.startswith("plan: ")]
    assert lines
    assert all(re.fullmatch("plan: 00:0[0-9] so far", line) for line in lines)
