"""The oldest versions that are tested (constraints-oldest.txt) are the oldest that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["corpus"], *extras["gpu"], *extras["bench"]]
    oldest = dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(needed)))
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    peers = {"datatrove", "orjson", "reformer-pytorch"}  # of benchmarks alone
    assert set(pinned) == set(oldest) - peers
    for package, version in pinned.items():
        assert numbers(version) == numbers(oldest[package]), package


def numbers(version: str) -> list[int]:
    """2.0 and 2.0.0 are the same."""
    found = [int(number) for number in version.split(".")]
    return found + [0] * (3 - len(found))
