"""Several data sets in one, by weight: a pure function of the position, exact on resume.

There is no sampling. Positions come in blocks of 1,000, and every block holds exactly as many samples of each source as
its weight says, the sources in an order of the block's own. The samples of a source come in the source's own order, so
that each goes through its own epochs without a repetition or a gap.
"""

import functools
import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order import permute

if TYPE_CHECKING:  # dataset.py imports PyTorch, of which nothing here makes use
    from data_pipeline.dataset import Sample, Samples

BLOCK_SAMPLES = 1000
"""Weights are rounded to a thousandth."""

ORDER = 2
"""Of the samples, as this file has it; in the first one, epochs of a source ran into each other."""


class Mixture:
    """The samples of several sources, mixed by weight; the sources are taken in the order of their names.

    Weights are any positive numbers: only their ratios count. Raises DataError for weights that cannot be followed, and
    for sources with rows of different lengths or different tokenizers.
    """

    def __init__(self, sources: "Mapping[str, Samples]", weights: Mapping[str, float], seed: int = 0) -> None:
        if different := sorted(sources.keys() ^ weights.keys()):
            raise DataError(f"a mixture needs a source and a weight of each name: one lacks {', '.join(different)}")
        self.counts = block_counts(weights)
        self.seed = operator.index(seed)
        self._names = sorted(self.counts)
        self._sources = [sources[name] for name in self._names]
        for name, source in zip(self._names, self._sources, strict=True):
            for key, value in source.form.items():
                if value != (first := self.form[key]):
                    raise DataError(
                        f"the sources of a mixture must be alike: {key} of {name} is {value}, and of {self._names[0]} "
                        f"{first}"
                    )
        self._counts = tuple(self.counts[name] for name in self._names)

    @property
    def form(self) -> "Mapping[str, str | int]":
        """What all sources have alike: see `dataset.Samples`."""
        return self._sources[0].form

    @property
    def identity(self) -> dict[str, str | int]:
        """What the order of training follows from: see `dataset.Samples`."""
        identity: dict[str, str | int] = {"seed": self.seed, "order": ORDER}
        for name, source in zip(self._names, self._sources, strict=True):
            identity |= {f"{name}.{key}": value for key, value in source.identity.items()}
            identity[f"{name}.per_thousand"] = self.counts[name]
        return identity

    def slice_of(self, position: int, part: int, n_parts: int) -> "Sample":
        """A part of the sample at a position >= 0: see `RowDataset.slice_of`."""
        source, own_position = self.place(position)
        return self._sources[source].slice_of(own_position, part, n_parts)

    def blank_of(self, position: int, part: int, n_parts: int) -> "Sample":
        """What stands in for `slice_of` where the row cannot be read: see `RowDataset.blank_of`."""
        source, own_position = self.place(position)
        return self._sources[source].blank_of(own_position, part, n_parts)

    def place(self, position: int) -> tuple[int, int]:
        """The source of a position >= 0, by its number in the order of names, and the position in that source."""
        if (position := operator.index(position)) < 0:
            raise IndexError(f"position {position} is negative")
        block, index = divmod(position, BLOCK_SAMPLES)
        source, number = _block_order(self._counts, self.seed, block)[index]
        return source, block * self._counts[source] + number


@functools.lru_cache(maxsize=8)  # of the few blocks that are read at one time
def _block_order(counts: tuple[int, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """The source of each index in a block, and how many of that source's samples the block has before it."""
    in_turn = [source for source, n_samples in enumerate(counts) for _ in range(n_samples)]
    sources = [in_turn[permute(index, len(in_turn), seed, block)] for index in range(len(in_turn))]
    before = [count() for _ in counts]
    return [(source, next(before[source])) for source in sources]


def block_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """How many of the samples of every block come from each source: its weight's share, rounded, at least one.

    The counts add up: what rounding down leaves goes to the largest remainders. Raises DataError where that cannot be.
    """
    weights = {name: each.item() if isinstance(each, np.generic) else each for name, each in weights.items()}
    if not 1 <= len(weights) <= BLOCK_SAMPLES:
        raise DataError(f"a mixture of {len(weights)} sources: expected 1 to {BLOCK_SAMPLES}")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"the weight of {name} in the mixture is {weight}: expected a number above 0")
    total, left = sum(map(Fraction, weights.values())), BLOCK_SAMPLES - len(weights)
    beyond = {name: max(Fraction(weight) / total * BLOCK_SAMPLES - 1, Fraction(0)) for name, weight in weights.items()}
    scale = left / (sum(beyond.values()) or Fraction(1))  # below 1 where small weights were raised to one sample
    exact = {name: 1 + share * scale for name, share in beyond.items()}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(counts, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: BLOCK_SAMPLES - sum(counts.values())]:
        counts[name] += 1
    return counts
