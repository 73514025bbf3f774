"""What the stages of a build have in memory."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline import stages
from data_pipeline.planning import Plan
from data_pipeline.scratch import TaskRecord
from data_pipeline.store import Store


def test_records_are_not_in_memory_while_near_copies_are_looked_for(
    make_store: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_record, make_plan = stages.read_record, stages.make_plan
    signatures: list[weakref.ref] = []
    alive: list[int] = []

    def read(path: Path) -> TaskRecord:
        record = read_record(path)
        signatures.append(weakref.ref(record.columns.minhash))
        return record

    def plan(*arguments: object) -> Plan:
        gc.collect()
        alive.append(sum(one() is not None for one in signatures))
        return make_plan(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stages, "read_record", read)
    monkeypatch.setattr(stages, "make_plan", plan)
    make_store(duplicates="near")
    assert signatures
    assert alive == [0]
