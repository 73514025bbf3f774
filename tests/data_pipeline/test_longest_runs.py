"""Stretches of training documents; the runs in them are in test_overlap.py."""

import numpy as np
import pytest

from data_pipeline.longest_runs import Stretches, _joined


@pytest.mark.parametrize(("store", "document"), [((0, 1), (3, 3)), ((0, 0), (3, 4))])
def test_those_of_two_documents_never_become_one(store: tuple[int, int], document: tuple[int, int]) -> None:
    """Not even where one begins at the place at which the other would go on."""
    stretches = Stretches(*map(np.array, (store, document, (1, 12), (61, 72))))
    assert _joined(stretches, 50).start.tolist() == [1, 12]
