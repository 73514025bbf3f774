"""The tokens of tasks, read as one sequence."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.scratch import ScratchTokens, tokens_path

DTYPE = np.dtype(np.uint16)


def test_any_stretch_of_several_tasks_one_of_them_without_tokens(tmp_path: Path) -> None:
    everything = np.arange(12, dtype=DTYPE)
    offsets = np.array([0, 5, 5, 12])
    for task in range(3):
        everything[offsets[task] : offsets[task + 1]].tofile(tokens_path(tmp_path, task))
    with ScratchTokens(tmp_path, offsets, DTYPE) as tokens:
        for start in range(12):
            row = np.zeros(12 - start, DTYPE)
            tokens.read_into(row, start)
            assert row.tolist() == everything[start:].tolist()


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    path = tokens_path(tmp_path, 0)
    np.arange(10, dtype=DTYPE).tofile(path)
    row = np.zeros(4, DTYPE)
    with ScratchTokens(tmp_path, np.array([0, 12]), DTYPE) as tokens:
        tokens.read_into(row, 6)
        with pytest.raises(DataError, match=f"{path} is shorter than its record says: remove {tmp_path.parent} and"):
            tokens.read_into(row, 8)
