"""Ranks that share each sequence: who holds which part of which sequence, and how the holders exchange.

Only reformer's attention knows that there are parts (sequence_part.py there), and DeepSpeed knows nothing of them. To
it each rank is one of as many data-parallel ranks as there are processes; and since every rank's loss is weighted with
what it has to predict (`engine.backward`), the gradient is that of the mean over all tokens whichever rank holds them,
under ZeRO 0 to 3 alike, its norm and clipping included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from reformer.sequence_part import WHOLE, SequencePart
from trainer.distributed import COLLECTIVE_TIMEOUT
from trainer.timing import Stopwatch


@dataclass(frozen=True)
class Place:
    """Where a rank is among n_replicas * n_parts: neighbours share sequences, since they are the best connected."""

    part: int = 0
    """Which part of its sequences it holds."""
    n_parts: int = 1
    replica: int = 0
    """Which share of each global batch it works at, with all holders of the parts."""
    n_replicas: int = 1
    sequence: SequencePart = WHOLE
    """The part as the model takes it, once the ranks have been joined."""

    @classmethod
    def of(cls, rank: int, world_size: int, n_parts: int) -> Self:
        """The place of a rank; n_parts divides world_size."""
        return cls(rank % n_parts, n_parts, rank // n_parts, world_size // n_parts)

    def rows_of(self, counts: Sequence[float]) -> int:
        """Rows that ranks have counted, from the numbers of all ranks: each once, whoever shares them."""
        return int(sum(max(counts[first : first + self.n_parts]) for first in range(0, len(counts), self.n_parts)))

    def joined(self) -> Self:
        """With what exchanges with the other holders. All ranks call this, once."""
        if self.n_parts == 1:
            return self
        group, _ = dist.new_subgroups(group_size=self.n_parts, timeout=COLLECTIVE_TIMEOUT)

        def all_to_all(x_P: Tensor) -> Tensor:
            received_P = torch.empty_like(x_P)
            dist.all_to_all_single(received_P, x_P, group=group)
            return received_P

        return replace(self, sequence=SequencePart(self.part, self.n_parts, all_to_all))


def timed(part: SequencePart, stopwatch: Stopwatch) -> SequencePart:
    """The same part, whose exchanges are timed as "exchange" within whatever they are made in."""

    def all_to_all(x_P: Tensor) -> Tensor:
        with stopwatch.phase("exchange"):
            return part.all_to_all(x_P)

    return replace(part, all_to_all=all_to_all)
