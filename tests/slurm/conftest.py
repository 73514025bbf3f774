"""A SLURM cluster for each process that runs tests, started by the first test that needs one."""

from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, reason_for_none, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := reason_for_none():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
