"""The search for near copies finds what its definition says, and many texts that are somewhat alike do not slow it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import duplicates
from data_pipeline.duplicates import near

EMPTY = 2**32 - 1
NONE = np.zeros((0, 128), np.uint32)


def slow_near(signatures: np.ndarray, threshold: float, known: np.ndarray) -> list[int]:
    """The slow, obvious twin."""
    n_bands, n_numbers = duplicates._bands(threshold)
    rows = np.concatenate((known, signatures))
    with_words = (rows != EMPTY).any(axis=1)
    kept: list[int] = []
    found = []
    for i, row in enumerate(rows):
        same = rows[kept] == row
        share_band = same[:, : n_bands * n_numbers].reshape(-1, n_bands, n_numbers).all(axis=2).any(axis=1)
        similar = share_band & (same.mean(axis=1) >= threshold) & with_words[kept] & with_words[i]
        original = kept[int(similar.argmax())] if similar.any() else -1
        if i >= len(known):
            found.append(-1 if original == -1 else -2 if original < len(known) else original - len(known))
        if i < len(known) or original == -1:
            kept.append(i)
    return found


def on_templates(rng: np.random.Generator, n: int, n_templates: int, share: float, n_values: int) -> np.ndarray:
    """Signatures that have each number of a template at a chance of about `share`, and else one of `n_values`.

    Some are copies of others with a few numbers changed, some have no words, in part or at all.
    """
    template = rng.integers(0, n_values, (n_templates, 128), np.uint32)[rng.integers(0, n_templates, n)]
    shares = np.clip(rng.normal(share, 0.05, n), 0, 1)
    rows = np.where(rng.random((n, 128)) < shares[:, None], template, rng.integers(0, n_values, (n, 128), np.uint32))
    for copy in rng.choice(n, n // 2):  # copies of copies too
        rows[copy] = rows[rng.integers(n)]
        changed = rng.choice(128, rng.integers(0, 40))
        rows[copy, changed] = rng.integers(0, n_values, len(changed))
    rows[rng.choice(n, n // 20), : rng.choice([16, 128])] = EMPTY
    return rows


THRESHOLDS = [0.5, 0.6, 0.7, 0.8, 103 / 128, float(np.nextafter(103 / 128, 1)), 0.9, 1.0]


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 120),
    n_known=st.sampled_from([0, 0, 5, 60]),
    n_templates=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.7, 0.85, 0.9, 0.95, 1.0]),
    n_values=st.sampled_from([1, 2, 5, EMPTY]),
    threshold=st.sampled_from(THRESHOLDS),
    few=st.sampled_from([0, 20, 128]),
)
def test_what_is_found_is_what_the_definition_says(
    seed: int, n: int, n_known: int, n_templates: int, share: float, n_values: int, threshold: float, few: int
) -> None:
    rows = on_templates(np.random.default_rng(seed), n_known + n, n_templates, share, n_values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "_FEW", few)
        found = near(rows[n_known:], threshold, rows[:n_known])
    assert found.dtype == np.int64
    assert found.tolist() == slow_near(rows[n_known:], threshold, rows[:n_known])


def test_a_sketch_rules_out_no_equal_number_and_most_others() -> None:
    rows = on_templates(np.random.default_rng(0), 500, 1, 0.8, EMPTY)
    n_equal = (rows[1:] == rows[0]).sum(axis=1)
    numbers = np.arange(500)
    at_most = duplicates._most_equal(duplicates._sketches(rows, numbers), numbers[1:], 0)
    assert (at_most >= n_equal).all()
    assert 0.03 < (at_most - n_equal).sum() / (128 - n_equal).sum() < 0.1  # 1 in 16


def test_numbers_that_no_other_has_are_not_shared() -> None:
    rows = np.arange(4 * 128, dtype=np.uint32).reshape(4, 128)
    rows[1, :5] = rows[0, :5]
    rows[2, 4:6] = rows[0, 4:6]
    rows[3] = rows[0]  # not one of the members
    assert duplicates._n_shared(rows, np.array([0, 1, 2])).tolist() == [6, 5, 2]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With how many others the signature of each document was compared as a whole."""
    counts, find = [], duplicates._candidates

    def counting(*arguments: object) -> np.ndarray:
        candidates = find(*arguments)  # type: ignore[arg-type]
        counts.append(len(candidates))
        return candidates

    monkeypatch.setattr(duplicates, "_candidates", counting)
    return counts


def test_texts_that_are_not_alike_are_hardly_compared(compared: list[int]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**32 - 1, (50_000, 128), np.uint32)
    rows[40_000:] = rows[:10_000]
    rows[40_000:, ::16] += np.uint32(1)
    found = near(rows, 0.8, NONE)
    assert (found[:40_000] == -1).all()
    assert np.array_equal(found[40_000:], np.arange(10_000))
    assert sum(compared) < 11_000, "each with its copy"


@pytest.mark.parametrize(("n", "share"), [(20_000, 0.77), (10_000, 0.82)], ids=["0.6", "0.67"])
def test_of_texts_on_one_template_few_pairs_are_compared(n: int, share: float, compared: list[int]) -> None:
    """Of these similarities: a fifth and a half of all pairs share a band, and all those were compared once."""
    rng = np.random.default_rng(0)
    template = rng.integers(0, EMPTY, 128, np.uint32)
    rows = rng.integers(0, EMPTY, (n, 128), np.uint32)
    np.copyto(rows, template, where=rng.random((n, 128)) < share)
    found = near(rows, 0.8, NONE)
    assert 0 < (found >= 0).sum() < 0.1 * n
    assert sum(compared) < 0.01 * n * n / 2
