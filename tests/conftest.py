"""The order of the test files, each of which is one process's (`make test`): what takes minutes begins first."""

from pathlib import Path

import pytest

LONGEST = ("distributed", "slurm", "browser")
"""Folders, the first one first; the others come after, in the order of their names."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)
