"""What the processes of one build have in common, and are sent."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from data_pipeline import build as build_module
from data_pipeline import stages
from data_pipeline.errors import DataError
from data_pipeline.store import Store
from data_pipeline.tokenizer import ByteTokenizer


def test_a_tokenizer_that_is_replaced_is_noticed(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process reads the model anew, perhaps on another node."""
    monkeypatch.setattr(stages, "load_tokenizer", lambda *_: ByteTokenizer())
    with pytest.raises(DataError, match=r"store disagree: the file of the tokenizer is another"):
        make()


def test_workers_are_sent_only_what_was_asked_for(make: Callable[..., Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the lists of files and tasks, which a thread of the main process may be making at that moment."""
    sent = []

    class Pool(ProcessPoolExecutor):
        def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
            sent.append(set(vars(arguments[0])))
            return super().submit(function, *arguments, **options)

    monkeypatch.setattr(build_module, "ProcessPoolExecutor", Pool)
    real = stages.begin
    monkeypatch.setattr(stages, "begin", lambda work: (real(work), work.files, work.tasks))
    make(workers=3)
    assert sent == [{field.name for field in dataclasses.fields(stages.Work)}] * 2
